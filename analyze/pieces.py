"""The held-out text as the language model read it: pieces of documents, each with its own BOS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.subject import Subject
from residual_saes.data.rows.split import held_out_units


class Piece(NamedTuple):
    """A document's part of one packed row. The model sees nothing of the row's other pieces."""

    ids: list[int]  # token ids, BOS first
    document: int
    kind: NDArray[np.uint8]  # (t,) kinds of the SAE's rows, by `Subject.kinds_of`


def held_out(subject: Subject) -> Iterator[Piece]:
    """Every piece of the held-out units, unit by unit, in the order of the text."""
    for unit in held_out_units(subject.store):
        tokens = subject.store.tokens(unit).ravel()
        document = subject.store.document(unit).ravel()
        kind = np.empty(len(tokens), np.uint8)
        kind[subject.store.permutation(unit)] = subject.kinds_of(unit)
        starts = np.flatnonzero(subject.store.piece_starts(unit))
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            yield Piece(tokens[start:end].tolist(), int(document[start]), kind[start:end])
