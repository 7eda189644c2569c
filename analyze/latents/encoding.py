"""Rows of a unit, and what fires in them.

Shapes: n rows of a unit, d the width that is read, d_out the width that is written, p pairs of a
row and a latent that is above 0 in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze.parts import NOWHERE, Arrays, Parts
from residual_saes.data.journal import note
from residual_saes.train.kernels import Kept
from residual_saes.train.sae import SAE

_BATCH_ROWS = 4096  # rows encoded at a time


class Unit(NamedTuple):
    """All finite rows of one unit, BOS and outliers too, in stored order."""

    number: int
    rows: Tensor  # (n, d) float32, raw: what is read
    targets: Tensor  # (n, d_out) float32, raw: what is written; of an SAE `rows`
    local: NDArray[np.int64]  # (n,) the row's token, as flat position in the unit's spine
    document: NDArray[np.uint32]  # (n,)
    position: NDArray[np.int64]  # (n,) tokens since the BOS of the document's piece, which is 0
    norm: NDArray[np.float32]  # (n,) of what is written; of a crosscoder scaled
    kind: NDArray[np.uint8]  # (n,) as the run's `Policy.kinds_of` has it

    def of_kinds(self, kinds: Sequence[int]) -> NDArray[np.bool_]:
        """(n,) which rows are of one of `kinds`."""
        return np.isin(self.kind, kinds)

    def text_order(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The rows that `mask` (n,) chooses, in the order of the text; stored order is shuffled."""
        chosen = np.flatnonzero(mask)
        return chosen[np.argsort(self.local[chosen])]


class Pairs(NamedTuple):
    """Latents above 0, row by row; (p,) tensors on the SAE's device."""

    latent: Tensor  # int64
    row: Tensor  # int64, number of the row among those that were encoded
    value: Tensor  # float32, > 0


class Firings(NamedTuple):
    """Where latents fire in one unit; pairs are in the order of the text."""

    unit: Unit
    rows: NDArray[np.int64]  # the unit's rows that were encoded, in the order of the text
    latent: NDArray[np.int64]  # (p,)
    row: NDArray[np.int64]  # (p,) number of the row in the unit
    value: NDArray[np.float32]  # (p,) activation, > 0


def positive(kept: Kept) -> Pairs:
    """The kept latents that are above 0. TopK keeps k a row, some of them with the value 0."""
    fires = (kept.values > 0).nonzero().view(-1)  # device sync: how many fire
    return Pairs(kept.indices[fires], kept.rows[fires], kept.values[fires])


def encode(sae: SAE, unit: Unit, parts: Parts = NOWHERE) -> Kept:
    """The kept latents of all of a unit's rows.

    Args:
        parts: where they lie or are to lie.
    """
    if parts is NOWHERE:
        return _encoded(sae, unit)

    def make() -> Arrays:
        kept = _encoded(sae, unit)
        latents = kept.indices.to(torch.int32).cpu().numpy()
        return {
            "values": kept.values.cpu().numpy(),
            "latents": latents.astype(np.uint16) if sae.d_sae <= 2**16 else latents,
            "starts": kept.starts.cpu().numpy(),
        }

    part = parts.of(unit.number, make)
    device = unit.rows.device
    starts = torch.from_numpy(part["starts"]).to(device)
    values = torch.from_numpy(part["values"]).to(device)
    latents = torch.from_numpy(part["latents"].astype(np.int64)).to(device)
    return Kept(values, latents, _owners(starts, len(values)), starts)


def _owners(starts: Tensor, pairs: int) -> Tensor:
    """(p,) the bag of each of `pairs` pairs, given where each bag begins."""
    counts = torch.diff(starts, append=starts.new_full((1,), pairs))
    return torch.repeat_interleave(counts)


@torch.inference_mode()
def _encoded(sae: SAE, unit: Unit) -> Kept:
    total = len(unit.rows)
    columns: list[Kept] = []
    pairs = 0
    for start in range(0, total, _BATCH_ROWS):
        note(f"unit {unit.number}: {start:,} of {total:,} rows encoded")
        kept = sae.encode(unit.rows[start : start + _BATCH_ROWS])
        columns.append(kept._replace(rows=kept.rows + start, starts=kept.starts + pairs))
        pairs += len(kept.values)
    if not columns:
        nothing = torch.empty(0, dtype=torch.int64, device=unit.rows.device)
        return Kept(nothing.float(), nothing, nothing, nothing)
    return Kept._make(torch.cat(column) for column in zip(*columns, strict=True))


def taken(kept: Kept, rows: Tensor) -> Kept:
    """The latents of some rows (m,), in that order; `Kept.rows` then counts from 0 in `rows`."""
    ends = torch.cat([kept.starts[1:], kept.starts.new_full((1,), len(kept.values))])
    counts = ends[rows] - kept.starts[rows]
    starts = counts.cumsum(0) - counts
    owners = torch.repeat_interleave(counts)  # device sync: how many there are
    pair = torch.arange(len(owners), device=owners.device) + (kept.starts[rows] - starts)[owners]
    return Kept(kept.values[pair], kept.indices[pair], owners, starts)
