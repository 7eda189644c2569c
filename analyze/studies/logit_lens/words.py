"""What the logit lens' figures say: sentences, tables and pictures."""

from __future__ import annotations

import math
from typing import Any

from analyze.drawing import Line, bands
from analyze.outcome import Picture, Table
from analyze.stats import formatted
from analyze.studies.logit_lens.token_classes import CLASSES


def summary(figures: dict[str, Any]) -> list[str]:
    """The verdict on commitment beside its null, then what the lens is worth at all."""
    found = figures["commitment"]
    name, null, layers = found["class"], found["shuffled"], figures["layers"]
    if math.isnan(found["mean_layer"]["value"]):
        when = f"No position commits to {name}"
    else:
        when = (
            f"Positions that commit to {name} do so at layer {formatted(found['mean_layer'], '.1f')} on average, with the "
            f"unembedding's rows in random order at {formatted(null['mean_layer'], '.1f')}; the last layer is "
            f"{layers[-1]['layer']}"
        )
    low = [row["layer"] for row in layers if row["agrees"]["value"] < 0.5]
    return [
        f"{when}. {formatted(found['never'], '.1%')} of {figures['positions']:,} positions of {figures['prompts']} prompts "
        f"never do, with random rows {formatted(null['never'], '.1%')}; {name} is {figures['next_token_share'][name]:.1%} "
        f"of what follows. Brackets are 95 % intervals over prompts, the null's over {figures['orders']} orders.",
        f"From layer {max(low, default=-1) + 1} on the lens' top token is the model's own at half of the positions or "
        f"more. Its cross entropy falls from {formatted(layers[0]['ce'], '.2f')} nats behind layer 0 to "
        f"{formatted(layers[-1]['ce'], '.2f')} behind the last, where random rows have "
        f"{formatted(layers[-1]['shuffled']['ce'], '.2f')}.",
    ]


def tables(figures: dict[str, Any]) -> list[Table]:
    header = (
        "layer",
        "most frequent top tokens",
        *CLASSES,
        "CE (nats)",
        "KL to the last (nats)",
        "rank",
        "agrees",
    )
    rows = [
        (
            str(row["layer"]),
            ", ".join(f"`{one['text']}` {one['share']:.0%}" for one in row["top"]),
            *(formatted(row[name], ".1%") for name in CLASSES),
            formatted(row["ce"], ".2f"),
            formatted(row["kl"], ".2f"),
            formatted(row["rank"], ".1f"),
            formatted(row["agrees"], ".1%"),
        )
        for row in figures["layers"]
    ]
    last = figures["layers"][-1]
    masses = [
        (
            name,
            f"{figures['vocabulary_share'][name]:.1%}",
            f"{figures['next_token_share'][name]:.1%}",
            formatted(last[name], ".1%"),
            formatted(last["shuffled"][name], ".1%"),
        )
        for name in CLASSES
    ]
    found, null = figures["commitment"], figures["commitment"]["shuffled"]
    committed = [
        (
            "layer, mean over positions that commit",
            formatted(found["mean_layer"], ".1f"),
            formatted(null["mean_layer"], ".1f"),
        ),
        (
            "layer, median over prompts of their medians",
            formatted(found["median_layer"], ".1f"),
            "",
        ),
        (
            "positions that never commit",
            formatted(found["never"], ".1%"),
            formatted(null["never"], ".1%"),
        ),
    ]
    return [
        Table(
            "Mean of the lens over positions, by layer; rank is of the model's own top token",
            header,
            rows,
        ),
        Table(
            "Classes of text behind the last layer",
            (
                "class",
                "of the vocabulary",
                "of the tokens that follow",
                "mass",
                "mass, random rows",
            ),
            masses,
        ),
        Table(f"Commitment to {found['class']}", ("", "", "random rows"), committed),
    ]


def pictures(figures: dict[str, Any]) -> dict[str, Picture]:
    """By file name: masses, losses and commitment by layer."""
    layers, found = figures["layers"], figures["commitment"]
    x = [row["layer"] for row in layers]

    def line(name: str) -> Line:
        return Line(
            x, [row[name]["value"] for row in layers], [row[name]["interval"] for row in layers]
        )

    null = Line(x, [row["shuffled"][found["class"]]["value"] for row in layers])
    masses = {**{name: line(name) for name in CLASSES}, f"{found['class']}, random rows": null}
    losses = {"CE": line("ce"), "KL to the last": line("kl")}
    losses["CE, random rows"] = Line(x, [row["shuffled"]["ce"]["value"] for row in layers])
    return {
        "logit_lens_mass": Picture(
            "Mass of each class of text by layer", bands(masses, "layer", "mass")
        ),
        "logit_lens_loss": Picture("Cross entropy and KL by layer", bands(losses, "layer", "nats")),
    }
