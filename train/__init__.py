"""Stage two: sparse autoencoders trained on a store of activations."""

import data as data  # before torch: it says how OpenMP threads wait
# Before CUDA starts: without it, torch refuses matrix products where only deterministic algorithms are allowed.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
