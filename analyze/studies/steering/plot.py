"""Accuracy on the test questions against the scale of v."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.studies.steering.outcomes import Findings

_GREY = "#9ca3af"


def over_scales(findings: Findings) -> str:
    """v as a line with its intervals; other directions as points beside it, unsteered dashed."""
    line = sorted(findings.of("scale 0", "v"), key=lambda row: row.scale)
    points = [(row.scale, row.accuracy, *row.interval) for row in line]
    scales, shares, low, high = np.array(points).T
    with mpl.rc_context(STYLE):
        figure, axes = empty("scale of the unit vector", "share of right answers")
        axes.errorbar(
            scales,
            shares,
            [shares - low, high - shares],
            marker="o",
            markersize=4,
            linewidth=1.5,
            capsize=3,
            label="v",
        )
        beside = 0.02 * (scales[-1] - scales[0])  # of the interval, which would hide the points
        others = (
            ("random", "o", "by chance", -beside),
            ("shuffled", "x", "shuffled labels", beside),
        )
        for kind, marker, label, shift in others:
            rows = findings.of(kind)
            x = [row.scale + shift for row in rows]
            y = [row.accuracy for row in rows]
            axes.plot(x, y, marker, color=_GREY, markersize=4, label=label)
        axes.axhline(findings.unsteered.accuracy, color="#6b7280", linestyle="--", linewidth=1)
        axes.legend(frameon=False)
        return svg(figure)
