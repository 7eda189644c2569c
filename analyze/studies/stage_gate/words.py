"""What the stage gate says: verdict, tables and picture, from the figures of `judgement.judge`."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.stats import figure, formatted
from residual_saes.analyze.studies.stage_gate.best_of import ORACLE

SCORE = "R"
LENGTH = "length"
LOG_PROBABILITY = "mean log-probability"
RANDOM_LATENTS = "random latents"
NO_CHANCE = (
    "There are no random latents beside R: too few others fire in the discovery answers, or none "
    "was chosen."
)
_HEADER = ("score", "AUROC", "rho", "rho given length", "p", "R's AUROC less its own")
_BLUE = "#2563eb"


def summary(figures: dict[str, Any]) -> list[str]:
    """The verdict with its rule, then R beside its bounds and its baselines."""
    lines = [verdict(figures)]
    if figures["within"]:
        lines.append(within(figures))
    lines.append(_across(figures))
    lines.append(_by_chance(figures))
    lines.append(beside(figures))
    lines.append(picked(figures))
    return lines


def verdict(figures: dict[str, Any]) -> str:
    """The verdict with its rule, and what keeps it from a pass."""
    parts = list(figures["notes"])
    if figures["missing"]:
        parts.append(f"does not hold: {'; '.join(figures['missing'])}")
    because = f" ({'; '.join(parts)})" if parts else ""
    return f"Verdict: {figures['verdict']}{because}. The rule: {figures['rule']}."


def within(figures: dict[str, Any]) -> str:
    """R's figures within questions."""
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
    if not figures["random_latents"]:
        return NO_CHANCE
    chance = figures["random_latents"]["auroc"]
    low, high = chance["interval"]
    where = "Within" if figures["within"] else "Across"
    return (
        f"{where} questions, as many random latents of equal density, with the signs that they "
        f"have on discovery, have an AUROC of {chance['median']:.3f}, 95% of the sets {low:.3f} "
        f"to {high:.3f} (p = {chance['p']:.2g})."
    )


def picked(figures: dict[str, Any]) -> str:
    """What the answers are worth that R picks among all to a question."""
    best = figures["best_of"]

    def accuracy(name: str) -> str:
        return formatted(best["accuracy"][name][-1], ".3f")

    compared = []
    for other, points in best["ahead"][SCORE].items():
        ahead = formatted(points[-1], "+.3f")
        compared.append(f"{other} {accuracy(other)} (R {ahead}, p = {points[-1]['p']:.2g})")
    chance = ""
    if figures["random_latents"]:
        own = figures["random_latents"]["accuracy"][-1]
        low, high = own["interval"]
        chance = (
            f" The picks of random latents are right in {own['median']:.3f}, of 95% of the sets "
            f"in {low:.3f} to {high:.3f} (p = {own['p']:.2g})."
        )
    return (
        f"Best of {best['n'][-1]}: of {best['questions']} validation questions the answer of the "
        f"highest R is right in {accuracy(SCORE)}. Beside it: {'; '.join(compared)}. A right "
        f"answer is among them in {accuracy(ORACLE)}.{chance}"
    )


def beside(figures: dict[str, Any]) -> str:
    """Which baselines order answers as well as R."""
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
    cap = _number(figures["cap"], ".3f")
    rows = [_score_row(name, score) for name, score in figures["scores"].items()]
    across = Table(f"Across validation questions; rho is at most {cap} for R", _HEADER, rows)
    return [*tables_within(figures), across, *tables_of_choice(figures)]


def tables_within(figures: dict[str, Any]) -> list[Table]:
    """The scores within questions, if anything is known there."""
    if not (inside := figures["within"]):
        return []
    caption = f"Within {inside['questions']} validation questions"
    rows = [_score_row(name, score["within"]) for name, score in figures["scores"].items()]
    return [Table(caption, _HEADER, rows)]


def tables_of_choice(figures: dict[str, Any]) -> list[Table]:
    """The split of the questions, and the features that were chosen."""
    sides = []
    for side in ("discovery", "validation"):
        counts = [f"{figures[side][key]:,}" for key in ("questions", "answers", "right")]
        sides.append((side, *counts))
    chosen = []
    for sign in ("helpful", "harmful"):
        for feature in figures[sign]:
            chosen.append((sign, str(feature["feature"]), f"{feature['g']:.2f}"))
    return [
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


def auroc_picture(figures: dict[str, Any]) -> Picture:
    """AUROC of every score and of random latents, with intervals; the verdict's."""
    points = {name: _auroc(score) for name, score in figures["scores"].items()}
    if chance := figures["random_latents"]:
        own = chance["auroc"]
        points[RANDOM_LATENTS] = figure(own["median"], own["interval"])
    where = "within" if figures["within"] else "across"
    with mpl.rc_context(STYLE):
        drawing, axes = empty("AUROC", "")
        for height, point in enumerate(points.values()):
            axes.plot(point["interval"], [height, height], color=_BLUE, linewidth=1.5)
            axes.plot(point["value"], height, "o", color=_BLUE, markersize=4)
        axes.axvline(0.5, color="#6b7280", linewidth=1)
        axes.set_yticks(range(len(points)), list(points))
        axes.invert_yaxis()
        caption = f"AUROC {where} the validation questions, with 95% intervals"
        return Picture(caption, svg(drawing))
