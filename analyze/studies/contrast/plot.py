"""How far apart right and wrong answers are, layer by layer, beside shuffled labels."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.stats import Floats


def over_layers(observed: Floats, null: Floats, label: str) -> str:
    """A line over layers, in each layer's null, below 95 % of the null's maximum over layers.

    Args:
        observed: (layers,).
        null: (layers, L) of shuffled labels, the same permutations at every layer.
        label: of the vertical axis.
    """
    layers = np.arange(len(observed))
    low, high = np.quantile(null, [0.5, 0.95], axis=1)
    joint = float(np.quantile(null.max(0), 0.95))
    peak = int(np.argmax(observed))
    with mpl.rc_context(STYLE):
        figure, axes = empty("layer", label)
        axes.fill_between(
            layers, low, high, color="0.8", linewidth=0, label="shuffled labels, median to 95%"
        )
        axes.axhline(
            joint,
            color="0.4",
            linestyle="--",
            linewidth=1,
            label="95% of their maximum over layers",
        )
        axes.plot(
            layers, observed, linewidth=1.5, marker="o", markersize=3, label="right against wrong"
        )
        axes.annotate(
            f"layer {peak}", (peak, observed[peak]), (0, 5), textcoords="offset points", ha="center"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1.35 * max(joint, float(observed.max())))  # room for the legend
        axes.legend(frameon=False, fontsize=8)
        return svg(figure)
