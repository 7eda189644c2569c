"""Pictures for the report, as SVG text: the same figures give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from analyze.stats import Interval
from data import durable

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
    """Lines by name, each of (x, y) points."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        for name, points in series.items():
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(
                xs,
                ys,
                label=name,
                linewidth=1.5,
                marker="o" if len(points) < 20 else None,
                markersize=4,
            )
        if log:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if len(series) > 1:
            axes.legend(frameon=False)
        return svg(figure)


def histogram(counts: Sequence[float], edges: Sequence[float], x_label: str, y_label: str) -> str:
    """Bars of a histogram that has been counted already."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        axes.stairs(counts, edges, fill=True, color=_COLOURS[0], alpha=0.8)
        return svg(figure)


def bars(names: Sequence[str], values: Sequence[float], x_label: str, y_label: str) -> str:
    """One bar per name. The axis starts at the foot of the lowest bar's tenth, not at 0, when all
    are high.
    """
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, y_label)
        axes.bar(names, values, color=_COLOURS[0], alpha=0.8)
        low = min(values)
        axes.set_ylim(
            int(low * 10) / 10 if low > 0.2 else min(0.0, low), 1.0 if max(values) <= 1 else None
        )
        axes.tick_params(axis="x", labelrotation=45)
        return svg(figure)


def empty(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def svg(figure: Figure) -> str:
    text = io.StringIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None, "Type": None, "Format": None}
    figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return _own_ids(text.getvalue()[text.getvalue().index("<svg") :])


def _own_ids(text: str) -> str:
    """The picture with ids that no different one has, for a page of many; those that nothing refers
    to go.
    """
    own = durable.digest(text.encode())[:8]
    used = set(re.findall(r"#([\w.-]+)", text))

    def renamed(found: re.Match[str]) -> str:
        return f' id="{own}-{found[1]}"' if found[1] in used else ""

    def of_tag(tag: re.Match[str]) -> str:
        return re.sub(
            r'(href="#|url\(#)', rf"\g<1>{own}-", re.sub(r' id="([^"]*)"', renamed, tag[0])
        )

    return re.sub(r"<[^>]*>", of_tag, text)  # labels are left as they are


class Line(NamedTuple):
    """Points from left to right."""

    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[Interval] | None = (
        None  # a band around the line; None: a dashed line, as for a null
    )


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
    names: Sequence[str], values: Sequence[float], intervals: Sequence[Interval], x_label: str
) -> str:
    """One bar per name, from the top down, with its interval."""
    with mpl.rc_context(STYLE):
        figure, axes = empty(x_label, "")
        figure.set_size_inches(5.2, 0.6 + 0.28 * len(names))
        low, high = np.array(intervals, np.float64).T
        error = np.maximum([np.subtract(values, low), np.subtract(high, values)], 0)
        axes.barh(
            names,
            values,
            xerr=error,
            alpha=0.8,
            height=0.6,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        return svg(figure)
