"""Figures with their 95 % intervals, as text and as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from analyze.pictures import STYLE, empty, svg
from analyze.stats import Interval


def said(figure: Mapping[str, Any], form: str) -> str:
    """The value of {value, interval} with its interval in brackets; a dash if it is not defined.

    Args:
        form: of each number, as in a format string.
    """
    if math.isnan(figure["value"]):
        return "-"
    low, high = figure["interval"]
    return f"{figure['value']:{form}} [{low:{form}}, {high:{form}}]"


class Line(NamedTuple):
    """Points from left to right."""

    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[Interval] | None = None  # a band around the line; None: a dashed line, as for a null


def bands(lines: Mapping[str, Line], x_label: str, y_label: str, *, log: bool = False) -> str:
    """Lines by name in their bands.

    Args:
        log: along x, to the base 2.
    """
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        for name, line in lines.items():
            style = "-" if line.intervals else "--"
            (drawn,) = axes.plot(line.x, line.y, style, label=name, linewidth=1.5)
            if line.intervals:
                low, high = zip(*line.intervals, strict=True)
                axes.fill_between(line.x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        if log:
            axes.set_xscale("log", base=2)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) > 1:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)


def whiskers(names: Sequence[str], values: Sequence[float], intervals: Sequence[Interval], x_label: str) -> str:
    """One bar per name, from the top down, with its interval."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, "")
        figure.set_size_inches(5.2, 0.6 + 0.28 * len(names))
        low, high = np.array(intervals, np.float64).T
        error = np.maximum([np.subtract(values, low), np.subtract(high, values)], 0)
        axes.barh(names, values, xerr=error, alpha=0.8, height=0.6, error_kw={"elinewidth": 1, "capsize": 2})
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        return svg(figure)
