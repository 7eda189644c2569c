"""Stage two: sparse autoencoders trained on a store of activations."""
