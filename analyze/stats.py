"""Statistics that the studies share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def sums_by(group: ArrayLike, *values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Each of `values` (n,) summed by group (n,), one sum per group that occurs."""
    _, dense = np.unique(group, return_inverse=True)
    return [np.bincount(dense, value).astype(np.float64) for value in values]


def bootstrap_ratio(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64], draws: int = 1000, seed: int = 0
) -> Interval:
    """Percentile interval of sum(numerator) / sum(denominator) over resampled clusters (Efron and Tibshirani, ch. 13).

    Rows of one document resemble each other, so documents are what is resampled.

    Args:
        numerator: (clusters,) sums within each cluster.
        denominator: (clusters,) likewise.
    """
    rng, n = np.random.default_rng(seed), len(numerator)
    ratios = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        ratios[draw] = (times @ numerator) / (times @ denominator)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(low), float(high))
