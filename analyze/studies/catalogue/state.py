"""What is known of every latent after some units, in memory that does not grow with them.

The result does not depend on the order of the units: sums are of float64 (to rounding), what is
kept are the largest by a key and, of equal keys, those at the earliest tokens. Random samples are
the largest by a pseudo-random key of (latent, token), so a sample is uniform over the places where
its latent fires, and the same however often the work was cut off.

Shapes: p pairs of a latent and a token, F d_sae, K kept of each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyze.studies.catalogue.index import Postings
from data import order

BINS = 64  # of an activation histogram
SEED = 0  # of the samples
_PER_OCTAVE = 4
_OCTAVES_BELOW = 12  # from the histogram's left end up to the scale; four are above
_MANTISSA = 21  # bits of a float32 below its exponent and the first two of its fraction

Key = NDArray[np.uint32]


class Places(NamedTuple):
    """Places where latents fire, with what they are ranked by; (p,) each, or (F, K)."""

    key: Key
    token: NDArray[np.int64]  # flat position in the store's spine
    document: NDArray[np.uint32]
    value: NDArray[np.float32]


class Largest:
    """Of each latent the K places with the largest keys, in descending order."""

    def __init__(self, features: int, count: int, *, distinct: bool) -> None:
        """Nothing yet.

        Args:
            distinct: at most one place of a document.
        """
        shape = features, count
        kinds = (np.uint32, np.int64, np.uint32, np.float32)
        self._kept = Places._make(
            np.zeros(shape, kind) for kind in kinds
        )  # with key 0 where there are fewer
        self._distinct = distinct
        self._pending: list[tuple[NDArray[np.uint32], Places]] = []

    def update(self, key: Key, first: int, found: Postings) -> None:
        """Take in a unit's places.

        Args:
            key: (p,) > 0.
            first: the unit's first token in the store's spine.
        """
        floor = self._kept.key[:, -1].copy()
        passing = np.flatnonzero(
            key >= floor[found.feature]
        )  # of equal keys the earlier token is kept
        if self._distinct:
            passing = passing[_peaks(found.feature[passing], found.document[passing], key[passing])]
        token = found.token[passing].astype(np.int64) + first
        places = Places(key[passing], token, found.document[passing], found.value[passing])
        self._pending.append((found.feature[passing], places))
        # Every merge sorts all that is kept, 2.4 s at 32,768 latents: not at every unit, but at
        # half as much again.
        if sum(len(one) for one, _ in self._pending) > self._kept.key.size // 2:
            self._merge()

    def settled(self) -> Places:
        """(F, K) each, with key 0 where there are fewer."""
        self._merge()
        return self._kept

    def _merge(self) -> None:
        features, count = self._kept.key.shape
        there = self._kept.key > 0
        old = np.repeat(np.arange(features, dtype=np.uint32), there.sum(1))
        groups = [(old, Places._make(column[there] for column in self._kept)), *self._pending]
        self._pending = []
        feature = np.concatenate([group for group, _ in groups]).astype(np.uint64)
        every = Places._make(
            map(np.concatenate, zip(*(places for _, places in groups), strict=True))
        )
        best = _ordered(feature << np.uint64(32) | ~every.key, every.token)
        if self._distinct:
            _, once = np.unique(
                (feature << np.uint64(32) | every.document)[best], return_index=True
            )
            best = best[np.sort(once)]
        rank = rank_within(feature[best])
        best, rank = best[rank < count], rank[rank < count]
        where = feature[best].astype(np.int64), rank
        self._kept.key[:] = 0
        self._kept.key[where] = every.key[best]
        self._kept.token[where] = every.token[best]
        self._kept.document[where] = every.document[best]
        self._kept.value[where] = every.value[best]


def _ordered(major: NDArray[np.uint64], minor: NDArray[np.int64]) -> NDArray[np.int64]:
    """`np.lexsort((minor, major))` where ties are few: three times as fast."""
    order = np.argsort(major)
    ranked = major[order]
    same = ranked[1:] == ranked[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
    order[tied] = order[tied][np.lexsort((minor[order[tied]], ranked[tied]))]
    return order


def rank_within(group: NDArray[np.generic]) -> NDArray[np.int64]:
    """(n,) how many before each belong to its group, whose members lie together."""
    begins = np.ones(len(group), np.bool_)
    begins[1:] = group[1:] != group[:-1]
    at = np.arange(len(group))
    first: NDArray[np.int64] = np.maximum.accumulate(np.where(begins, at, 0))
    return at - first


def _peaks(
    feature: NDArray[np.uint32], document: NDArray[np.uint32], key: Key
) -> NDArray[np.int64]:
    """The first largest key of each run of the same latent and document."""
    if not len(key):
        return np.empty(0, np.int64)
    begins = np.ones(len(key), np.bool_)
    begins[1:] = (feature[1:] != feature[:-1]) | (document[1:] != document[:-1])
    run = np.cumsum(begins) - 1
    at = np.flatnonzero(key == np.maximum.reduceat(key, np.flatnonzero(begins))[run])
    first: NDArray[np.int64] = at[rank_within(run[at]) == 0]
    return first


class State:
    """Counts, moments, histogram, strongest places and a sample of every latent."""

    def __init__(self, features: int, scale: float, *, top: int, sample: int) -> None:
        """Nothing counted yet.

        Args:
            scale: what activations are compared with; the histogram's bins lie about it.
            top: strongest places, one per document.
            sample: random places.
        """
        self.rows = 0
        self.count = np.zeros(features, np.int64)  # rows in which it fires
        self.sum = np.zeros(features)
        self.squares = np.zeros(features)
        self.largest = np.zeros(features, np.float32)
        self.histogram = np.zeros((features, BINS), np.int64)
        self.top = Largest(features, top, distinct=True)
        self.sample = Largest(features, sample, distinct=False)
        self._left = _left(scale)
        self._salt = _random(features, -1)

    def update(self, unit: int, unit_tokens: int, found: Postings, rows: int) -> None:
        """Take in one unit.

        Args:
            unit_tokens: of a whole unit.
            rows: that were encoded.
        """
        features = len(self.count)
        value = found.value.astype(np.float64)
        self.rows += rows
        self.count += np.bincount(found.feature, minlength=features)
        self.sum += np.bincount(found.feature, value, minlength=features)
        self.squares += np.bincount(found.feature, value * value, minlength=features)
        np.maximum.at(self.largest, found.feature, found.value)
        bits = found.value.view(np.uint32)  # of positive floats in the order of their values
        cell = np.clip((bits >> _MANTISSA).astype(np.int64) - self._left, 0, BINS - 1)
        cell += found.feature.astype(np.int64) * BINS
        self.histogram += np.bincount(cell, minlength=features * BINS).reshape(features, BINS)
        self.top.update(bits, unit * unit_tokens, found)
        chance = _random(unit_tokens, unit)[found.token] ^ self._salt[found.feature]
        self.sample.update(np.maximum(chance, 1), unit * unit_tokens, found)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(F,) of the activations where a latent fires; NaN if it never does."""
        return self._where_it_fires(self.sum)

    @property
    def deviation(self) -> NDArray[np.float64]:
        """(F,) standard deviation of the same, of the population."""
        variance = self._where_it_fires(self.squares) - self.mean**2
        return np.sqrt(np.where(variance < 0, 0, variance))

    def _where_it_fires(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.full(len(total), np.nan)
        np.divide(total, self.count, out=found, where=self.count > 0)
        return found

    @property
    def edges(self) -> NDArray[np.float32]:
        """(BINS + 1,) of the histogram; the first bin also holds what is below, the last what is
        above.
        """
        return ((np.arange(BINS + 1) + self._left).astype(np.uint32) << np.uint32(_MANTISSA)).view(
            np.float32
        )


def _left(scale: float) -> int:
    """The first bin's number: a float32's exponent and first two bits of its fraction, four bins to
    the octave.
    """
    power = np.float32(2.0 ** np.floor(np.log2(scale)))
    return int(power.view(np.uint32) >> _MANTISSA) - _OCTAVES_BELOW * _PER_OCTAVE


def _random(n: int, stream: int) -> Key:
    return (order.keys(n, SEED, 0xCA7A, stream) >> np.uint64(32)).astype(np.uint32)
