"""Which latents fire on a token, for every token id that the catalogue has read.

Of each id the latents with the largest mean activation over its occurrences; beside it on which
share of them the latent fires, and which share of all of the latent's activation that is: a latent
that fires everywhere has little of it on any one token.

Shapes: V token ids, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from analyze.pages.browser.script import short
from analyze.studies.catalogue.index import Index
from data.errors import StopRequest
from data.store.store import Store

TOP = 20  # latents of a token
SHARD = 256  # tokens of a file


class Tallies(NamedTuple):
    """Sums over the tokens of some units."""

    occurrences: NDArray[np.int64]  # (V,) of each id, BOS left out
    fired: Any  # scipy.sparse.csr_array (V, F): times
    activation: Any  # scipy.sparse.csr_array (V, F): sum


def tally(store: Store, index: Index, stop: StopRequest) -> Tallies:
    """Everything that the index says of tokens."""
    size = 1 + max(int(store.tokens(unit).max()) for unit in index.units)
    shape = size, index.d_sae
    occurrences = np.zeros(size, np.int64)
    fired, activation = (
        sparse.csr_array(shape, dtype=np.int64),
        sparse.csr_array(shape, dtype=np.float64),
    )
    for unit in index.units:
        stop.check()
        ids, found = store.tokens(unit).ravel(), index.all_of(unit)
        occurrences += np.bincount(ids[~store.piece_starts(unit).ravel()], minlength=size)
        where = ids[found.token].astype(np.int64), found.feature.astype(np.int64)
        fired += sparse.csr_array((np.ones(len(found.value), np.int64), where), shape=shape)
        activation += sparse.csr_array((found.value.astype(np.float64), where), shape=shape)
    return Tallies(occurrences, fired, activation)


def ranked(occurrences: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids that occur, the most frequent first."""
    there = np.flatnonzero(occurrences)
    return there[np.argsort(-occurrences[there], kind="stable")]


def shards(tallies: Tallies, ids: NDArray[np.int64]) -> Iterator[list[list[float | None]]]:
    """Files of SHARD tokens in the order of `ids`: of each latent, mean, share of occurrences,
    share of the latent.
    """
    whole = np.asarray(tallies.activation.sum(0)).ravel()
    for first in range(0, len(ids), SHARD):
        yield [_top(tallies, whole, token) for token in ids[first : first + SHARD].tolist()]


def _top(tallies: Tallies, whole: NDArray[np.float64], token: int) -> list[float | None]:
    """Flat: four numbers a latent."""
    span = slice(*tallies.activation.indptr[token : token + 2])
    latents, sums = tallies.activation.indices[span], tallies.activation.data[span]
    best = np.argsort(-sums, kind="stable")[:TOP]
    times = tallies.fired.data[span][best]
    chosen, total, occurrences = latents[best], sums[best], tallies.occurrences[token]
    return short(
        np.stack(
            [chosen, total / occurrences, times / occurrences, total / whole[chosen]], 1
        ).ravel()
    )
