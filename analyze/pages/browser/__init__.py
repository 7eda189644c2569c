"""The feature browser: a static site of a run's latents."""
