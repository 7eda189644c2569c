"""Activations of several dictionaries on the same rows, as sparse matrices, and the halves of them.

Shapes: n rows, F latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from analyze.encoding import Unit, positive, taken
from analyze.subject import Subject
from data.errors import StoreError
from train.kernels import Kept

Codes = Any  # scipy.sparse.csr_array, (n, F) float32: activations, 0 where a latent is silent
Ints = NDArray[np.int64]


def shared_rows(
    ours: Subject, our_unit: Unit, theirs: Subject, their_unit: Unit
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of both runs of a unit that belong to the same tokens, in text order."""
    assert our_unit.number == their_unit.number
    our_rows = ours.text_rows(our_unit)
    their_rows = theirs.text_rows(their_unit)
    _, first, second = np.intersect1d(
        our_unit.local[our_rows],
        their_unit.local[their_rows],
        assume_unique=True,
        return_indices=True,
    )
    return our_rows[first], their_rows[second]


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
            "give more study.rows="
        )
    chosen = np.random.default_rng(seed).permutation(len(numbers)) < len(numbers) // 2
    return chosen[which]
