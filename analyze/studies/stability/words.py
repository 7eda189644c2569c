"""Stability in sentences, a table and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze import drawing
from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.stats import bracketed, resampled

LEVELS = (0.7, 0.9)  # of correlation and cosine; the first one is quoted
_NAMES = {"other": "other run", "random": "random dictionary", "shifted": "rows shifted"}


def summary(figures: dict[str, Any]) -> list[str]:
    level = str(LEVELS[0])
    matched = figures["matched"]
    other = matched["other"]
    random = matched["random"]
    shifted = matched["shifted"]
    share = {name: match["above"][level]["share"] for name, match in matched.items()}
    share_95 = bracketed(other["above"][level]["share_95"], ".1%")
    mean_95 = bracketed(other["correlation_95"], ".3f")
    cosine = figures["cosine"]["other"]["mean_max_cosine"]
    random_cosine = figures["cosine"]["random"]["mean_max_cosine"]
    measured = figures["documents"] - figures["documents"] // 2
    lines = [
        f"{share['other']:.1%} {share_95} of the {figures['alive']:,} latents have a "
        f"partner in {figures['other']} with a correlation of {level} or more; in a random "
        f"dictionary {share['random']:.1%} have, and with the other's rows shifted "
        f"{share['shifted']:.1%}.",
        "Mean correlation with the partner "
        f"{other['correlation']:.3f} {mean_95}, random dictionary "
        f"{random['correlation']:.3f}, shifted {shifted['correlation']:.3f}; on the documents on "
        f"which partners were chosen it is {other['correlation_where_chosen']:.3f}.",
        f"Mean of the largest decoder cosines {cosine:.3f}, of random directions with the same "
        f"second moments {random_cosine:.3f}.",
        f"Each is the other's best for {other['mutual']:.1%} of latents ({random['mutual']:.1%} in "
        f"a random dictionary). {_one_to_one(figures['assigned'])}",
        f"{figures['rows']:,} rows of {figures['documents']:,} documents, half of them to choose "
        f"partners and half to measure. {resampled(measured, 'document')} Latents that are silent "
        "in a half are left out.",
    ]
    ours, theirs = figures["layers"]
    if ours != theirs:
        names = f"layers {ours} and {theirs}"
        if not (isinstance(ours, int) and isinstance(theirs, int)):
            names = f"{ours}, and of {theirs}"
        lines.append(f"The two are of {names}, on the same tokens.")
    return lines


def _one_to_one(assigned: dict[str, Any] | None) -> str:
    if assigned is None:
        return "There are too many latents for a one-to-one assignment."
    interval = bracketed(assigned["correlation_95"], ".3f")
    return f"One to one, the mean correlation is {assigned['correlation']:.3f} {interval}."


def tables(figures: dict[str, Any]) -> list[Table]:
    rows = []
    for decile in figures["by_density"]:
        rows.append(
            (
                f"{decile['from']:.2e} to {decile['to']:.2e}",
                f"{decile['latents']:,}",
                f"{decile['correlation']:.3f}",
                f"{decile['above_0.7']:.1%}",
                f"{decile['max_cosine']:.3f}",
            )
        )
    header = ("density", "latents", "correlation", "0.7 or more", "largest cosine")
    return [Table("Stability by tenths of the ranking by density.", header, rows)]


def pictures(
    correlations: Mapping[str, NDArray[np.float64]], by_density: Sequence[Mapping[str, float]]
) -> dict[str, Picture]:
    """How many partners correlate how much, and stability by density.

    Args:
        correlations: with the partners, of latents that are alive: by name of the dictionary.
    """
    shares = {}
    for name, label in _NAMES.items():
        points = []
        for level in np.linspace(0, 1, 101):
            points.append((float(level), float((correlations[name] >= level).mean())))
        shares[label] = points
    density = {_NAMES["other"]: [(row["to"], row["correlation"]) for row in by_density]}
    return {
        "partners": Picture(
            "Share of latents whose partner correlates at least so much, on documents on which it "
            "was not chosen",
            drawing.curves(shares, "correlation", "share of latents"),
        ),
        "density": Picture(
            "Mean correlation with the partner by tenths of density",
            drawing.curves(density, "density", "correlation", log=True),
        ),
    }
