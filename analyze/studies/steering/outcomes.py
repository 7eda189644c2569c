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

from analyze.intervention import Steer
from analyze.stats import (
    Interval,
    detectable_change,
    holm,
    mcnemar,
    overlap_p,
    permutation_p,
    wilson,
)

# Share of the outcomes that the reference SAE's steering changes: 12 of 50 at its strongest.
DISCORDANT = 0.2


class Reply(NamedTuple):
    """The model's answer to a question. The last three are an `Effect`, where it was measured."""

    id: str  # the problem's
    ids: list[int]  # tokens
    correct: bool
    unparsable: bool
    finished: bool
    kl: float | None = None
    norm: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class Row:
    """A sweep over questions, each paired with its unsteered answer."""

    kind: str  # `unsteered`, or as of its `Steer`
    scale: float
    positions: str
    questions: int
    right: int
    interval: Interval  # of right / questions
    gained: list[str]  # ids of the questions that are right with steering and wrong without
    lost: list[str]  # the other way round
    # Of the gained ones, those whose unsteered answer holds no number where graders look: steering
    # may have mended its form alone.
    mended: int
    p: float  # exact McNemar
    unparsable: int
    truncated: int
    length: float  # tokens of an answer, mean
    # The next three are NaN in the unsteered row.
    kl: float  # nats per token of the unsteered answers
    norm: float  # mean |h| at the generated positions of the unsteered answers
    relative: float  # mean |delta| / |h| at the steered positions of prompts and unsteered answers
    changed: int  # answers that differ in any token

    @classmethod
    def of(cls, steer: Steer | None, replies: Sequence[Reply], unsteered: Sequence[Reply]) -> Row:
        """The row of a sweep.

        Args:
            steer: None: the unsteered sweep itself.
            replies: of the sweep.
            unsteered: replies to the same questions, in the same order.
        """
        gained = []
        lost = []
        mended = 0
        changed = 0
        for before, after in zip(unsteered, replies, strict=True):
            assert before.id == after.id
            if after.correct and not before.correct:
                gained.append(after.id)
                mended += before.unparsable
            if before.correct and not after.correct:
                lost.append(after.id)
            changed += (before.ids, before.finished) != (after.ids, after.finished)
        questions = len(replies)
        right = sum(reply.correct for reply in replies)
        measured = [(reply.kl, reply.norm, reply.relative) for reply in replies]
        kl, norm, relative = np.array(measured, np.float64).sum(0)
        unsteered_tokens = sum(len(reply.ids) for reply in unsteered)
        return cls(
            kind=steer.kind if steer else "unsteered",
            scale=steer.scale if steer else 0.0,
            positions=steer.positions if steer else "",
            questions=questions,
            right=right,
            interval=wilson(right, questions),
            gained=gained,
            lost=lost,
            mended=mended,
            p=mcnemar(len(gained), len(lost)),
            unparsable=sum(reply.unparsable for reply in replies),
            truncated=sum(not reply.finished for reply in replies),
            length=float(np.mean([len(reply.ids) for reply in replies])),
            kl=float(kl / max(1, unsteered_tokens)),
            norm=float(norm / questions),
            relative=float(relative / questions),
            changed=changed,
        )

    @property
    def accuracy(self) -> float:
        return self.right / self.questions

    @property
    def net(self) -> int:
        return len(self.gained) - len(self.lost)

    @property
    def discordant(self) -> float:
        """Share of the questions whose outcome changed, to either side."""
        return (len(self.gained) + len(self.lost)) / self.questions


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


class Rank(NamedTuple):
    """Where v's count of right answers stands among those of other directions of its norm.

    p is two-sided: a direction that costs as many answers as v gains counts against v.
    """

    of: int
    as_high: int  # directions that give at least as many right answers
    as_low: int  # at most as many
    as_far: int  # whose count is as far from the unsteered one, to either side
    p_high: float
    p_low: float
    p: float

    @classmethod
    def among(cls, row: Row, controls: Sequence[Row]) -> Rank:
        right = np.array([control.right for control in controls])
        far = np.array([abs(control.net) for control in controls])
        return cls(
            of=len(right),
            as_high=int((right >= row.right).sum()),
            as_low=int((right <= row.right).sum()),
            as_far=int((far >= abs(row.net)).sum()),
            p_high=permutation_p(row.right, right),
            p_low=permutation_p(-row.right, -right),
            p=permutation_p(abs(row.net), far),
        )


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
