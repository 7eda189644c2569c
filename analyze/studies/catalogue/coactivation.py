"""Latents that fire on the same tokens more often than chance: phi of each pair, by the index.

Of n rows two latents fire on n_a and n_b, on n_ab together; by chance they would on n_a * n_b / n.

    phi = (n * n_ab - n_a * n_b) / sqrt(n_a * (n - n_a) * n_b * (n - n_b))

is the correlation of firing with firing: 1 of latents that always fire together, about 0 of chance,
so a latent that fires everywhere wins nothing. Activations have no part in it. Pairs that fire
together on fewer than LEAST rows are left out: of rare latents chance would make large phi.

Shapes: F latents, n rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.studies.catalogue.index import Index
from residual_saes.analyze.studies.catalogue.state import rank_within
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress

TOP = 10  # of a latent, as many as nearest directions
LEAST = 10  # rows on which a pair fires together
_BLOCK = 64  # latents whose pairs are held at a time: 0.2 GB at 32,768, did all fire together


class Together(NamedTuple):
    """A latent that fires where another one does."""

    feature: int
    phi: float
    rows: int  # on which both fire
    expected: float  # by chance


def partners(index: Index, rows: int, stop: StopRequest) -> list[list[Together]]:
    """(F,) of each latent the others with the largest phi above 0, TOP at most.

    Args:
        rows: tokens to count on at most, in whole units.
    """
    units = index.first(rows)
    parts = []
    for unit in units:
        stop.check()
        parts.append(index.activations(unit).astype(np.bool_))
    fires = sparse.hstack(parts, format="csr").astype(np.int32)
    turned = sparse.csr_array(fires.T)
    n = sum(map(index.rows, units))
    progress = Progress()
    found: list[list[Together]] = []
    for first in range(0, index.d_sae, _BLOCK):
        stop.check()
        both = fires[first : first + _BLOCK] @ turned
        found += _largest(both, first, np.diff(fires.indptr).astype(np.float64), n)
        progress.show(f"latents that fire together: {len(found):,} of {index.d_sae:,}")
    progress.close()
    return found


def _largest(both: Any, first: int, count: NDArray[np.float64], n: int) -> list[list[Together]]:
    """The best of a block's rows (latents from `first` on); `both` (block, F) counts pairs."""
    row = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
    often = (both.data >= LEAST) & (both.indices != row + first)
    row, other, together = row[often], both.indices[often], both.data[often]
    product = count[row + first] * count[other]
    room = (n - count[row + first]) * (n - count[other])
    with np.errstate(divide="ignore", invalid="ignore"):  # one that fires on all rows
        phi = (n * together.astype(np.float64) - product) / np.sqrt(product * room)
    order = np.lexsort((other, -phi, row))
    order = order[phi[order] > 0]
    order = order[rank_within(row[order]) < TOP]
    found: list[list[Together]] = [[] for _ in range(both.shape[0])]
    for at in order.tolist():
        numbers = int(together[at]), float(product[at] / n)
        found[row[at]].append(Together(int(other[at]), float(phi[at]), *numbers))
    return found
