"""Outcomes of steering beside unsteered ones: what changed, what must not have changed, and where v
stands.

A row is a sweep over the test questions. Rows of kind `v` are the scales; all others are controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from analyze.stats import Floats, Interval, holm, mcnemar, overlap_p, permutation_p, wilson


class Steer(NamedTuple):
    """What is added, where."""

    kind: str  # `v`, or which control
    vector: Floats  # (d,), unit norm
    scale: float
    positions: str  # see analyze.steering.hook


class Reply(NamedTuple):
    """The model's answer to a question. The last three as in analyze.steering.hook.Effect, where
    that was measured.
    """

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
    gained: list[
        str
    ]  # ids of the questions that are right with steering and wrong without: the recovered ones
    lost: list[str]  # the other way round
    p: float  # exact McNemar
    unparsable: int
    truncated: int
    length: float  # tokens of an answer, mean
    kl: float  # nats per token of the unsteered answers; NaN of the unsteered row, as the next two
    norm: float  # mean |h| at the generated positions of the unsteered answers
    relative: float  # mean |delta| / |h| at the steered positions of prompts and unsteered answers
    changed: int  # answers that differ in any token

    @classmethod
    def of(cls, steer: Steer | None, replies: Sequence[Reply], unsteered: Sequence[Reply]) -> Row:
        pairs = list(zip(unsteered, replies, strict=True))
        assert all(one.id == other.id for one, other in pairs)
        gained = [other.id for one, other in pairs if other.correct and not one.correct]
        lost = [one.id for one, other in pairs if one.correct and not other.correct]
        right = sum(one.correct for one in replies)
        kl, norm, relative = np.array(
            [(one.kl, one.norm, one.relative) for one in replies], np.float64
        ).sum(0)
        return cls(
            kind=steer.kind if steer else "unsteered",
            scale=steer.scale if steer else 0.0,
            positions=steer.positions if steer else "",
            questions=len(pairs),
            right=right,
            interval=wilson(right, len(pairs)),
            gained=gained,
            lost=lost,
            p=mcnemar(len(gained), len(lost)),
            unparsable=sum(one.unparsable for one in replies),
            truncated=sum(not one.finished for one in replies),
            length=float(np.mean([len(one.ids) for one in replies])),
            kl=float(kl / max(1, sum(len(one.ids) for one in unsteered))),
            norm=float(norm / len(pairs)),
            relative=float(relative / len(pairs)),
            changed=sum(
                (one.ids, one.finished) != (other.ids, other.finished) for one, other in pairs
            ),
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


class Null(NamedTuple):
    """A sweep that must equal the unsteered one token for token, and in every probability."""

    row: Row
    held: bool


def nulls(rows: Sequence[Row], layer: int, inert_from: int) -> list[Null]:
    """The hook at scale 0, and `prompt` alone at layers from `inert_from` on (see
    hook.prompt_inert_from).
    """
    exact = [row for row in rows if row.kind == "scale 0"]
    if layer >= inert_from:
        exact += [
            row for row in rows if row.positions == "prompt" and row.kind in ("v", "positions")
        ]
    return [Null(row, row.changed == 0 and row.kl == 0.0) for row in exact]


class Rank(NamedTuple):
    """Where v's count of right answers stands among that of other directions of its norm."""

    of: int
    as_high: int  # directions that give at least as many right answers
    as_low: int  # at most as many
    p_high: float
    p_low: float

    @classmethod
    def among(cls, row: Row, controls: Sequence[Row]) -> Rank:
        right = np.array([one.right for one in controls])
        high, low = int((right >= row.right).sum()), int((right <= row.right).sum())
        return cls(
            len(right),
            high,
            low,
            permutation_p(row.right, right),
            permutation_p(-row.right, -right),
        )


class Overlap(NamedTuple):
    """Questions that two scales recover, of all that are wrong without steering.

    p is of at least so many in common by chance (hypergeometric). A small one says that the same
    questions are near the edge under both, be it for the vector or for any change at all.
    """

    scales: tuple[float, float]
    recovered: tuple[int, int]
    wrong: int
    shared: list[str]  # ids
    p: float
    p_holm: float  # over all pairs


def overlaps(scales: Sequence[Row], wrong: int) -> list[Overlap]:
    """Of each pair of rows.

    Args:
        wrong: questions that are wrong without steering.
    """
    pairs = list(combinations(scales, 2))
    shared = [sorted(set(one.gained) & set(other.gained)) for one, other in pairs]
    p = [
        overlap_p(wrong, len(one.gained), len(other.gained), len(both))
        for (one, other), both in zip(pairs, shared, strict=True)
    ]
    return [
        Overlap(
            (one.scale, other.scale),
            (len(one.gained), len(other.gained)),
            wrong,
            both,
            chance,
            float(adjusted),
        )
        for (one, other), both, chance, adjusted in zip(pairs, shared, p, holm(p), strict=True)
    ]
