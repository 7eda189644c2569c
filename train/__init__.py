"""Stage two: sparse autoencoders trained on a store of activations."""

import os

import data as data  # before torch: it says how OpenMP threads wait

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: without it cuBLAS repeats no bits
