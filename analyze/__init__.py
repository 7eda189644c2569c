"""Stage three: what a trained autoencoder is worth."""
