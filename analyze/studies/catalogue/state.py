"""What is known of every latent after some units, in memory that does not grow with the units.

The result does not depend on the order of the units. Sums are float64 (equal to rounding). The
places kept are those with the largest keys, and of equal keys the earliest tokens. Random samples
are the places with the largest pseudo-random key of (latent, token). So a sample is uniform over
the places where its latent fires, and a study that was stopped draws the same one.

Shapes: p pairs of a latent and a token, F d_sae, K places kept of each latent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.studies.catalogue.index import Postings
from residual_saes.data import order

BINS = 64  # of an activation histogram
SEED = 0  # of the samples
_PER_OCTAVE = 4  # bins
_OCTAVES_BELOW = 12  # from the histogram's left end up to the scale; four are above
_MANTISSA = 21  # bits of a float32 below its exponent and the first two of its fraction

Key = NDArray[np.uint32]


class Places(NamedTuple):
    """Tokens at which latents fire, with what they are ranked by; (p,) each, or (F, K)."""

    key: Key
    token: NDArray[np.int64]  # flat position in the store's spine
    document: NDArray[np.uint32]
    value: NDArray[np.float32]


class Largest:
    """Of each latent the K places with the largest keys, in descending order."""

    def __init__(self, features: int, count: int, *, distinct: bool) -> None:
        """Start empty.

        Args:
            count: K.
            distinct: keep at most one place of a document.
        """
        shape = (features, count)
        # The key is 0 where a latent has fewer than K places.
        self._kept = Places(
            key=np.zeros(shape, np.uint32),
            token=np.zeros(shape, np.int64),
            document=np.zeros(shape, np.uint32),
            value=np.zeros(shape, np.float32),
        )
        self._distinct = distinct
        self._pending: list[tuple[NDArray[np.uint32], Places]] = []  # (latent, places), unsorted

    def update(self, key: Key, first: int, postings: Postings) -> None:
        """Add a unit's places.

        Args:
            key: (p,) > 0.
            first: the unit's first token in the store's spine.
        """
        # A key equal to the smallest one kept passes: of equal keys the earlier token is kept.
        smallest = self._kept.key[:, -1].copy()
        passing = np.flatnonzero(key >= smallest[postings.feature])
        if self._distinct:
            peaks = _peaks(postings.feature[passing], postings.document[passing], key[passing])
            passing = passing[peaks]
        places = Places(
            key=key[passing],
            token=postings.token[passing].astype(np.int64) + first,
            document=postings.document[passing],
            value=postings.value[passing],
        )
        self._pending.append((postings.feature[passing], places))
        # A merge sorts all that is kept: 2.4 s at 32,768 latents. So it waits until the pending
        # places are half as many as the kept ones.
        pending = sum(len(feature) for feature, _ in self._pending)
        if pending > self._kept.key.size // 2:
            self._merge()

    def settled(self) -> Places:
        """(F, K) each; the key is 0 where a latent has fewer than K places."""
        self._merge()
        return self._kept

    def _merge(self) -> None:
        features, count = self._kept.key.shape
        # Join kept and pending places.
        there = self._kept.key > 0
        kept_feature = np.repeat(np.arange(features, dtype=np.uint32), there.sum(1))
        kept = Places._make(column[there] for column in self._kept)
        groups = [(kept_feature, kept), *self._pending]
        self._pending = []
        feature = np.concatenate([group for group, _ in groups]).astype(np.uint64)
        columns = zip(*(places for _, places in groups), strict=True)
        every = Places._make(np.concatenate(column) for column in columns)
        # Order them by latent, then descending key, then token.
        best = _ordered(feature << np.uint64(32) | ~every.key, every.token)
        if self._distinct:
            owner = (feature << np.uint64(32) | every.document)[best]
            _, first_of_document = np.unique(owner, return_index=True)
            best = best[np.sort(first_of_document)]
        # Keep the first K of each latent.
        rank = rank_within(feature[best])
        inside = rank < count
        best = best[inside]
        cell = (feature[best].astype(np.int64), rank[inside])
        self._kept.key[:] = 0
        for name in Places._fields:
            getattr(self._kept, name)[cell] = getattr(every, name)[best]


def _ordered(major: NDArray[np.uint64], minor: NDArray[np.int64]) -> NDArray[np.int64]:
    """`np.lexsort((minor, major))`, three times as fast where ties are few."""
    order = np.argsort(major)
    ranked = major[order]
    same = ranked[1:] == ranked[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
    order[tied] = order[tied][np.lexsort((minor[order[tied]], ranked[tied]))]
    return order


def rank_within(group: NDArray[np.generic]) -> NDArray[np.int64]:
    """(n,) how many members of its group stand before each; a group's members lie together."""
    begins = np.ones(len(group), np.bool_)
    begins[1:] = group[1:] != group[:-1]
    index = np.arange(len(group))
    first: NDArray[np.int64] = np.maximum.accumulate(np.where(begins, index, 0))
    return index - first


def _peaks(
    feature: NDArray[np.uint32], document: NDArray[np.uint32], key: Key
) -> NDArray[np.int64]:
    """The first largest key of each run of the same latent and document."""
    if not len(key):
        return np.empty(0, np.int64)
    begins = np.ones(len(key), np.bool_)
    begins[1:] = (feature[1:] != feature[:-1]) | (document[1:] != document[:-1])
    run = np.cumsum(begins) - 1
    largest = np.maximum.reduceat(key, np.flatnonzero(begins))
    equal = np.flatnonzero(key == largest[run])
    first: NDArray[np.int64] = equal[rank_within(run[equal]) == 0]
    return first


class State:
    """Counts, moments, histogram, strongest places and a sample of every latent."""

    def __init__(self, features: int, scale: float, *, top: int, sample: int) -> None:
        """Start empty.

        Args:
            scale: typical size of an activation; the histogram's bins lie about it.
            top: strongest places of a latent, one per document.
            sample: random places of a latent.
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

    def update(self, unit: int, unit_tokens: int, postings: Postings, rows: int) -> None:
        """Add one unit.

        Args:
            unit_tokens: tokens of a whole unit.
            rows: number of rows that were encoded.
        """
        features = len(self.count)
        first = unit * unit_tokens
        # Counts and moments.
        value = postings.value.astype(np.float64)
        self.rows += rows
        self.count += np.bincount(postings.feature, minlength=features)
        self.sum += np.bincount(postings.feature, value, minlength=features)
        self.squares += np.bincount(postings.feature, value * value, minlength=features)
        np.maximum.at(self.largest, postings.feature, postings.value)
        # Histogram: a bin is the leading bits of the float. Bits of positive floats have the order
        # of their values.
        bits = postings.value.view(np.uint32)
        cell = np.clip((bits >> _MANTISSA).astype(np.int64) - self._left, 0, BINS - 1)
        cell += postings.feature.astype(np.int64) * BINS
        self.histogram += np.bincount(cell, minlength=features * BINS).reshape(features, BINS)
        # Strongest and random places.
        self.top.update(bits, first, postings)
        chance = _random(unit_tokens, unit)[postings.token] ^ self._salt[postings.feature]
        self.sample.update(np.maximum(chance, 1), first, postings)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(F,) mean of the activations where a latent fires; NaN if it never does."""
        return self._where_it_fires(self.sum)

    @property
    def deviation(self) -> NDArray[np.float64]:
        """(F,) standard deviation of the same activations, of the population."""
        variance = self._where_it_fires(self.squares) - self.mean**2
        return np.sqrt(np.where(variance < 0, 0, variance))

    def _where_it_fires(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = np.full(len(total), np.nan)
        np.divide(total, self.count, out=mean, where=self.count > 0)
        return mean

    @property
    def edges(self) -> NDArray[np.float32]:
        """(BINS + 1,) edges of the bins. The end bins also count what lies beyond them."""
        number = (np.arange(BINS + 1) + self._left).astype(np.uint32)
        return (number << np.uint32(_MANTISSA)).view(np.float32)


def _left(scale: float) -> int:
    """The first bin's number: a float32's exponent and the first two bits of its fraction.

    Four bins make an octave.
    """
    power = np.float32(2.0 ** np.floor(np.log2(scale)))
    return int(power.view(np.uint32) >> _MANTISSA) - _OCTAVES_BELOW * _PER_OCTAVE


def _random(n: int, stream: int) -> Key:
    return (order.keys(n, SEED, 0xCA7A, stream) >> np.uint64(32)).astype(np.uint32)
