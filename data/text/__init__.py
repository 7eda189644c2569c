"""Text sources, and packing their documents into rows of tokens."""
