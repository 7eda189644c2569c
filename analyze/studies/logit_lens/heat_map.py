"""A picture of the logit lens by layer and token: a colour and a word in each cell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from residual_saes.analyze.drawing import STYLE, svg

_LETTERS = 9  # of a word that fit into a cell; the rest is cut


def heat_map(
    colour: ArrayLike,
    words: Sequence[Sequence[str]],
    columns: Sequence[str],
    x_label: str,
    y_label: str,
    label: str,
) -> str:
    """Coloured cells, each with its word; row 0 is the lowest.

    Args:
        colour: (rows, columns) between 0 and 1.
        words: likewise.
        label: what the colour stands for.
    """
    values = np.asarray(colour, np.float64)
    rows, width = values.shape
    style: Any = {**STYLE, "text.parse_math": False, "axes.grid": False}  # words are no TeX
    with mpl.rc_context(style), warnings.catch_warnings():
        # A letter that matplotlib's font lacks is drawn by the browser's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(1.6 + 0.52 * width, 1.0 + 0.2 * rows), layout="constrained")
        axes = figure.subplots()
        drawn = axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=1)
        for row in range(rows):
            for column in range(width):
                dark = values[row, column] > 0.6
                word = _cut(words[row][column])
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    word,
                    ha="center",
                    va="center",
                    size=6.5,
                    color="white" if dark else "k",
                )
        axes.set_xticks(np.arange(width) + 0.5, map(_cut, columns), rotation=60, ha="right", size=7)
        axes.set_yticks(np.arange(rows) + 0.5, map(str, range(rows)), size=7)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.colorbar(drawn, ax=axes, label=label, fraction=0.04, pad=0.01)
        return svg(figure)


def _cut(word: str) -> str:
    if not word.strip():
        return "␣" * len(word)
    return word if len(word) <= _LETTERS else word[: _LETTERS - 1] + "…"
