"""Word problems, the answers that a model gives, and their grades."""
