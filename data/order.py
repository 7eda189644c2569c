"""Deterministic orders: pure functions of integers, the same on every machine and library version.

NumPy does not promise that `Generator.permutation` keeps its stream between versions, and a store
outlives versions. So keys come from SplitMix64 (Steele, Lea, Flood 2014,
https://doi.org/10.1145/2714064.2660195), and an order from sorting the keys.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of 64-bit integers."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keys(n: int, *seeds: int) -> NDArray[np.uint64]:
    """(n,) pseudo-random 64-bit keys that depend on every seed and on their order."""
    state = np.zeros(1, np.uint64)
    for seed in seeds:
        state = _mix((state + _GOLDEN) ^ np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF))
    return _mix(state + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))


def permutation(n: int, *seeds: int) -> NDArray[np.int64]:
    """(n,) a permutation of range(n), a pure function of (n, seeds)."""
    return np.argsort(keys(n, *seeds), kind="stable")


def held_out(units: int, seed: int, share: float = 0.05, most: int = 64) -> NDArray[np.int64]:
    """Sorted numbers of the units that are never trained on. A pure function of (units, seed).

    They are `share` of all units, at least one and at most `most`. 64 units of 65,536 rows hold the
    4 million rows on which an SAE is measured; more would be held out for nothing. Empty for a
    store of one unit, which cannot be split.
    """
    if units < 2:
        return np.empty(0, np.int64)
    count = min(most, max(1, round(units * share)))
    return np.sort(permutation(units, seed, 0x4E1D)[:count])
