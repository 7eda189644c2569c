"""The kind of each row, and the statistics of a unit's rows by kind.

Kinds are decided once, when a unit is written, so that statistics and reading agree exactly. Every
stored row is exactly one of:

    BOS          the first token of a document's piece; its residual says nothing about text
    OUTLIER      another row that is longer than ten median norms of its unit. Attention sinks reach
                 100 median norms: a few cost 3 % of variance explained and a quarter of the latents
    ORDINARY     any other row
    NON_FINITE   never served: its norm is no float32 number, because the row holds NaN or infinity
                 or is longer than 3.4e38

Shapes: n rows of one unit, d d_model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

BOS, OUTLIER, ORDINARY, NON_FINITE = range(4)
SERVED = (BOS, OUTLIER, ORDINARY)  # the kinds that have moments
OUTLIER_NORM = 10.0  # median norms of the unit's finite rows
# Elements held as float64 at a time. On a CPU 2.6 MB, which stay in cache: twice the speed of 21
# MB. 34 MB keep an accelerator busy. Whatever the width, the unit (335 MB at 2560) never exists in
# float64.
_CPU_BLOCK = 128 * 2560
_DEVICE_BLOCK = 1 << 22


class RowStatistics(NamedTuple):
    """Statistics of the rows of one unit, in stored order."""

    norms: NDArray[np.float32]  # (n,) Euclidean, summed in float64
    kinds: NDArray[np.int8]  # (n,)
    # (3, 2, d) [BOS, OUTLIER, ORDINARY] x [mean, sum of squared deviations]
    moments: NDArray[np.float64]
    counts: NDArray[np.int64]  # (3,) rows of each of those kinds
    norm_sums: NDArray[np.float64]  # (3,) sum of `norms` over each of those kinds
    per_chunk: NDArray[np.int64]  # (chunks, 4) rows of each kind in every inner chunk


def describe(
    rows: torch.Tensor, bos: torch.Tensor, chunk: int, block: int | None = None
) -> RowStatistics:
    """Norms, kinds and moments of one whole unit, computed on the device that holds it.

    Args:
        rows: (n, d) bfloat16 in stored order, n > 0.
        bos: (n,) bool, whether a row's token is a BOS.
        chunk: rows per inner chunk.
        block: elements held as float64 at a time; None: what the device is fastest with.
    """
    n = len(rows)
    assert n > 0 and rows.ndim == 2 and rows.dtype == torch.bfloat16
    assert bos.shape == (n,) and bos.dtype == torch.bool
    scratch = _scratch(rows, block)
    # Device sync (0.3 MB). Kinds are decided on the host, by the same function and the same numbers
    # as when reading; so no later step has to ask the device for a size.
    norms = _norms(rows, scratch).cpu().numpy()
    kinds = kinds_of(norms, bos.cpu().numpy())
    members = [np.flatnonzero(kinds == kind) for kind in SERVED]
    moments = torch.stack([_moments(rows, member, scratch) for member in members])
    cell = np.arange(n) // chunk * 4 + kinds
    return RowStatistics(
        norms=norms,
        kinds=kinds,
        moments=moments.cpu().numpy(),  # device sync, the last step
        counts=np.array([len(member) for member in members]),
        norm_sums=np.array([norms[member].sum(dtype=np.float64) for member in members]),
        per_chunk=np.bincount(cell, minlength=-(-n // chunk) * 4).reshape(-1, 4),
    )


def _scratch(rows: torch.Tensor, block: int | None) -> torch.Tensor:
    """(b, d) float64 for one block's rows. Made once: a fresh one per block costs page faults."""
    elements = block or (_CPU_BLOCK if rows.device.type == "cpu" else _DEVICE_BLOCK)
    return rows.new_empty(max(1, elements // rows.shape[1]), rows.shape[1], dtype=torch.float64)


def _norms(rows: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """(n,) float32 norms of (n, d) bfloat16 rows; float64 holds any square of a bfloat16."""
    norms = rows.new_empty(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), len(scratch)):
        part = rows[start : start + len(scratch)]
        out = norms[start : start + len(scratch)]
        torch.linalg.vector_norm(scratch[: len(part)].copy_(part), dim=1, out=out)
    return norms.float()


def _moments(rows: torch.Tensor, member: NDArray[np.int64], scratch: torch.Tensor) -> torch.Tensor:
    """(2, d) float64 [mean, sum of squared deviations] of the rows whose numbers are in `member`.

    Sums are of deviations from a pilot, the mean of the kind's first block. That is exact to
    float64 rounding where a channel's mean is 400 times its deviation, and where a kind's rows are
    all but equal, as sinks are. Rows of other kinds are never touched: NaN times a weight of zero
    would still be NaN.
    """
    numbers = torch.from_numpy(member).to(rows.device)
    taken = torch.empty_like(scratch, dtype=rows.dtype)
    sums, squares, pilot = scratch.new_zeros(3, rows.shape[1])
    ones = scratch.new_ones(len(scratch))
    for start in range(0, len(member), len(scratch)):
        part = numbers[start : start + len(scratch)]
        bits = torch.index_select(rows, 0, part, out=taken[: len(part)])
        x = scratch[: len(part)].copy_(bits)
        if start == 0:
            pilot = x.sum(0) / len(part)  # not mean(), which on CUDA is not exact for equal rows
        sums += ones[: len(part)] @ x.sub_(pilot)
        squares += ones[: len(part)] @ x.square_()
    shift = sums / max(len(member), 1)
    return torch.stack([pilot + shift, squares - sums * shift])


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
