"""What the study `steering` says: its verdict, its figures, its tables and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
import numpy as np

from analyze.drawing import STYLE, empty, svg
from analyze.outcome import Outcome, Picture, Table
from analyze.stats import detectable_change, holm
from analyze.studies.steering.outcomes import Null, Overlap, Rank, Row, nulls, overlaps

LEVEL = 0.05
# share of the outcomes that the reference SAE's steering changes: 12 of 50 at its strongest
DISCORDANT = 0.2


@dataclass(frozen=True)
class Page:
    """Everything that was measured."""

    rows: Sequence[Row]  # of the test questions: unsteered, at scale 0, and the rest
    best: float  # scale that the dev questions chose
    dev: Mapping[float, int]  # right answers to the dev questions by scale of v, 0 being unsteered
    ids: Mapping[str, Sequence[str]]  # of the questions, by part: train, dev, test
    answers: tuple[int, int]  # right and wrong ones that made v
    layer: int
    inert_from: int  # see analyze.steering.hook.prompt_inert_from
    seed: int

    def of(self, *kinds: str) -> list[Row]:
        return [row for row in self.rows if row.kind in kinds]

    @cached_property
    def head(self) -> Row:
        """v at the best scale."""
        return next(row for row in self.of("v") if row.scale == self.best)

    @cached_property
    def holm(self) -> dict[float, float]:
        """McNemar's p by scale of v, adjusted for all of them."""
        scales = self.of("v")
        return dict(
            zip(
                [row.scale for row in scales], holm([row.p for row in scales]).tolist(), strict=True
            )
        )

    @cached_property
    def ranks(self) -> dict[str, Rank]:
        return {kind: Rank.among(self.head, self.of(kind)) for kind in ("random", "shuffled")}

    @cached_property
    def nulls(self) -> list[Null]:
        return nulls(self.rows, self.layer, self.inert_from)

    @cached_property
    def overlaps(self) -> list[Overlap]:
        return overlaps(self.of("v"), self.rows[0].questions - self.rows[0].right)

    @property
    def norm(self) -> float:
        """Mean norm of the residuals where answers are generated."""
        return self.rows[1].norm

    def outcome(self) -> Outcome:
        picture = Picture(
            f"Accuracy on {self.rows[0].questions} test questions against the scale of v at layer {self.layer}, with "
            "Wilson's 95 % intervals. Grey: other directions at the best dev scale, beside it. Dashed: unsteered.",
            self.drawing(),
        )
        tables = [
            self._scale_table(),
            self._control_table(),
            self._overlap_table(),
            self._dev_table(),
        ]
        return Outcome(self.figures(), self.summary(), tables, {"steering": picture})

    def figures(self) -> dict[str, Any]:
        total = self.head.questions
        return {
            "layer": self.layer,
            "seed": self.seed,
            "questions": {part: len(ids) for part, ids in self.ids.items()},
            "answers_of_the_vector": {"right": self.answers[0], "wrong": self.answers[1]},
            "mean_norm": self.norm,
            "best_scale": self.best,
            "best_p": self.head.p,
            "best_p_holm": self.holm[self.best],
            "dev_right": dict(self.dev),
            "rows": [
                {
                    **asdict(row),
                    "accuracy": row.accuracy,
                    "net": row.net,
                    "p_holm": self.holm[row.scale] if row.kind == "v" else None,
                    "of_mean_norm": row.scale / self.norm,
                }
                for row in self.rows
            ],
            "ranks": {kind: found._asdict() for kind, found in self.ranks.items()},
            "nulls": [
                {key: getattr(row, key) for key in ("kind", "scale", "positions", "changed", "kl")}
                | {"held": held}
                for row, held in self.nulls
            ],
            "overlaps": [one._asdict() for one in self.overlaps],
            "detectable": {
                share: {"discordant": value, "change": detectable_change(total, value)}
                for share, value in (("usual", DISCORDANT), ("observed", self.head.discordant))
            },
            "ids": dict(self.ids),
        }

    # -- sentences ---------------------------------------------------------------------------------

    def summary(self) -> list[str]:
        return [
            self._verdict(),
            self._found(),
            self._other_scales(),
            self._against(),
            *self._null(),
            self._power(),
        ]

    def _verdict(self) -> str:
        if not all(test.held for test in self.nulls):
            return "Nothing here is to be trusted: a sweep that must equal the unsteered one does not (see below)."
        head, chance = self.head, self.ranks["random"]
        where = f"Steering layer {self.layer} by {head.scale:+g} v ({head.positions} positions)"
        if head.p >= LEVEL:
            return f"{where} has no effect on accuracy that {head.questions} questions could show."
        change = "raises" if head.net > 0 else "lowers"
        if (chance.p_high if head.net > 0 else chance.p_low) < LEVEL:
            return f"{where} {change} accuracy, and more than directions by chance do."
        few = "; too few were tried to tell more" if 1 / (1 + chance.of) >= LEVEL else ""
        return f"{where} {change} accuracy, but not shown to be more than what directions by chance do{few}."

    def _found(self) -> str:
        head, tried = self.head, len(self.holm)
        return (
            f"Its scale is the best of {tried} on {len(self.ids['dev'])} dev questions ({self.dev[self.best]} right, "
            f"{self.dev[0.0]} unsteered). Of {head.questions} test questions {_accuracy(head)} are right, unsteered "
            f"{_accuracy(self.rows[0])}: {len(head.gained)} gained, {len(head.lost)} lost, exact McNemar p = "
            f"{_p(head.p)}, by Holm over the {tried} scales {_p(self.holm[self.best])}."
        )

    def _other_scales(self) -> str:
        shown = [row for row in self.of("v") if self.holm[row.scale] < LEVEL]
        if not shown:
            return "At no scale does accuracy differ from unsteered by Holm's p < 0.05."
        said = [
            f"{row.scale:+g} ({row.net:+d} net, p = {_p(self.holm[row.scale])})" for row in shown
        ]
        return f"By Holm's p < 0.05, accuracy differs from unsteered at {', '.join(said)}."

    def _against(self) -> str:
        parts = [
            f"{found.as_high} of {found.of} {words} give at least as many right answers (p = {_p(found.p_high)}) and "
            f"{found.as_low} at most as many (p = {_p(found.p_low)})"
            for found, words in (
                (self.ranks["random"], "directions by chance"),
                (self.ranks["shuffled"], "vectors from shuffled labels"),
            )
        ]
        return f"With the same norm and positions, {'; '.join(parts)}."

    def _null(self) -> list[str]:
        said = []
        for row, held in self.nulls:
            what = (
                "The hook at scale 0"
                if row.kind == "scale 0"
                else f"Steering the prompt alone by {row.scale:+g} v"
            )
            if held:
                said.append(f"{what} changes no token and no probability, as it must.")
            else:
                said.append(
                    f"{what} must change nothing; it changes {row.changed} answers, KL {row.kl:.2g} per token."
                )
        if self.layer < self.inert_from:
            said.append(
                f"Steering the prompt alone is no null test at layer {self.layer}: only from layer {self.inert_from} "
                "on does no later layer make keys and values from it."
            )
        return said

    def _power(self) -> str:
        total, seen = self.head.questions, self.head.discordant
        usual, here = (_points(detectable_change(total, share)) for share in (DISCORDANT, seen))
        return (
            f"What {total} questions can show with 80 % power: {usual} if {DISCORDANT:.0%} of the outcomes change, "
            f"{here} if {seen:.0%} do, as here."
        )

    # -- tables and picture ------------------------------------------------------------------------

    def _scale_table(self) -> Table:
        cells = []
        for row in self.of("unsteered", "scale 0", "v"):
            unsteered, holm_p = (
                row.kind == "unsteered",
                self.holm[row.scale] if row.kind == "v" else None,
            )
            scale = (
                ("unsteered", "")
                if unsteered
                else (f"{row.scale:g}", f"{row.scale / self.norm:.1%}")
            )
            cells.append(
                (*scale, *_outcomes(row), "" if holm_p is None else _p(holm_p), *_changes(row))
            )
        header = ("scale", "of mean norm", *_OUTCOMES, "Holm p", *_CHANGES)
        return Table(f"v on {self.head.questions} test questions", header, cells)

    def _control_table(self) -> Table:
        kinds = ("opposite", "positions", "orthogonal", "shuffled", "random")
        cells = [
            (row.kind, f"{row.scale:g}", *_outcomes(row), *_changes(row)) for row in self.of(*kinds)
        ]
        return Table(
            "Controls at the best dev scale", ("control", "scale", *_OUTCOMES, *_CHANGES), cells
        )

    def _overlap_table(self) -> Table:
        cells = [
            (
                " and ".join(f"{scale:g}" for scale in one.scales),
                *map(str, one.recovered),
                str(len(one.shared)),
                _p(one.p),
                _p(one.p_holm),
            )
            for one in self.overlaps
        ]
        header = (
            "scales",
            "recovered by the first",
            "by the second",
            "by both",
            "hypergeometric p",
            "Holm p",
        )
        return Table("Questions that are wrong unsteered and right at two scales", header, cells)

    def _dev_table(self) -> Table:
        total = len(self.ids["dev"])
        cells = [
            (f"{scale:g}" if scale else "unsteered", str(n), f"{n / total:.1%}")
            for scale, n in self.dev.items()
        ]
        return Table(f"v on {total} dev questions", ("scale", "right", "accuracy"), cells)

    def drawing(self) -> str:
        """Accuracy against scale; other directions as points beside the line."""
        line = sorted(self.of("scale 0", "v"), key=lambda row: row.scale)
        below = [row.accuracy - row.interval.low for row in line]
        above = [row.interval.high - row.accuracy for row in line]
        with mpl.rc_context(STYLE):
            figure, axes = empty("scale of the unit vector", "share of right answers")
            scales, shares = [row.scale for row in line], [row.accuracy for row in line]
            axes.errorbar(
                scales,
                shares,
                [below, above],
                marker="o",
                markersize=4,
                linewidth=1.5,
                capsize=3,
                label="v",
            )
            beside = 0.02 * (scales[-1] - scales[0])  # of the interval, which would hide them
            for kind, marker, label, by in (
                ("random", "o", "by chance", -beside),
                ("shuffled", "x", "shuffled labels", beside),
            ):
                at = [(row.scale + by, row.accuracy) for row in self.of(kind)]
                axes.plot(
                    *zip(*at, strict=True), marker, color="#9ca3af", markersize=4, label=label
                )
            axes.axhline(self.rows[0].accuracy, color="#6b7280", linestyle="--", linewidth=1)
            axes.legend(frameon=False)
            return svg(figure)


_OUTCOMES = ("positions", "right", "95 %", "gained", "lost", "net", "McNemar p")
_CHANGES = ("unparsable", "truncated", "tokens", "KL per token", "|Δ| / |h|")


def _outcomes(row: Row) -> tuple[str, ...]:
    shares = f"{row.accuracy:.1%}", f"{row.interval.low:.1%} to {row.interval.high:.1%}"
    if row.kind == "unsteered":
        return "", *shares, "", "", "", ""
    return (
        row.positions,
        *shares,
        str(len(row.gained)),
        str(len(row.lost)),
        f"{row.net:+d}",
        _p(row.p),
    )


def _changes(row: Row) -> tuple[str, ...]:
    effect = ("" if np.isnan(value) else f"{value:.3g}" for value in (row.kl, row.relative))
    return str(row.unparsable), str(row.truncated), f"{row.length:.1f}", *effect


def _accuracy(row: Row) -> str:
    return f"{row.accuracy:.1%} [{row.interval.low:.1%}, {row.interval.high:.1%}]"


def _points(change: float) -> str:
    return "no difference" if np.isnan(change) else f"a difference of {100 * change:.1f} points"


def _p(value: float) -> str:
    return f"{value:.2g}"
