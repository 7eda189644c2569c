"""The model's replies to questions under a change of its residuals, beside those without one.

A sweep is one change, over all questions. A row is what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from residual_saes.analyze.changes.intervention import Intervention
from residual_saes.analyze.stats import Interval, mcnemar, permutation_p, wilson


class Swept(Intervention, Protocol):
    """An intervention with a name, that questions are answered under."""

    @property
    def kind(self) -> str:
        """Its name, or which control it is."""

    @property
    def scale(self) -> float:
        """How strong it is, among those of its kind."""

    @property
    def key(self) -> list[Any]:
        """What it follows from, for the key of kept replies."""


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
    """A sweep over questions, each paired with its answer without any change."""

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
    def of(cls, change: Swept | None, replies: Sequence[Reply], unsteered: Sequence[Reply]) -> Row:
        """The row of a sweep.

        Args:
            change: None: the unsteered sweep itself.
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
            kind=change.kind if change else "unsteered",
            scale=change.scale if change else 0.0,
            positions=change.positions if change else "",
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


# -- cells of tables -------------------------------------------------------------------------------

OUTCOMES = ("positions", "right", "95%", "gained", "lost", "net", "McNemar p")
CHANGES = ("unparsable", "truncated", "tokens", "KL per token", "|Δ| / |h|")


def outcome_cells(row: Row) -> tuple[str, ...]:
    """The cells below OUTCOMES."""
    accuracy = f"{row.accuracy:.1%}"
    interval = f"{row.interval.low:.1%} to {row.interval.high:.1%}"
    if row.kind == "unsteered":
        return "", accuracy, interval, "", "", "", ""
    return (
        row.positions,
        accuracy,
        interval,
        str(len(row.gained)),
        str(len(row.lost)),
        f"{row.net:+d}",
        f"{row.p:.2g}",
    )


def change_cells(row: Row) -> tuple[str, ...]:
    """The cells below CHANGES; KL and norm are empty where they were not measured."""
    kl = "" if np.isnan(row.kl) else f"{row.kl:.3g}"
    relative = "" if np.isnan(row.relative) else f"{row.relative:.3g}"
    return str(row.unparsable), str(row.truncated), f"{row.length:.1f}", kl, relative
