"""Stage three: what a trained autoencoder is worth."""

import data as data  # before torch: it says how OpenMP threads wait
