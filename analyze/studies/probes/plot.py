"""AUROC of probes: over k at what the dictionary reads, and over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from residual_saes.analyze.drawing import STYLE, Line, bands, empty, svg
from residual_saes.analyze.outcome import Picture
from residual_saes.analyze.studies.probes.fitting import (
    DENSE,
    DIMENSIONS,
    LATENTS,
    LENGTH,
    MEANS,
    RANDOM,
    Probing,
)


def pictures(figures: Mapping[str, Any]) -> dict[str, Picture]:
    """Both; that over layers where there are several."""
    caption = f"AUROC of probes of k columns at {figures['own']}, with 95% intervals"
    drawn = {"auroc": Picture(caption, _over_k(figures))}
    known = [(layer, name) for name, layer in figures["layers"].items() if layer is not None]
    if len(known) > 1:
        caption = "AUROC of probes of the residual, by layer, with 95% intervals"
        drawn["layers"] = Picture(caption, _over_layers(figures, dict(sorted(known))))
    return drawn


def _over_k(figures: Mapping[str, Any]) -> str:
    sizes = figures["options"]["k"]
    own = _aurocs(figures, figures["own"])
    most = [figures["null"][str(Probing(LATENTS, k))]["most"] for k in sizes]
    with mpl.rc_context(STYLE):
        figure, axes = empty("k", "AUROC")
        for reads in (LATENTS, DIMENSIONS, RANDOM):
            line = _line(sizes, [own[str(Probing(reads, k))] for k in sizes])
            (drawn,) = axes.plot(line.x, line.y, marker="o", markersize=3, label=reads)
            low, high = np.array(line.intervals, np.float64).T
            axes.fill_between(line.x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axes.axhline(own[DENSE]["value"], color="0.2", linewidth=1.2, label="dense probe")
        axes.axhline(own[LENGTH]["value"], color="0.2", ls=":", linewidth=1.2, label="length")
        axes.plot(sizes, most, color="0.5", ls="--", linewidth=1.2, label="labels permuted, 95%")
        axes.set_xscale("log")
        axes.set_xticks(sizes, list(map(str, sizes)))
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
        return svg(figure)


def _over_layers(figures: Mapping[str, Any], names: Mapping[int, str]) -> str:
    """Of sites by layer, in their order."""
    most = str(Probing(DIMENSIONS, figures["options"]["k"][-1]))
    lines = {}
    for probe, label in ((DENSE, "dense probe"), (MEANS, "means"), (most, most)):
        lines[label] = _line(
            list(names), [_aurocs(figures, site)[probe] for site in names.values()]
        )
    return bands(lines, "layer", "AUROC")


def _aurocs(figures: Mapping[str, Any], site: str) -> dict[str, Any]:
    """By probe of a site."""
    return {record["probe"]: record["auroc"] for record in figures["sites"][site]}


def _line(x: Sequence[int], points: Sequence[Mapping[str, Any]]) -> Line:
    values, intervals = zip(*((one["value"], one["interval"]) for one in points), strict=True)
    return Line(x, values, intervals)
