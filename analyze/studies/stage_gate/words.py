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
    parts = list(figures["notes"])
    if figures["missing"]:
        parts.append(f"does not hold: {'; '.join(figures['missing'])}")
    because = f" ({'; '.join(parts)})" if parts else ""
    lines = [f"Verdict: {figures['verdict']}{because}. The rule: {figures['rule']}."]
    if figures["within"]:
        lines.append(_within(figures))
    lines.append(_across(figures))
    if figures["random_features"]:
        lines.append(_by_chance(figures))
    lines.append(_beside(figures))
    return lines


def _within(figures: dict[str, Any]) -> str:
    own = figures["scores"][SCORE]["within"]
    inside = figures["within"]
    given = ", ".join(inside["covariates"]) or "nothing, for the answers differ by none of these"
    return (
        f"R orders {formatted(own['auroc'], '.3f')} of the pairs of a right and a wrong answer to "
        f"the same question, each of {inside['questions']} validation questions counting once, as "
        f"in GRPO. Its rank correlation within questions is {formatted(own['rho'], '.3f')}, where "
        f"{_number(own['cap'], '.3f')} is the most that can be (labels permuted within questions: "
        f"p = {_number(own['p'], '.2g')}); given {given} it is "
        f"{formatted(own['rho_given_length'], '.3f')}."
    )


def _across(figures: dict[str, Any]) -> str:
    own = figures["scores"][SCORE]
    validation = figures["validation"]
    return (
        f"Across questions, as the reference has it, R's AUROC is {formatted(own['auroc'], '.3f')} "
        f"on {validation['answers']} validation answers, {validation['right']} of them right. Its "
        f"rank correlation is {formatted(own['rho'], '.3f')}, where "
        f"{_number(figures['cap'], '.3f')} is the most that can be (p = "
        f"{_number(own['p'], '.2g')}); given length it is "
        f"{formatted(own['rho_given_length'], '.3f')}."
    )


def _by_chance(figures: dict[str, Any]) -> str:
    chance = figures["random_features"]
    low, high = chance["interval"]
    where = "Within" if figures["within"] else "Across"
    return (
        f"{where} questions, as many random features with the signs that they have on discovery "
        f"have an AUROC of {chance['median']:.3f}, 95 % of them {low:.3f} to {high:.3f} (p = "
        f"{chance['p']:.2g})."
    )


def _beside(figures: dict[str, Any]) -> str:
    every = figures["scores"]
    own = _auroc(every[SCORE])["value"]
    better = []
    for name, score in every.items():
        if name != SCORE and _auroc(score)["value"] >= own:
            better.append(name)
    if better:
        return f"At least as good as R: {', '.join(better)}."
    return "None of the baselines is as good as R."


def _auroc(score: dict[str, Any]) -> dict[str, Any]:
    """Within questions where that is known."""
    return dict((score["within"] or score)["auroc"])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def tables(figures: dict[str, Any]) -> list[Table]:
    """The scores, the split of the questions, and the features that were chosen."""
    header = ("score", "AUROC", "rho", "rho given length", "p", "R's AUROC less its own")
    every = figures["scores"]
    drawn = []
    if inside := figures["within"]:
        caption = f"Within {inside['questions']} validation questions"
        rows = [_score_row(name, score["within"]) for name, score in every.items()]
        drawn.append(Table(caption, header, rows))
    cap = _number(figures["cap"], ".3f")
    rows = [_score_row(name, score) for name, score in every.items()]
    drawn.append(Table(f"Across validation questions; rho is at most {cap} for R", header, rows))
    sides = []
    for side in ("discovery", "validation"):
        counts = [f"{figures[side][key]:,}" for key in ("questions", "answers", "right")]
        sides.append((side, *counts))
    chosen = []
    for sign in ("helpful", "harmful"):
        for feature in figures[sign]:
            chosen.append((sign, str(feature["feature"]), f"{feature['g']:.2f}"))
    return [
        *drawn,
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
        _number(score["p"], ".2g"),
        behind,
    )


def picture(figures: dict[str, Any]) -> Picture:
    """AUROC of every score and of random features, with intervals; the verdict's."""
    points = {name: _auroc(score) for name, score in figures["scores"].items()}
    if chance := figures["random_features"]:
        points["random features"] = figure(chance["median"], chance["interval"])
    where = "within" if figures["within"] else "across"
    with mpl.rc_context(STYLE):
        drawing, axes = empty("AUROC", "")
        for height, point in enumerate(points.values()):
            axes.plot(point["interval"], [height, height], color=_BLUE, linewidth=1.5)
            axes.plot(point["value"], height, "o", color=_BLUE, markersize=4)
        axes.axvline(0.5, color="#6b7280", linewidth=1)
        axes.set_yticks(range(len(points)), list(points))
        axes.invert_yaxis()
        caption = f"AUROC {where} the validation questions, with 95 % intervals"
        return Picture(caption, svg(drawing))
