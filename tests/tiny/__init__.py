"""How the embedded model, its tokenizer and its problems were made."""
