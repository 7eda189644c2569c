"""Activations that are bursts within documents, with pairs that are planted or with none."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


class Firing(NamedTuple):
    """Two dictionaries on the same rows."""

    ours: Any  # csr_array (n, F)
    theirs: Any  # csr_array (n, G)
    document: NDArray[np.int64]  # (n,)


def documents(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(n,) documents of 20 to 120 rows."""
    return np.repeat(np.arange(count), rng.integers(20, 121, count))


def bursts(
    document: NDArray[np.int64], latents: int, topics: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float32]:
    """(n, latents) activations that come in bursts of some 3 rows.

    Args:
        topics: (documents, latents) how much more often each fires in each document.
    """
    n = len(document)
    starts = rng.random((n, latents)) < 0.02 * topics[document]
    length = rng.geometric(1 / 3, (n, latents))
    fires = np.zeros((n, latents), bool)
    left = np.zeros(latents, np.int64)
    for row in range(n):
        if row and document[row] != document[row - 1]:
            left[:] = 0
        left = np.where(starts[row], np.maximum(length[row], left), left)
        fires[row] = left > 0
        left -= left > 0
    return (fires * (0.5 + rng.random((n, latents)))).astype(np.float32)


def unrelated(seed: int, latents: int = 20, count: int = 60) -> Firing:
    """Two dictionaries whose latents share documents and nothing else.

    Each pair of latents prefers the same documents, so that it coincides more often than over the
    whole text; within a document neither knows where the other fires.
    """
    rng = np.random.default_rng(seed)
    document = documents(count, rng)
    topics = rng.lognormal(0, 1, (count, latents))
    ours = bursts(document, latents, topics, rng)
    theirs = bursts(document, latents, topics, rng)
    return Firing(sparse.csr_array(ours), sparse.csr_array(theirs), document)


def planted(seed: int, latents: int = 40, count: int = 120) -> Firing:
    """A second dictionary of which latent j is a function of latent j of the first.

    In turn: a multiple, a threshold, a saturation, and a noisy multiple that also fires elsewhere.
    The second half of its latents are functions of nothing.
    """
    rng = np.random.default_rng(seed)
    document = documents(count, rng)
    topics = rng.lognormal(0, 0.5, (count, latents))
    ours = bursts(document, latents, topics, rng)
    own = bursts(document, latents, topics, rng)
    theirs = own.copy()
    for latent in range(latents // 2):
        a = ours[:, latent]
        noisy = a * rng.uniform(0.3, 1.7, len(a)) * (rng.random(len(a)) < 0.7)
        kinds = (2 * a, np.maximum(a - 1, 0), np.minimum(a, 0.7), noisy + own[:, latent])
        theirs[:, latent] = kinds[latent % 4]
    return Firing(sparse.csr_array(ours), sparse.csr_array(theirs), document)
