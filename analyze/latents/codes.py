"""Activations of several dictionaries on the same rows, as sparse matrices, and the halves of them.

Shapes: n rows, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.latents.encoding import Unit, positive, taken
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import StopRequest, StoreError
from residual_saes.data.journal import Progress
from residual_saes.train.kernels import Kept

Codes = Any  # scipy.sparse.csr_array, (n, F) float32: activations, 0 where a latent is silent
Ints = NDArray[np.int64]


class Rows(NamedTuple):
    """The rows of a unit that two runs have in common, in the order of the text."""

    ours: Unit
    our_rows: Ints  # (n,)
    theirs: Unit
    their_rows: Ints  # (n,) of the same tokens

    @property
    def document(self) -> Ints:
        """(n,)"""
        return self.ours.document[self.our_rows].astype(np.int64)


def shared_rows(ours: Subject, theirs: Subject, limit: int, stop: StopRequest) -> Iterator[Rows]:
    """The held-out rows that both runs' policies keep, without BOS, unit by unit.

    Raises:
        StoreError: there is none.
    """
    total = 0
    progress = Progress()
    for our_unit, their_unit in zip(ours.rows(limit), theirs.rows(limit), strict=False):
        stop.check()
        assert our_unit.number == their_unit.number
        our_rows, their_rows = ours.text_rows(our_unit), theirs.text_rows(their_unit)
        _, first, second = np.intersect1d(
            our_unit.local[our_rows],
            their_unit.local[their_rows],
            assume_unique=True,
            return_indices=True,
        )
        total += len(first)
        yield Rows(our_unit, our_rows[first], their_unit, their_rows[second])
        progress.show(f"encoded unit {our_unit.number}")
    if not total:
        raise StoreError(f"no held-out row of {ours.store.name} passes both runs' policies")


def codes_of(encoded: Kept, rows: NDArray[np.int64], d_sae: int) -> Codes:
    """(n, F) activations of some of a unit's rows."""
    chosen = taken(encoded, torch.from_numpy(rows).to(encoded.values.device))
    latent, row, value = (column.cpu().numpy() for column in positive(chosen))
    return sparse.csr_array((value, (row, latent)), shape=(len(rows), d_sae))


def choosing_half(document: Ints, seed: int) -> NDArray[np.bool_]:
    """(n,) whether a row's document is in the random half on which partners are chosen."""
    numbers, which = np.unique(document, return_inverse=True)
    if len(numbers) < 2:
        raise StoreError(
            "the rows are of a single document, so no other is left to measure on; "
            "give more study.rows=, or harvest more documents"
        )
    chosen = np.random.default_rng(seed).permutation(len(numbers)) < len(numbers) // 2
    return chosen[which]
