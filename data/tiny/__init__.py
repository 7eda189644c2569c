"""The embedded demo: a tiny trained model of the Gemma 4 architecture and its word problems."""
