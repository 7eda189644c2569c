"""Outcomes of steering beside unsteered ones: what changed, what must not change, v's rank.

A sweep is one way of steering, over all test questions. A row is what came of it. Rows of kind `v`
are the scales; all others are controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from residual_saes.analyze.changes.replies import Rank, Row
from residual_saes.analyze.stats import detectable_change, holm, overlap_p

# Share of the outcomes that the reference SAE's steering changes: 12 of 50 at its strongest.
DISCORDANT = 0.2


# -- sweeps that must change nothing ---------------------------------------------------------------


class Null(NamedTuple):
    """A sweep that must equal the unsteered one token for token, and in every probability."""

    row: Row
    held: bool


def nulls(rows: Sequence[Row], layer: int, inert_from: int) -> list[Null]:
    """The hook at scale 0, and at layers from `inert_from` on steering of `prompt` alone.

    Args:
        inert_from: see hook.prompt_inert_from.
    """
    exact = [row for row in rows if row.kind == "scale 0"]
    if layer >= inert_from:
        for row in rows:
            if row.positions == "prompt" and row.kind in ("v", "positions"):
                exact.append(row)
    return [Null(row, row.changed == 0 and row.kl == 0.0) for row in exact]


# -- v among other directions, and its scales among each other -------------------------------------


class Overlap(NamedTuple):
    """Questions that two scales recover, of all that are wrong without steering.

    p is of at least so many in common by chance (hypergeometric). A small p says that the same
    questions are near the edge under both scales. The vector need not be the reason: any change may
    tip them.
    """

    scales: tuple[float, float]
    recovered: tuple[int, int]
    wrong: int
    shared: list[str]  # ids
    p: float
    p_holm: float  # over all pairs


def overlaps(scales: Sequence[Row], wrong: int) -> list[Overlap]:
    """The overlap of each pair of rows.

    Args:
        wrong: questions that are wrong without steering.
    """
    measured = []
    for first, second in combinations(scales, 2):
        shared = sorted(set(first.gained) & set(second.gained))
        recovered = (len(first.gained), len(second.gained))
        p = overlap_p(wrong, *recovered, len(shared))
        measured.append(Overlap((first.scale, second.scale), recovered, wrong, shared, p, p))
    adjusted = holm([overlap.p for overlap in measured])
    return [
        overlap._replace(p_holm=float(p)) for overlap, p in zip(measured, adjusted, strict=True)
    ]


# -- everything ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """Everything that was measured."""

    rows: Sequence[Row]  # of the test questions: unsteered, at scale 0, and the rest
    best: float  # scale other than 0 that looks best on dev: the controls are measured at it
    dev: Mapping[float, int]  # right answers to the dev questions by scale of v, 0 being unsteered
    ids: Mapping[str, Sequence[str]]  # of the questions, by part: train, dev, test
    answers: tuple[int, int]  # right and wrong ones that made v
    layer: int
    inert_from: int  # see hook.prompt_inert_from
    seed: int
    samples: int = 1  # answers to each train question that made v; every sweep has one, greedy

    def of(self, *kinds: str) -> list[Row]:
        """The rows of some kinds."""
        return [row for row in self.rows if row.kind in kinds]

    @property
    def unsteered(self) -> Row:
        return self.rows[0]

    @property
    def chosen(self) -> float:
        """The scale that dev questions chose: 0, to do nothing, unless another has more right."""
        return self.best if self.dev[self.best] > self.dev[0.0] else 0.0

    @cached_property
    def best_row(self) -> Row:
        """v at the best scale other than 0."""
        return next(row for row in self.of("v") if row.scale == self.best)

    @cached_property
    def holm(self) -> dict[float, float]:
        """McNemar's p by scale of v, adjusted for all of them."""
        rows = self.of("v")
        adjusted = holm([row.p for row in rows])
        return {row.scale: float(p) for row, p in zip(rows, adjusted, strict=True)}

    @cached_property
    def ranks(self) -> dict[str, Rank]:
        """v at the best scale among the directions of a kind."""
        return {kind: Rank.among(self.best_row, self.of(kind)) for kind in ("random", "shuffled")}

    @property
    def gained_by_chance(self) -> float:
        """Of the questions that v gains at the best scale, how many a random direction gains, mean.

        It is what the overlaps of v's scales are to be held against.
        """
        gained = {*self.best_row.gained}
        return float(np.mean([len(gained & {*row.gained}) for row in self.of("random")]))

    @cached_property
    def nulls(self) -> list[Null]:
        return nulls(self.rows, self.layer, self.inert_from)

    @cached_property
    def overlaps(self) -> list[Overlap]:
        return overlaps(self.of("v"), self.unsteered.questions - self.unsteered.right)

    @property
    def norm(self) -> float:
        """Mean norm of the residuals where answers are generated."""
        return self.rows[1].norm  # of the row at scale 0: the unsteered one has none

    def figures(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        right, wrong = self.answers
        return {
            "layer": self.layer,
            "seed": self.seed,
            "samples": self.samples,
            "questions": {part: len(ids) for part, ids in self.ids.items()},
            "answers_of_the_vector": {"right": right, "wrong": wrong},
            "mean_norm": self.norm,
            "chosen_scale": self.chosen,
            "best_scale": self.best,
            "best_p": self.best_row.p,
            "best_p_holm": self.holm[self.best],
            "dev_right": dict(self.dev),
            "rows": [self._row_figures(row) for row in self.rows],
            "ranks": {kind: rank._asdict() for kind, rank in self.ranks.items()},
            "nulls": [_null_figures(null) for null in self.nulls],
            "gained_by_chance": self.gained_by_chance,
            "overlaps": [overlap._asdict() for overlap in self.overlaps],
            "detectable": {
                "usual": self._detectable(DISCORDANT),
                "observed": self._detectable(self.best_row.discordant),
            },
            "ids": dict(self.ids),
        }

    def _row_figures(self, row: Row) -> dict[str, Any]:
        derived = {
            "accuracy": row.accuracy,
            "net": row.net,
            "p_holm": self.holm[row.scale] if row.kind == "v" else None,
            "of_mean_norm": row.scale / self.norm,
        }
        return asdict(row) | derived

    def _detectable(self, discordant: float) -> dict[str, float]:
        change = detectable_change(self.best_row.questions, discordant)
        return {"discordant": discordant, "change": change}


def _null_figures(null: Null) -> dict[str, Any]:
    row = null.row
    return {
        "kind": row.kind,
        "scale": row.scale,
        "positions": row.positions,
        "changed": row.changed,
        "kl": row.kl,
        "held": null.held,
    }
