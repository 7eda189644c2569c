"""Which latents predict which, in sentences and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from residual_saes.analyze.outcome import Table
from residual_saes.analyze.stats import bracketed, formatted, resampled

COLUMNS = ("r", "given_partner", "given_latent", "lift", "q")  # of the table of pairs


def summary(figures: Mapping[str, Any]) -> list[str]:
    null = figures["null"]
    judged = figures["judged"]
    lines = [
        f"{_share(figures)} of the {judged:,} judged latents of {figures['to']} are predicted by "
        f"latents of {figures['run']}; with the run's firing turned around in each document, "
        f"{_share(null)} are.",
        f"The best partner explains half of the variance of "
        f"{formatted(figures['best_explains_half'], '.1%')} of them.",
        f"By class: {_classes(figures)}. Turned around: {_classes(null)}.",
        f"The median correlation with the best partner is {_number(figures['median_r'])}, turned "
        f"around {_number(null['median_r'])}. {_directions(figures)}",
        f"{figures['predicting']:,} of the {figures['able']:,} latents of the run that fire often "
        "enough predict one.",
    ]
    lines += [_of_causal(kind, found) for kind, found in figures.get("causal", {}).items()]
    measured = figures["documents"] - figures["documents"] // 2
    lines += [
        f"Rule: {figures['rule']}.",
        f"{figures['rows']:,} rows of {figures['documents']:,} documents, half of them to choose "
        f"partners and half to measure; a latent is judged if it fires in {figures['min_firing']} "
        f"rows of either half. {resampled(measured, 'document')}",
        "To predict is not to cause: latents of one token fire together though neither makes the "
        "other.",
    ]
    return lines


def _share(figures: Mapping[str, Any]) -> str:
    judged = figures["judged"]
    return f"{figures['predicted']:,}" + (
        f" ({figures['predicted'] / judged:.1%})" if judged else ""
    )


def _classes(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in figures["classes"].items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _directions(figures: Mapping[str, Any]) -> str:
    if figures["median_cosine"] is None:
        return "No directions are compared."
    return f"The median cosine of the best pairs that predict is {figures['median_cosine']:.3f}."


def _of_causal(kind: str, found: Mapping[str, Any]) -> str:
    if not found["measured"]:
        return f"Ablation, {kind}: no pair fires in the texts that were read."
    return (
        f"Ablation, {kind}: of {found['measured']} pairs the later latent loses "
        f"{found['median']:.1%} (median) without the earlier one, and "
        f"{found['median_controls']:.1%} without random latents that fire on its rows as often; "
        f"p = {found['p']:.2g} (Wilcoxon)."
    )


def tables(figures: Mapping[str, Any], strongest: list[dict[str, Any]]) -> list[Table]:
    rows = []
    for pair in strongest:
        cosine = "-" if np.isnan(pair["cosine"]) else f"{pair['cosine']:.2f}"
        numbers = [f"{pair[name]:.3g}" for name in COLUMNS]
        rows.append((str(pair["partner"]), str(pair["feature"]), pair["class"], cosine, *numbers))
    header = ("earlier", "later", "class", "cosine", "r", "P(l | e)", "P(e | l)", "lift", "q")
    caption = (
        "Latents of the run (earlier) and the latents of study.to= (later) that they explain best: "
        "figures of the documents that did not choose them."
    )
    found = [Table(caption, header, rows)] if rows else []
    drops = []
    for kind, causal in figures.get("causal", {}).items():
        for pair in causal["pairs"]:
            if pair["drop"]:
                others = ", ".join(f"{value:.1%}" for value in pair["controls"]) or "-"
                drop = f"{pair['drop']['value']:.1%} {bracketed(pair['drop']['interval'], '.1%')}"
                drops.append((kind, str(pair["partner"]), str(pair["feature"]), drop, others))
    if drops:
        ablated = ("pairs of", "ablated", "later", "it loses", "by random latents")
        found.append(Table("What later latents lose by ablation.", ablated, drops))
    return found
