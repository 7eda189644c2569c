"""What is said of every latent in the list: the catalogue's figures, and those of other studies
that were done.

A study that looks at every latent leaves a table of them, one row per latent, with a column
`feature`. Without it, and of latents that are not in it, nothing is said.
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

Values = NDArray[np.float64]


class Column(NamedTuple):
    """A figure of every latent."""

    key: str
    label: str
    about: str  # what it is, in a sentence
    values: Values  # (F,); NaN where it is not known


def of_studies(subject: Subject, done: Mapping[str, Result]) -> list[Column]:
    """The columns that the definitions of the studies in `done` name."""
    columns = []
    for path, wanted in _tables(done).values():
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
    return [path for path, _ in _tables(done).values()]


def _tables(done: Mapping[str, Result]) -> dict[str, tuple[Path, tuple[study.Column, ...]]]:
    """By study its table and the columns wanted of it, where the study has such and it is there."""
    tables = {}
    definitions = {name: study.find(name) for name in done if name in study.modules()}
    for name, definition in sorted(definitions.items(), key=lambda item: item[1].order):
        path = done[name].folder / definition.table
        if definition.columns and path.is_file():
            tables[name] = path, definition.columns
    return tables
