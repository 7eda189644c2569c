"""What the stage gate says: verdict, tables and picture, from the figures of `study.judge`."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl

from analyze.drawing import STYLE, empty, svg
from analyze.outcome import Picture, Table
from analyze.stats import figure, formatted

SCORE = "R"
LENGTH = "length"
_BLUE = "#2563eb"


def summary(figures: dict[str, Any]) -> list[str]:
    """The verdict with its rule, then R beside its bounds and its baselines."""
    own = figures["scores"][SCORE]
    validation = figures["validation"]
    chance = figures["random_features"]
    low, high = chance["interval"]
    failing = ""
    if figures["missing"]:
        failing = f" Does not hold: {'; '.join(figures['missing'])}."
    better = []
    for name, score in figures["scores"].items():
        if name != SCORE and score["auroc"]["value"] >= own["auroc"]["value"]:
            better.append(name)
    beside = "None of the baselines is as good as R."
    if better:
        beside = f"At least as good as R: {', '.join(better)}."
    return [
        f"Verdict: {figures['verdict']}.{failing} The rule: {figures['rule']}.",
        f"R tells right answers from wrong ones with an AUROC of {formatted(own['auroc'], '.3f')} "
        f"on {validation['answers']} validation answers, {validation['right']} of them right.",
        f"Its rank correlation with being right is {formatted(own['rho'], '.3f')}, where "
        f"{figures['cap']:.3f} is the most that can be (permutation p = {own['p']:.2g}); given "
        f"length it is {formatted(own['rho_given_length'], '.3f')}.",
        f"As many random features have an AUROC of {chance['median']:.3f}, 95 % of them "
        f"{low:.3f} to {high:.3f} (p = {chance['p']:.2g}).",
        beside,
    ]


def tables(figures: dict[str, Any]) -> list[Table]:
    """The scores, the split of the questions, and the features that were chosen."""
    rows = [_score_row(name, score) for name, score in figures["scores"].items()]
    header = ("score", "AUROC", "rho", "rho given length", "p", "R's AUROC less its own")
    sides = []
    for side in ("discovery", "validation"):
        counts = [f"{figures[side][key]:,}" for key in ("questions", "answers", "right")]
        sides.append((side, *counts))
    chosen = []
    for sign in ("helpful", "harmful"):
        for feature in figures[sign]:
            chosen.append((sign, str(feature["feature"]), f"{feature['g']:.2f}"))
    return [
        Table(f"On the validation questions; rho is at most {figures['cap']:.3f}", header, rows),
        Table("The split", ("", "questions", "answers", "right"), sides),
        Table(
            "Features, chosen on the discovery questions",
            ("", "feature", "Hedges' g there"),
            chosen,
        ),
    ]


def _score_row(name: str, score: dict[str, Any]) -> tuple[str, ...]:
    given_length = formatted(score["rho_given_length"], ".3f") if name != LENGTH else "-"
    behind = formatted(score["behind"], ".3f") if name != SCORE else "-"
    return (
        name,
        formatted(score["auroc"], ".3f"),
        formatted(score["rho"], ".3f"),
        given_length,
        f"{score['p']:.2g}",
        behind,
    )


def picture(figures: dict[str, Any]) -> Picture:
    """AUROC of every score and of random features, with intervals."""
    names = [*figures["scores"], "random features"]
    points = [score["auroc"] for score in figures["scores"].values()]
    chance = figures["random_features"]
    points.append(figure(chance["median"], chance["interval"]))
    with mpl.rc_context(STYLE):
        drawing, axes = empty("AUROC", "")
        for height, point in enumerate(points):
            axes.plot(point["interval"], [height, height], color=_BLUE, linewidth=1.5)
            axes.plot(point["value"], height, "o", color=_BLUE, markersize=4)
        axes.axvline(0.5, color="#6b7280", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        return Picture("AUROC on the validation questions, with 95 % intervals", svg(drawing))
