"""Latents of another layer that predict a latent, and those that it predicts: of study=cross_layer.

That study of this run says what its latents predict; that of another run, with study.to= this one,
what predicts them.

Shapes: F latents of this run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from residual_saes.analyze import results
from residual_saes.analyze.pages.script import short
from residual_saes.analyze.results import FOLDER, Result
from residual_saes.analyze.studies.cross_layer.pairs import LEVEL
from residual_saes.analyze.studies.cross_layer.study import PAIRS
from residual_saes.analyze.subject import Subject

STUDY = "cross_layer"
_TOP = 10  # latents of the other run that are shown, by correlation
_COLUMNS = ("feature", "partner", "class", "r", "given_partner", "given_latent", "cosine", "q")


class Crossing(NamedTuple):
    """A result, as it is seen from this run."""

    result: Result
    run: Path  # the other one
    where: str  # its hook points
    predicts: bool  # whether this run's latents predict those of the other

    @property
    def table(self) -> Path:
        return self.result.folder / PAIRS

    @property
    def digest(self) -> str:
        return self.result.digests.files[PAIRS].xxh3_128

    def pairs(self, latents: int) -> tuple[list[list[list[float | None]]], list[str]]:
        """Of each latent (F,) those of the other run, and its class where it is predicted.

        Each is [latent, r, P(this fires | that fires), P(that | this), cosine].
        """
        found: list[list[list[float | None]]] = [[] for _ in range(latents)]
        classes = [""] * latents
        table = pq.read_table(self.table, columns=list(_COLUMNS)).to_pylist()
        for row in sorted(table, key=lambda row: -(row["r"] or 0)):
            ours, theirs = row["feature"], row["partner"]
            given_theirs, given_ours = row["given_partner"], row["given_latent"]
            if self.predicts:
                ours, theirs = theirs, ours
                given_theirs, given_ours = given_ours, given_theirs
            else:
                classes[ours] = row["class"]
            if row["q"] is None or row["q"] > LEVEL or len(found[ours]) == _TOP:
                continue
            numbers = (row["r"], given_theirs, given_ours, row["cosine"])
            known = [float("nan") if number is None else number for number in numbers]
            found[ours].append([theirs, *short(known)])
        return found, classes


def of(subject: Subject, others: Sequence[Subject]) -> list[Crossing]:
    """Whole results of this run, and those of other runs that are of this one."""
    found = []
    for result in _results(subject):
        figures = result.outcome.figures
        found.append(Crossing(result, Path(figures["to"]), figures["where"][1], predicts=True))
    for other in others:
        for result in _results(other):
            if result.settings["to_sae"] == subject.digest:
                found.append(Crossing(result, other.run, other.where, predicts=False))
    return found


def _results(subject: Subject) -> Iterator[Result]:
    """Those of the run's SAE, the last one of each other SAE."""
    known = set()
    if not (subject.run / FOLDER / STUDY).is_dir():
        return
    for result in results.of_study(subject.run, STUDY):
        to = result.settings["to_sae"]
        if result.settings["sae"] == subject.digest and to not in known:
            known.add(to)
            yield result
