"""What changes of latents did to answers, beside the same changes of other latents and directions.

A dose is a change and how much of it. Holm's adjustment is over all doses of the chosen latents.
The dose whose controls decide is chosen on dev questions, by other controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from residual_saes.analyze.changes.intervention import Delta, EqualNorm, LatentChange
from residual_saes.analyze.changes.replies import Rank, Row
from residual_saes.analyze.stats import Interval, holm
from residual_saes.data import durable
from residual_saes.harvest.model import LanguageModel

CHOSEN = "chosen latents"
LATENTS = "random latents"
DIRECTIONS = "random directions"
NOTHING = "nothing added"
CONTROLS = (LATENTS, DIRECTIONS)
LEVEL = 0.05
KEPT = 0.8  # of right dev answers: where controls keep less, anything breaks the model


class Dose(NamedTuple):
    """A change, and to what: a multiple of each chosen latent's own mean activation; 0 ablates."""

    change: str  # one of intervention.CHANGES
    scale: float

    def __str__(self) -> str:
        return self.change if self.change == "ablate" else f"{self.change} {self.scale:g}"


class Trial(NamedTuple):
    """A dose of something, that questions are answered under."""

    kind: str  # CHOSEN, NOTHING, or one of CONTROLS
    dose: Dose
    intervention: LatentChange | EqualNorm
    sae: str  # digest

    @property
    def scale(self) -> float:
        return self.dose.scale

    @property
    def positions(self) -> str:
        return self.intervention.positions

    @property
    def key(self) -> list[Any]:
        """What it follows from, for the key of kept replies."""
        change, across = self.intervention, None
        if isinstance(change, EqualNorm):
            across = durable.digest(change.direction.tobytes())
            change = change.change
        value = change.value if change.change != "ablate" else None
        return [self.sae, change.change, change.features, value, change.positions, across]

    def delta(self, lm: LanguageModel) -> Delta:
        return self.intervention.delta(lm)


class Measured(NamedTuple):
    """What came of a trial."""

    kind: str
    dose: Dose
    row: Row

    @classmethod
    def of(cls, trial: Trial, row: Row) -> Measured:
        return cls(trial.kind, trial.dose, row)


def share_kept(right: Sequence[int], unsteered: int) -> float:
    """Right dev answers with controls, on average, over those without a change; 1 of none."""
    return float(np.mean(right)) / unsteered if unsteered else 1.0


def best_of(kept: Mapping[Dose, float]) -> Dose:
    """The dose whose controls decide: of those at which controls keep KEPT, the strongest.

    The strongest is that at which they keep least. If they keep less at all doses, it is that at
    which they keep most. The chosen latents have no say in it, nor have the controls that they are
    compared with: among doses that they chose, they would look further from controls than they are.

    Args:
        kept: see `share_kept`.
    """
    mild = [dose for dose in kept if kept[dose] >= KEPT]
    if not mild:
        return max(kept, key=lambda dose: kept[dose])
    return min(mild, key=lambda dose: kept[dose])


class Attribution(NamedTuple):
    """Effects of ablating single latents on ln p of the number that graders find, nats an answer.

    Chosen latents come first, then random ones of equal density.
    """

    features: list[int]
    estimated: list[float]  # to first order
    measured: list[float]
    answers: int  # right ones to test questions, unsteered
    rho: float  # Spearman's, between the two; NaN where one of them is constant
    interval: Interval | None  # over latents
    p: float  # one-sided, pairs permuted


@dataclass(frozen=True)
class Findings:
    """Everything that was measured."""

    unsteered: Row  # of the test questions
    measured: Sequence[Measured]
    dev: Mapping[Dose, Sequence[int]]  # right dev answers with each of other controls
    dev_right: int  # without a change
    latents: Sequence[Mapping[str, Any]]  # the chosen ones
    controls: Sequence[Sequence[int]]  # sets of random latents
    attribution: Attribution | None  # None: no right answer holds a number
    selection: Mapping[str, Any]
    ids: Mapping[str, Sequence[str]]  # of the questions, by part: train, dev, test
    layer: int
    seed: int

    def of(self, kind: str, dose: Dose | None = None) -> list[Measured]:
        """What came of a kind, at all doses or at one."""
        return [
            measured
            for measured in self.measured
            if measured.kind == kind and dose in (None, measured.dose)
        ]

    @cached_property
    def best(self) -> Dose:
        """The dose that the dev questions chose."""
        return best_of(self.kept)

    @property
    def kept(self) -> dict[Dose, float]:
        """See `share_kept`."""
        return {dose: share_kept(right, self.dev_right) for dose, right in self.dev.items()}

    @cached_property
    def best_row(self) -> Row:
        return self.of(CHOSEN, self.best)[0].row

    @cached_property
    def holm(self) -> dict[Dose, float]:
        """McNemar's p by dose of the chosen latents, adjusted for all of them."""
        p = {measured.dose: measured.row.p for measured in self.of(CHOSEN)}
        return dict(zip(p, holm(list(p.values())).tolist(), strict=True))

    @cached_property
    def ranks(self) -> dict[str, Rank]:
        """The chosen latents at the best dose among each kind of control there."""
        ranks = {}
        for kind in CONTROLS:
            rows = [measured.row for measured in self.of(kind, self.best)]
            ranks[kind] = Rank.among(self.best_row, rows)
        return ranks

    @property
    def held(self) -> bool:
        """Whether the hook with nothing to add changed no token and no probability."""
        return all(not found.row.changed and found.row.kl == 0 for found in self.of(NOTHING))

    @property
    def verdict(self) -> str:
        """By words.RULE: `broken`, `no effect`, `not shown`, `raises` or `lowers`."""
        if not self.held:
            return "broken"
        if self.holm[self.best] >= LEVEL:
            return "no effect"
        if any(rank.p >= LEVEL for rank in self.ranks.values()):
            return "not shown"
        return "raises" if self.best_row.net > 0 else "lowers"

    def figures(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        dev = []
        for dose, right in self.dev.items():
            dev.append({**dose._asdict(), "right": list(right), "kept": self.kept[dose]})
        return {
            "verdict": self.verdict,
            "layer": self.layer,
            "seed": self.seed,
            "selection": dict(self.selection),
            "latents": list(self.latents),
            "questions": {part: len(ids) for part, ids in self.ids.items()},
            "best": self.best._asdict(),
            "best_p_holm": self.holm[self.best],
            "dev_right": self.dev_right,
            "dev": dev,
            "unsteered": asdict(self.unsteered) | {"accuracy": self.unsteered.accuracy},
            "rows": [self._row_figures(measured) for measured in self.measured],
            "ranks": {kind: rank._asdict() for kind, rank in self.ranks.items()},
            "controls": list(self.controls),
            "attribution": self.attribution and self.attribution._asdict(),
            "ids": dict(self.ids),
        }

    def _row_figures(self, measured: Measured) -> dict[str, Any]:
        kind, dose, row = measured
        p = self.holm[dose] if kind == CHOSEN else None
        derived = {"change": dose.change, "accuracy": row.accuracy, "net": row.net, "p_holm": p}
        return asdict(row) | derived
