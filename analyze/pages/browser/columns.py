"""Figures of every latent for the list: the catalogue's, and those that other studies left.

Such a study leaves a table with a row per latent and a column `feature`. A latent that is not in it
has no figure. Definitions name the columns, see analyze/study.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analyze import study
from analyze.results import Result
from analyze.subject import Subject


class Column(NamedTuple):
    """A figure of every latent."""

    key: str
    label: str
    about: str  # what it is, in a sentence
    values: NDArray[np.float64]  # (F,); NaN where it is not known


def of_studies(subject: Subject, done: Mapping[str, Result]) -> list[Column]:
    """The columns that the definitions of the studies in `done` name."""
    columns = []
    for path, wanted in _tables(done):
        table = pq.read_table(path, columns=["feature", *(column.name for column in wanted)])
        feature = table.column("feature").to_numpy()
        for column in wanted:
            values = np.full(subject.sae.d_sae, np.nan)
            # Null becomes NaN.
            values[feature] = table.column(column.name).cast(pa.float64()).to_numpy()
            columns.append(Column(column.key, column.label, column.about, values))
    return columns


def files(done: Mapping[str, Result]) -> list[Path]:
    """The tables that `of_studies` reads."""
    return [path for path, _ in _tables(done)]


def _tables(done: Mapping[str, Result]) -> list[tuple[Path, tuple[study.Column, ...]]]:
    """Tables that are there, with the columns wanted of each, in the order of the studies."""
    known = study.modules()
    definitions = {name: study.find(name) for name in done if name in known}
    tables = []
    for name, definition in sorted(definitions.items(), key=lambda item: item[1].order):
        path = done[name].folder / definition.table
        if definition.columns and path.is_file():
            tables.append((path, definition.columns))
    return tables
