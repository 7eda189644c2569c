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

from analyze.studies.stability.study import FILE as MATCHES
from analyze.study import FEATURES, FOLDER, Outcome
from analyze.subject import Subject

Values = NDArray[np.float64]


class Column(NamedTuple):
    """A figure of every latent."""

    key: str
    label: str
    about: str  # what it is, in a sentence
    values: Values  # (F,); NaN where it is not known


class _Source(NamedTuple):
    """Where figures are, and what each is called there."""

    study: str
    file: str
    columns: tuple[tuple[str, str, str, str], ...]  # name in the file, then as in `Column`


_SOURCES = (
    _Source(
        "reason_score",
        FEATURES,
        (
            (
                "score",
                "score",
                "ReasonScore",
                "how much more it fires around words of reasoning (study=reason_score)",
            ),
            ("q", "score_q", "its q", "false discovery rate among random vocabularies as frequent"),
        ),
    ),
    _Source(
        "contrast",
        FEATURES,
        (
            ("d", "d", "contrast d", "Hedges' d of right answers over wrong ones (study=contrast)"),
            ("q", "d_q", "its q", "false discovery rate of d by a rank test"),
        ),
    ),
    _Source(
        "stability",
        MATCHES,
        (
            (
                "correlation",
                "stability",
                "stability",
                "correlation with its partner in another run (study=stability)",
            ),
        ),
    ),
)


def of_studies(subject: Subject, done: Mapping[str, Outcome]) -> list[Column]:
    """The columns of the studies in `done`, as far as their files are there."""
    found = []
    for source in _SOURCES:
        path = _path(subject, source)
        if source.study not in done or not path.is_file():
            continue
        table = pq.read_table(path, columns=["feature", *(name for name, *_ in source.columns)])
        feature = table.column("feature").to_numpy()
        for name, key, label, about in source.columns:
            values = np.full(subject.sae.d_sae, np.nan)
            values[feature] = table.column(name).cast(pa.float64()).to_numpy()  # null becomes NaN
            found.append(Column(key, label, about, values))
    return found


def files(subject: Subject) -> list[Path]:
    """What `of_studies` reads, as far as it is there."""
    return [path for source in _SOURCES if (path := _path(subject, source)).is_file()]


def _path(subject: Subject, source: _Source) -> Path:
    return subject.run / FOLDER / source.study / source.file
