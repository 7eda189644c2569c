"""What kind of row each residual is, decided once when it is written, so that statistics and reading agree exactly.

Every stored row is exactly one of: BOS, the first token of a document's piece, whose residual says nothing about text;
OUTLIER, another row that is longer than ten median norms of its unit (attention sinks reach 100 times: a few of them
cost 3 % of variance explained and a quarter of the latents); ORDINARY; NON_FINITE, with NaN or infinity, never served.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.bfloat16 import to_float32
from data.moments import Moments

BOS, OUTLIER, ORDINARY, NON_FINITE = range(4)
OUTLIER_NORM = 10.0  # median norms of the unit's finite rows
_BLOCK_ROWS = 1024  # rows held as float64 at a time: 21 MB at width 2560


def kinds_of(norms: NDArray[np.float32], bos: NDArray[np.bool_]) -> NDArray[np.int8]:
    """(n,) kind of each row of one whole unit.

    Args:
        norms: (n,) Euclidean norms.
        bos: (n,) whether the row's token is a BOS.
    """
    finite = np.isfinite(norms)
    limit = OUTLIER_NORM * np.median(norms[finite]) if finite.any() else 0.0
    kinds = np.where(norms > limit, OUTLIER, ORDINARY).astype(np.int8)
    kinds[bos] = BOS
    kinds[~finite] = NON_FINITE
    return kinds


def norms_of(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """(n,) Euclidean norms of (n, d) bfloat16 bits, summed in float64."""
    norms = np.empty(len(bits), np.float32)
    for at in range(0, len(bits), _BLOCK_ROWS):
        rows = to_float32(bits[at : at + _BLOCK_ROWS]).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # rows that are not finite have a kind of their own
            norms[at : at + _BLOCK_ROWS] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return norms


def moments_of(bits: NDArray[np.uint16], kinds: NDArray[np.int8]) -> list[Moments]:
    """Moments of the BOS, the OUTLIER and the ORDINARY rows of (n, d) bfloat16 bits."""
    moments = [Moments.empty(bits.shape[1])] * 3
    for at in range(0, len(bits), _BLOCK_ROWS):
        rows, block = to_float32(bits[at : at + _BLOCK_ROWS]), kinds[at : at + _BLOCK_ROWS]
        for kind in (BOS, OUTLIER, ORDINARY):
            if (block == kind).any():
                moments[kind] = moments[kind].merge(Moments.of(rows[block == kind]))
    return moments
