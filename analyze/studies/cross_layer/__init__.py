"""Which latents of one dictionary predict which of another, on the same tokens."""
