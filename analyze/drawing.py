"""Pictures for the report, as SVG text: the same figures give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from residual_saes.analyze.stats import Interval
from residual_saes.data.neutral import neutral

_FEW = 20  # points of a line that get marks
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=_COLOURS),
}


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
) -> str:
    """Lines by name, each of (x, y) points; few points get marks."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        for name, points in series.items():
            x = [point[0] for point in points]
            y = [point[1] for point in points]
            marker = "o" if len(points) < _FEW else None
            axes.plot(x, y, label=name, linewidth=1.5, marker=marker, markersize=4)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if len(series) > 1:
            axes.legend(frameon=False)
        return svg(figure)


def histogram(counts: Sequence[float], edges: Sequence[float], x_label: str, y_label: str) -> str:
    """Bars of a histogram from its counts."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        axes.stairs(counts, edges, fill=True, color=_COLOURS[0], alpha=0.8)
        return svg(figure)


def bars(names: Sequence[str], values: Sequence[float], x_label: str, y_label: str) -> str:
    """One bar per name. If all values are above 0.2, the axis starts at a tenth below them."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        axes.bar(names, values, color=_COLOURS[0], alpha=0.8)
        low = min(values)
        bottom = int(low * 10) / 10 if low > 0.2 else min(0.0, low)
        top = 1.0 if max(values) <= 1 else None
        axes.set_ylim(bottom, top)
        axes.tick_params(axis="x", labelrotation=45)
        return svg(figure)


def empty(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure with empty axes, as large as the report shows it."""
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as the SVG element alone, without date and creator."""
    file = io.StringIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None, "Type": None, "Format": None}
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    # XML has no place for controls, and labels may hold them.
    return "\n".join(map(neutral, text[text.index("<svg") :].split("\n")))


class Line(NamedTuple):
    """Points from left to right."""

    x: Sequence[float]
    y: Sequence[float]
    # A band around the line, where there is one. None: a dashed line, as for a null.
    intervals: Sequence[Interval | None] | None = None


def _ends(intervals: Sequence[Sequence[float] | None]) -> NDArray[np.float64]:
    """(2, n) low and high ends; NaN, which draws nothing, where there is no interval."""
    ends = [(np.nan, np.nan) if interval is None else interval for interval in intervals]
    return np.array(ends, np.float64).T


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
                low, high = _ends(line.intervals)
                axes.fill_between(
                    line.x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0
                )
        if log:
            axes.set_xscale("log", base=2)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) > 1:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)


def whiskers(
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[Interval | None],
    x_label: str,
) -> str:
    """One bar per name, from the top down, with its interval, if it has one."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, "")
        figure.set_size_inches(5.2, 0.6 + 0.28 * len(names))
        low, high = _ends(intervals)
        error = np.maximum([np.subtract(values, low), np.subtract(high, values)], 0)
        whisker = {"elinewidth": 1, "capsize": 2}
        axes.barh(names, values, xerr=error, alpha=0.8, height=0.6, error_kw=whisker)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        return svg(figure)
