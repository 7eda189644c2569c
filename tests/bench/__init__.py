"""Benchmarks: each a ratio within one run."""

import data as data  # before torch: it says how OpenMP threads wait
