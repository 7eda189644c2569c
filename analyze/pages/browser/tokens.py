"""Which latents fire on a token, for every token id that the catalogue has read.

Of each id the latents with the largest mean activation over its occurrences. Beside the mean stand
the share of the occurrences on which the latent fires, and the share of all of the latent's
activation that is on this id. A latent that fires everywhere has little of it on any id.

Shapes: V token ids, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.pages.script import short
from residual_saes.analyze.studies.catalogue.index import Index
from residual_saes.data.errors import StopRequest
from residual_saes.data.store.store import Store

TOP = 20  # latents of a token
TOKENS = 10  # of a latent
SHARD = 256  # tokens of a file


class Tallies(NamedTuple):
    """Sums over the tokens of some units."""

    occurrences: NDArray[np.int64]  # (V,) of each id, BOS left out
    fired: Any  # scipy.sparse.csr_array (V, F): times
    activation: Any  # scipy.sparse.csr_array (V, F): sum


def tally(store: Store, index: Index, stop: StopRequest) -> Tallies:
    """Sums over all units of the index."""
    size = 1 + max(int(store.tokens(unit).max()) for unit in index.units)
    shape = (size, index.d_sae)
    occurrences = np.zeros(size, np.int64)
    fired = sparse.csr_array(shape, dtype=np.int64)
    activation = sparse.csr_array(shape, dtype=np.float64)
    for unit in index.units:
        stop.check()
        ids = store.tokens(unit).ravel()
        postings = index.all_of(unit)
        occurrences += np.bincount(ids[~store.piece_starts(unit).ravel()], minlength=size)
        places = ids[postings.token].astype(np.int64), postings.feature.astype(np.int64)
        ones = np.ones(len(postings.value), np.int64)
        fired += sparse.csr_array((ones, places), shape=shape)
        activation += sparse.csr_array((postings.value.astype(np.float64), places), shape=shape)
    return Tallies(occurrences, fired, activation)


def ranked(occurrences: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids that occur, the most frequent first."""
    ids = np.flatnonzero(occurrences)
    return ids[np.argsort(-occurrences[ids], kind="stable")]


def of_latents(tallies: Tallies) -> list[list[tuple[int, float]]]:
    """Of each latent up to TOKENS ids with most of its activation, each with the share of it."""
    by_latent = sparse.csc_array(tallies.activation)
    found = []
    for latent in range(by_latent.shape[1]):
        span = slice(*by_latent.indptr[latent : latent + 2])
        sums = by_latent.data[span]
        best = np.lexsort((by_latent.indices[span], -sums))[:TOKENS]
        shares = (sums[best] / sums.sum()).tolist()
        found.append(list(zip(by_latent.indices[span][best].tolist(), shares, strict=True)))
    return found


def shards(tallies: Tallies, ids: NDArray[np.int64]) -> Iterator[list[list[float | None]]]:
    """Files of SHARD tokens in the order of `ids`; of each token what `_top` gives."""
    of_latents = np.asarray(tallies.activation.sum(0)).ravel()
    for first in range(0, len(ids), SHARD):
        tokens = ids[first : first + SHARD].tolist()
        yield [_top(tallies, of_latents, token) for token in tokens]


def _top(tallies: Tallies, of_latents: NDArray[np.float64], token: int) -> list[float | None]:
    """A token's TOP latents, four numbers each in one flat list.

    They are the latent, its mean activation, its share of the occurrences, the share of the latent.

    Args:
        of_latents: (F,) each latent's activation over all tokens.
    """
    span = slice(*tallies.activation.indptr[token : token + 2])
    latents = tallies.activation.indices[span]
    sums = tallies.activation.data[span]
    best = np.argsort(-sums, kind="stable")[:TOP]
    chosen = latents[best]
    total = sums[best]
    times = tallies.fired.data[span][best]
    occurrences = tallies.occurrences[token]
    shares = total / of_latents[chosen]
    numbers = np.stack([chosen, total / occurrences, times / occurrences, shares], axis=1)
    return short(numbers.ravel())
