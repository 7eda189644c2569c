"""Linear probes of labels on a few latents, beside probes of the residual: study.py."""
