"""What kind of row each residual is, decided once when it is written, so that statistics and
reading agree exactly.

Every stored row is exactly one of: BOS, the first token of a document's piece, whose residual says
nothing about text; OUTLIER, another row that is longer than ten median norms of its unit (attention
sinks reach 100 times: a few of them cost 3 % of variance explained and a quarter of the latents);
ORDINARY; NON_FINITE, never served: its norm is no float32 number, because it holds NaN or infinity
or is longer than 3.4e38.

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
# MB. An accelerator is kept busy by 34 MB, and whatever the width the unit (335 MB at 2560) never
# exists in float64.
_CPU_BLOCK, _DEVICE_BLOCK = 128 * 2560, 1 << 22


class RowStatistics(NamedTuple):
    """What is known of the rows of one unit, in the order in which they are stored."""

    norms: NDArray[np.float32]  # (n,) Euclidean, summed in float64
    kinds: NDArray[np.int8]  # (n,)
    moments: NDArray[
        np.float64
    ]  # (3, 2, d) [BOS, OUTLIER, ORDINARY] x [mean, sum of squared deviations]
    counts: NDArray[np.int64]  # (3,) rows of each of those kinds
    norm_sums: NDArray[np.float64]  # (3,) sum of `norms` over each of those kinds
    per_chunk: NDArray[np.int64]  # (chunks, 4) rows of each kind in every inner chunk


def describe(rows: torch.Tensor, bos: torch.Tensor, chunk: int) -> RowStatistics:
    """Norms, kinds and moments of one whole unit, computed on the device that holds it.

    Args:
        rows: (n, d) bfloat16 in stored order, n > 0.
        bos: (n,) bool, whether a row's token is a BOS.
        chunk: rows per inner chunk.
    """
    n = len(rows)
    assert (
        n > 0
        and rows.ndim == 2
        and rows.dtype == torch.bfloat16
        and bos.shape == (n,)
        and bos.dtype == torch.bool
    )
    device_norms = _norms(rows)
    # Waits for the device (0.3 MB): kinds are decided by the same function and on the same numbers
    # as when reading, and with them on the host no later step has to ask the device for a size.
    norms = device_norms.cpu().numpy()
    kinds = kinds_of(norms, bos.cpu().numpy())
    members = [np.flatnonzero(kinds == kind) for kind in SERVED]
    moments = torch.stack(
        [_moments(rows, torch.from_numpy(member).to(rows.device)) for member in members]
    )
    cell = np.arange(n) // chunk * 4 + kinds
    return RowStatistics(
        norms=norms,
        kinds=kinds,
        moments=moments.cpu().numpy(),  # waits for the device: the last step
        counts=np.array([len(member) for member in members]),
        norm_sums=np.array([norms[member].sum(dtype=np.float64) for member in members]),
        per_chunk=np.bincount(cell, minlength=-(-n // chunk) * 4).reshape(-1, 4),
    )


def _scratch(rows: torch.Tensor) -> torch.Tensor:
    """(b, d) float64: one block's rows. Made once: a fresh one per block costs its page faults over
    and over.
    """
    elements = _CPU_BLOCK if rows.device.type == "cpu" else _DEVICE_BLOCK
    return rows.new_empty(max(1, elements // rows.shape[1]), rows.shape[1], dtype=torch.float64)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """(n,) float32 norms of (n, d) bfloat16 rows; float64 holds any square of a bfloat16."""
    norms, scratch = rows.new_empty(len(rows), dtype=torch.float64), _scratch(rows)
    for part, out in zip(
        torch.split(rows, len(scratch)), torch.split(norms, len(scratch)), strict=True
    ):
        torch.linalg.vector_norm(scratch[: len(part)].copy_(part), dim=1, out=out)
    return norms.float()


def _moments(rows: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """(2, d) float64 [mean, sum of squared deviations] of the rows whose numbers are in `member`.

    Sums are of deviations from a pilot, the mean of the kind's first block: exact to float64
    rounding where a channel's mean is 400 times its deviation, and where a kind's rows are all but
    equal (sinks are). Rows of other kinds are never touched: NaN times a weight of zero would still
    be NaN.
    """
    scratch = _scratch(rows)
    taken = torch.empty_like(scratch, dtype=rows.dtype)
    sums, squares, pilot = scratch.new_zeros(3, rows.shape[1])
    ones = scratch.new_ones(len(scratch))
    for number, part in enumerate(torch.split(member, len(scratch)) if len(member) else ()):
        bits = torch.index_select(rows, 0, part, out=taken[: len(part)])
        x = scratch[: len(part)].copy_(bits)
        if number == 0:
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
