"""Which latents of other runs on the same store fire on the same tokens.

Other runs are other arms of a sweep, or of another layer. The cosine of two latents' activations
over the tokens that both catalogues have read,

    sum a_i b_j / (|a_i| |b_j|)

is 0 if they never fire together and 1 if they are the same up to a factor. It is a maximum over all
of the other's latents, so small values are chance; `study=stability` is the measure with nulls.

Shapes: n tokens, F and G latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.studies.catalogue.index import Index
from residual_saes.analyze.studies.catalogue.study import Files
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import StopRequest, StoreError

TOP = 5  # partners of a latent
_BLOCK = 256  # latents whose cosines are held at a time: 67 MB at 32,768, were none of them 0

Partners = list[list[tuple[int, float]]]  # (F,) of each latent up to TOP others with their cosines


@dataclass(frozen=True)
class Other:
    """Another run with its catalogue."""

    subject: Subject
    files: Files


def open_other(subject: Subject, run: str) -> Other:
    """A run on the same store.

    Raises:
        SettingError: it is the run itself.
        StoreError: it is missing, unfinished, of another store, or has no catalogue.
    """
    other = subject.beside(run)
    return Other(other, catalogue.files(other))


def partners(ours: Index, theirs: Index, rows: int, stop: StopRequest) -> Partners:
    """The other run's latents that fire most like each of ours.

    Args:
        rows: tokens to compare on at most, in whole units.

    Raises:
        StoreError: the catalogues have no unit in common.
    """
    both = sorted(set(ours.units) & set(theirs.units))
    if not both:
        raise StoreError(
            f"{ours.folder} and {theirs.folder} have no unit in common; "
            "make both with one study.part="
        )
    units = both[: max(1, -(-rows // ours.unit_tokens))]
    a = _activations(ours, units, stop)
    b = sparse.csr_array(_activations(theirs, units, stop).T)
    strongest: Partners = []
    for first in range(0, a.shape[0], _BLOCK):
        stop.check()
        cosines = a[first : first + _BLOCK] @ b
        for row in range(cosines.shape[0]):
            span = slice(*cosines.indptr[row : row + 2])
            strongest.append(_largest(cosines.indices[span], cosines.data[span]))
    return strongest


def _largest(latents: NDArray[np.int32], cosines: NDArray[Any]) -> list[tuple[int, float]]:
    """The TOP largest cosines, each with its latent; of equals the lower latent comes first."""
    few = np.arange(len(cosines))
    if len(cosines) > TOP:
        few = np.argpartition(-cosines, TOP)[:TOP]
    best = few[np.lexsort((latents[few], -cosines[few]))]
    return list(zip(latents[best].tolist(), cosines[best].tolist(), strict=True))


def _activations(index: Index, units: list[int], stop: StopRequest) -> Any:
    """(F, tokens of the units) activations, each latent's to length 1; zeros stay zeros."""
    parts = []
    for unit in units:
        stop.check()
        parts.append(index.activations(unit))
    rows = sparse.hstack(parts, format="csr")
    norm: NDArray[np.float64] = np.sqrt(np.asarray(rows.multiply(rows).sum(1), np.float64)).ravel()
    return sparse.csr_array(sparse.diags_array(1 / np.where(norm > 0, norm, 1)) @ rows)
