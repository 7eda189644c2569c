"""Mergeable first and second moments of rows, in float64.

Chan, Golub and LeVeque's pairwise update (1979). It is exact to float64 rounding, whatever the
grouping. A naive E[x²] − E[x]² loses everything where a channel's mean is 400 times its deviation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Moments:
    """Statistics of `count` rows of width d."""

    count: int  # rows
    mean: NDArray[np.float64]  # (d,)
    m2: NDArray[np.float64]  # (d,) sum of squared deviations from the mean

    @staticmethod
    def empty(d: int) -> Moments:
        return Moments(0, np.zeros(d), np.zeros(d))

    @staticmethod
    def of(rows: NDArray[np.floating]) -> Moments:
        """Moments of (n, d) rows."""
        if len(rows) == 0:
            return Moments.empty(rows.shape[1])
        exact = rows.astype(np.float64)
        mean = exact.mean(0)
        return Moments(len(rows), mean, np.square(exact - mean).sum(0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows together."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + np.square(delta) * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> NDArray[np.float64]:
        """(d,) population variance per dimension."""
        return self.m2 / max(self.count, 1)


def merge_all(parts: Iterable[Moments], d: int) -> Moments:
    """Moments of all parts together, merged in the order given."""
    return reduce(Moments.merge, parts, Moments.empty(d))
