"""The logit lens in sentences, tables and pictures."""

from __future__ import annotations

import math
from typing import Any

from residual_saes.analyze.drawing import Line, bands
from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.stats import formatted, resampled
from residual_saes.analyze.token_classes import CLASSES, REST, SCRIPTS


def summary(figures: dict[str, Any]) -> list[str]:
    """The verdict on commitment beside its null, then how good the lens is by layer."""
    commitment = figures["commitment"]
    name = commitment["class"]
    null = commitment["shuffled"]
    layers = figures["layers"]
    first = layers[0]
    last = layers[-1]
    if math.isnan(commitment["mean_layer"]["value"]):
        when = f"No position commits to {name}"
    else:
        when = (
            f"Positions that commit to {name} do so at layer "
            f"{formatted(commitment['mean_layer'], '.1f')} on average, with the unembedding's rows "
            f"in random order at {formatted(null['mean_layer'], '.1f')}; the last layer is "
            f"{last['layer']}"
        )
    disagreeing = [row["layer"] for row in layers if row["agrees"]["value"] < 0.5]
    return [
        f"{when}. {formatted(commitment['never'], '.1%')} of {figures['positions']:,} positions of "
        f"{figures['prompts']} prompts never do, with random rows "
        f"{formatted(null['never'], '.1%')}; {name} is {figures['next_token_share'][name]:.1%} of "
        f"what follows. {resampled(figures['prompts'], 'prompt')} The null's are over "
        f"{figures['orders']} orders.",
        f"From layer {max(disagreeing, default=-1) + 1} on the lens' top token is the model's own "
        f"at half of the positions or more. Its cross entropy falls from "
        f"{formatted(first['ce'], '.2f')} nats behind layer 0 to {formatted(last['ce'], '.2f')} "
        f"behind the last, where random rows have {formatted(last['shuffled']['ce'], '.2f')}.",
    ]


def tables(figures: dict[str, Any]) -> list[Table]:
    mass = "Mean mass of each script by layers, and below it with the unembedding's rows shuffled"
    top = "Share of positions whose top token is of the script, likewise"
    return [
        _layers(figures),
        _bands(figures, "mass", mass),
        _bands(figures, "top", top),
        _classes(figures),
        _commitment(figures["commitment"]),
    ]


def _layers(figures: dict[str, Any]) -> Table:
    header = (
        "layer",
        "most frequent top tokens",
        *CLASSES,
        "CE (nats)",
        "KL to the last (nats)",
        "rank",
        "agrees",
    )
    rows = []
    for row in figures["layers"]:
        top = [f"`{token['text']}` {token['share']:.0%}" for token in row["top"]]
        rows.append(
            (
                str(row["layer"]),
                ", ".join(top),
                *(formatted(row[name], ".1%") for name in CLASSES),
                formatted(row["ce"], ".2f"),
                formatted(row["kl"], ".2f"),
                formatted(row["rank"], ".1f"),
                formatted(row["agrees"], ".1%"),
            )
        )
    caption = "Mean of the lens over positions, by layer; rank is of the model's own top token"
    return Table(caption, header, rows)


def _bands(figures: dict[str, Any], kind: str, caption: str) -> Table:
    """A figure of every script by band, each band with its null below it."""
    names = {name: name for name in ("english", *SCRIPTS, "digit", "code")}
    names[REST] = "other scripts"
    rows = []
    for band in figures["bands"]:
        layers = f"{band['first']} to {band['last']}"
        for label, values in ((layers, band[kind]), ("random rows", band[f"{kind}_shuffled"])):
            rows.append((label, *(formatted(values[name], ".1%") for name in names)))
    return Table(caption, ("layers", *names.values()), rows)


def _classes(figures: dict[str, Any]) -> Table:
    header = (
        "class",
        "of the vocabulary",
        "of the tokens that follow",
        "mass",
        "mass, random rows",
    )
    last = figures["layers"][-1]
    rows = []
    for name in (*CLASSES, *SCRIPTS):
        rows.append(
            (
                name,
                f"{figures['vocabulary_share'][name]:.1%}",
                f"{figures['next_token_share'][name]:.1%}",
                formatted(last[name], ".1%"),
                formatted(last["shuffled"][name], ".1%"),
            )
        )
    return Table("Classes of text behind the last layer", header, rows)


def _commitment(commitment: dict[str, Any]) -> Table:
    null = commitment["shuffled"]
    rows = [
        (
            "layer, mean over positions that commit",
            formatted(commitment["mean_layer"], ".1f"),
            formatted(null["mean_layer"], ".1f"),
        ),
        (
            "layer, median over prompts of their medians",
            formatted(commitment["median_layer"], ".1f"),
            "",
        ),
        (
            "positions that never commit",
            formatted(commitment["never"], ".1%"),
            formatted(null["never"], ".1%"),
        ),
    ]
    return Table(f"Commitment to {commitment['class']}", ("", "", "random rows"), rows)


def pictures(figures: dict[str, Any]) -> dict[str, Picture]:
    """By file name: masses and losses by layer."""
    layers = figures["layers"]
    target = figures["commitment"]["class"]
    x = [row["layer"] for row in layers]

    def line(name: str) -> Line:
        values = [row[name]["value"] for row in layers]
        return Line(x, values, [row[name]["interval"] for row in layers])

    def null(name: str) -> Line:
        return Line(x, [row["shuffled"][name]["value"] for row in layers])

    masses = {name: line(name) for name in CLASSES}
    masses[f"{target}, random rows"] = null(target)
    losses = {"CE": line("ce"), "KL to the last": line("kl"), "CE, random rows": null("ce")}
    return {
        "logit_lens_mass": Picture(
            "Mass of each class of text by layer", bands(masses, "layer", "mass")
        ),
        "logit_lens_loss": Picture("Cross entropy and KL by layer", bands(losses, "layer", "nats")),
    }
