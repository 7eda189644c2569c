"""Changes of a layer's output while a model writes, and what they do."""
