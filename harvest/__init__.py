"""Stage one: text through a language model into an activation store."""
