"""A picture of the arms: one figure against another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.studies.synth.baselines import ORACLE

_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#be185d", "#4d7c0f")
_GREY = "#6b7280"


def against(figures: Mapping[str, Any], x: str, y: str, x_label: str, y_label: str) -> str:
    """Arms of an objective in one colour, joined in the order of k, and the oracle."""
    arms = figures["arms"]
    lines: dict[str, list[str]] = {}
    for name in figures["compared"]:
        lines.setdefault(name.split(" k ")[0], []).append(name)
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        for (objective, names), colour in zip(lines.items(), _COLOURS, strict=False):
            xs, ys, sizes = [], [], []
            for place, name in enumerate(names, 1):
                across, up = arms[name][x], arms[name][y]
                xs.append(across["mean"])
                ys.append(up["mean"])
                sizes.append(12 * place)
                _cross(axes, across, up, colour)
            axes.plot(xs, ys, color=colour, linewidth=1, label=objective)
            axes.scatter(xs, ys, s=sizes, color=colour)
        at = arms[ORACLE][x]["mean"], arms[ORACLE][y]["mean"]
        axes.plot(*at, "x", color=_GREY, markersize=6, linestyle="", label=ORACLE)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)


def _cross(axes: Any, x: Mapping[str, Any], y: Mapping[str, Any], colour: str) -> None:
    """Lines from the least to the most of the worlds."""
    axes.hlines(y["mean"], min(x["by_seed"]), max(x["by_seed"]), color=colour, linewidth=0.8)
    axes.vlines(x["mean"], min(y["by_seed"]), max(y["by_seed"]), color=colour, linewidth=0.8)
