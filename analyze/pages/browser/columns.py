"""Figures of every latent for the list: the catalogue's, and those that other studies left.

Such a study leaves a table with a row per latent and a column `feature`. A latent that is not in it
has no figure. Definitions name the columns, see analyze/study.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from residual_saes.analyze import results, study
from residual_saes.analyze.pages.browser.contexts import fields
from residual_saes.analyze.results import FOLDER, Result
from residual_saes.analyze.subject import Subject


class Column(NamedTuple):
    """A figure of every latent."""

    key: str
    label: str
    about: str  # what it is, in a sentence
    values: NDArray[np.float64]  # (F,); NaN where it is not known


def of_targets(table: Path) -> list[Column]:
    """How a crosscoder's latents share their norms among its targets; none of anything else."""
    names = target_names(table)
    if not names:
        return []
    read = pq.ParquetFile(table).read(columns=["cosine", *fields("targets", "share")])
    flat = read.column("targets").combine_chunks().flatten().field("share")
    shares = flat.to_numpy().reshape(-1, len(names))
    cosine = read.column("cosine").to_numpy()
    columns = []
    if len(names) == 2:
        about = (
            f"norm of its direction at {names[1]}, over the sum with that at {names[0]}: near 0 it "
            f"is {names[0]}'s own, near 1 {names[1]}'s"
        )
        columns.append(Column("relative", "relative norm", about, shares[:, 1]))
    else:
        for number, name in enumerate(names):
            about = f"share of {name} in the norms of its directions"
            columns.append(Column(f"share_{number}", f"share of {name}", about, shares[:, number]))
    about = "of its directions in the targets; of more than two the smallest"
    return [*columns, Column("cosine", "cosine", about, cosine)]


def target_names(table: Path) -> list[str]:
    """The targets of a crosscoder, as its catalogue names them; none of anything else."""
    names: list[str] = json.loads((pq.read_schema(table).metadata or {}).get(b"targets", b"[]"))
    return names


def studied(subject: Subject) -> dict[str, Result]:
    """The whole results of the studies whose definitions name columns."""
    there = [name for name in study.modules() if (subject.run / FOLDER / name).is_dir()]
    done: dict[str, Result] = {}
    for name in there:
        if study.find(name).columns:
            done |= results.current(subject.run, subject.digest, name)
    return done


def of_studies(subject: Subject, done: Mapping[str, Result]) -> list[Column]:
    """The columns that the definitions of the studies in `done` name."""
    columns = []
    for _, path, wanted in _tables(done):
        table = pq.read_table(path, columns=["feature", *(column.name for column in wanted)])
        feature = table.column("feature").to_numpy()
        for column in wanted:
            values = np.full(subject.sae.d_sae, np.nan)
            # Null becomes NaN.
            values[feature] = table.column(column.name).cast(pa.float64()).to_numpy()
            columns.append(Column(column.key, column.label, column.about, values))
    return columns


def digests(done: Mapping[str, Result]) -> dict[str, str]:
    """Digests of the tables that `of_studies` reads, by path."""
    return {
        str(path): result.digests.files[path.name].xxh3_128 for result, path, _ in _tables(done)
    }


def _tables(
    done: Mapping[str, Result],
) -> list[tuple[Result, Path, tuple[study.Column, ...]]]:
    """Tables that are there, with the columns wanted of each, in the order of the studies."""
    definitions = {name: study.find(name) for name in done}
    tables = []
    for name, definition in sorted(definitions.items(), key=lambda item: item[1].order):
        path = done[name].path(definition.table)
        if path:
            tables.append((done[name], path, definition.columns))
    return tables
