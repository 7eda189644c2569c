"""One unit's residuals made ready to be committed: permuted, described, copied to the host.

All of it runs where the rows are: in a thread of its own and, on a GPU, on that thread's stream,
beside the model's next forward pass.

Shapes: n rows of the unit, d d_model, C inner chunks per unit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data.store.kinds import NON_FINITE, ORDINARY, RowStatistics, describe
from residual_saes.data.store.shard import UnitArray


class Prepared(NamedTuple):
    """What is written of one unit and point."""

    bits: NDArray[np.uint16]  # (n, d) bfloat16 bits in stored order, as the model gave them
    stored: NDArray[np.uint16]  # (n, d) as they will be read: `bits` itself, if lossless
    statistics: RowStatistics  # of `stored`
    lost: float  # squared differences between `bits` and `stored`, summed over ORDINARY rows

    @property
    def non_finite(self) -> NDArray[np.int64]:
        """Stored rows with NaN or infinity."""
        return np.flatnonzero(self.statistics.kinds == NON_FINITE)

    def entry(self, chunks: int) -> dict[str, Any]:
        """What the commit record says of this unit and point; `chunks` is C."""
        counts = np.zeros((chunks, 3), np.int64)
        counts[: len(self.statistics.per_chunk)] = self.statistics.per_chunk[:, :3]
        entry = {"chunks": counts.ravel().tolist(), "norm_sums": self.statistics.norm_sums.tolist()}
        if self.stored is not self.bits:
            entry["lost"] = self.lost
        return entry


def prepare(
    rows: torch.Tensor, permutation: NDArray[np.int64], starts: NDArray[np.bool_], array: UnitArray
) -> Prepared:
    """Make one unit of `array` ready.

    Args:
        rows: (n, d) bfloat16 in the order of the spine, on any device.
        permutation: (n,) the token of each stored row.
        starts: (n,) which tokens of the spine are BOS.
    """
    assert array.chunk is not None
    ordered = rows[torch.from_numpy(permutation).to(rows.device)]
    bos = torch.from_numpy(starts[permutation]).to(rows.device)
    bits = to_host(ordered)
    stored = array.stored(bits)
    if stored is not bits:  # the statistics are of what readers will get
        ordered = torch.from_numpy(stored).view(torch.bfloat16)
        bos = bos.cpu()
    statistics = describe(ordered, bos, array.chunk)
    errors = array.codec.error(bits, stored)
    return Prepared(bits, stored, statistics, float(errors[statistics.kinds == ORDINARY].sum()))


def to_host(rows: torch.Tensor) -> NDArray[np.uint16]:
    """(n, d) bits of a bfloat16 tensor, in host memory."""
    if rows.is_cuda:
        # Pinned memory takes the copy at the bus's full speed; torch caches such blocks.
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        # Waits for this thread's stream alone: the forward pass goes on in its own.
        torch.cuda.current_stream(rows.device).synchronize()
        rows = host
    return rows.view(torch.uint16).numpy()
