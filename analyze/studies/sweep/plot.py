"""Pictures of a sweep: figures against the setting that was swept, and curves over training of all
arms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator

from analyze.contexts import visible
from analyze.drawing import STYLE, empty, svg
from analyze.studies.sweep.arms import SEEDS, Arm, exact, short

_LINES = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#be185d", "#4d7c0f")
# Text from directories and settings is not TeX: a dollar sign in it is a dollar sign.
_SWEEP_STYLE: Any = {**STYLE, "text.parse_math": False, "axes.prop_cycle": cycler(color=_LINES)}
_MANY_TICKS = 8  # values of the swept setting that all get a tick
_POINTS = 400  # of a training curve: 25,000 records of each arm would make the page 10 MB
_NO_AXIS = (
    *SEEDS,
    "layer",
    "log_every",
    "eval_every",
    "eval_rows",
)  # settings that no sweep is about
_SETTLED = 0.1  # share of the tokens after which curves are looked at: all begin far below


@contextmanager
def _style() -> Iterator[None]:
    """The pictures' style; a name in a script that matplotlib's own font lacks is drawn by the
    browser's.
    """
    with mpl.rc_context(_SWEEP_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


class Layout(NamedTuple):
    """How the arms of a layer are laid out."""

    x: str | None  # key of the setting along the axis; None: no setting differs
    lines: list[str]  # keys of the settings that tell lines apart


class Point(NamedTuple):
    """One arm in a picture."""

    x: Any  # value of the swept setting
    line: str  # legend
    y: float
    interval: tuple[float, float] | None


def layout(arms: Sequence[Arm], keys: Sequence[str]) -> Layout:
    """The numeric setting with most values along the axis, the learning rate first; a line for each
    of the others.

    A setting that follows from those chosen before, as a floor that goes with its learning rate,
    makes no lines.
    """
    values = {key: [arm.settings.get(key) for arm in arms] for key in keys}
    count = {key: len(set(map(exact, values[key]))) for key in keys}
    usable = [key for key in keys if count[key] > 1 and key not in _NO_AXIS] or [
        k for k in keys if count[k] > 1
    ]
    usable.sort(key=lambda key: (key != "optim.lr", not _numeric(values[key]), -count[key]))
    if not usable:
        return Layout(None, [])
    chosen = usable[:1]
    for key in usable[1:]:
        if _combinations([*chosen, key], values) > _combinations(chosen, values):
            chosen.append(key)
    return Layout(chosen[0], chosen[1:])


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _combinations(keys: Sequence[str], values: dict[str, list[Any]]) -> int:
    return len(set(zip(*(map(exact, values[key]) for key in keys), strict=True)))


def said(value: Any) -> str:
    """A setting's value, for people."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else visible(str(value))


def line_of(arm: Arm, axes: Layout) -> str:
    """What tells an arm's line from others, for the legend."""
    names = short(axes.lines)
    return ", ".join(f"{names[key]} {said(arm.settings.get(key))}" for key in axes.lines)


def against(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Every arm at its value of the swept setting; lines go through the mean of arms that share
    line and value.
    """
    place, log, ticks = _scale([point.x for point in points])
    with _style():
        figure, axes = empty(x_label, y_label)
        for number, line in enumerate(dict.fromkeys(point.line for point in points)):
            colour, own = (
                _LINES[number % len(_LINES)],
                [point for point in points if point.line == line],
            )
            xs, ys = [place(point.x) for point in own], [point.y for point in own]
            means = [
                (x, float(np.mean([y for at, y in zip(xs, ys, strict=True) if at == x])))
                for x in sorted(set(xs))
            ]
            dash = ("-", "--", ":", "-.")[number // len(_LINES) % 4]
            axes.plot(
                *zip(*means, strict=True), color=colour, linewidth=1.5, linestyle=dash, label=line
            )
            axes.plot(xs, ys, "o", color=colour, markersize=4)
            for x, point in zip(xs, own, strict=True):
                if point.interval:
                    axes.vlines(x, *point.interval, color=colour, linewidth=1, alpha=0.6)
        _set_scale(axes, log, ticks)
        if any(point.line for point in points):
            axes.legend(frameon=False, fontsize=8)
        return svg(figure)


def _scale(values: Sequence[Any]) -> tuple[Callable[[Any], float], bool, list[tuple[float, str]]]:
    """Where values lie, whether the axis is logarithmic, and its ticks: in even steps unless all
    are above 0.
    """
    distinct = {exact(value): value for value in values}
    if _numeric(list(distinct.values())) and min(distinct.values()) > 0:
        numbers = sorted(distinct.values())
        return float, True, [(float(value), said(value)) for value in numbers]
    ordered = sorted(
        distinct.values(), key=lambda v: (not _numeric([v]), v if _numeric([v]) else 0, exact(v))
    )
    steps = {exact(value): float(number) for number, value in enumerate(ordered)}
    return (
        lambda value: steps[exact(value)],
        False,
        [(steps[exact(value)], said(value)) for value in ordered],
    )


def _set_scale(axes: Axes, log: bool, ticks: list[tuple[float, str]]) -> None:
    if log:
        axes.set_xscale("log")
    if not log or len(ticks) <= _MANY_TICKS:
        axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(ticks) == 1:
        at = ticks[0][0]
        axes.set_xlim((at / 2, at * 2) if log else (at - 1, at + 1))


def over_tokens(arms: Sequence[tuple[str, Arm]], bottom: float, top: float) -> str:
    """Variance explained of training batches, faint, and of held-out rows, with marks, by name."""
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.7, max(len(arms), 2)))
    with _style():
        figure, axes = empty("training tokens", "variance explained")
        handles = []
        for (_, arm), shade in zip(arms, shades, strict=False):
            train, held = (
                arm.of("train", "variance_explained"),
                arm.of("held_out", "variance_explained"),
            )
            thin = train[:: -(-len(train) // _POINTS) or 1]
            axes.plot(
                [x for x, _ in thin], [y for _, y in thin], color=shade, linewidth=0.8, alpha=0.45
            )
            size = 3.5 if len(held) < 20 else 0
            handles += axes.plot(
                [x for x, _ in held],
                [y for _, y in held],
                color=shade,
                linewidth=1.5,
                marker="o",
                markersize=size,
            )
        axes.set_ylim(bottom, top)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        # A name that begins with an underscore is left out of a legend.
        axes.legend(
            handles, [f" {name}" for name, _ in arms], frameon=False, fontsize=8, loc="lower right"
        )
        return svg(figure)


def settled_range(arms: Sequence[Arm]) -> tuple[float, float]:
    """Bottom and top of the axis that shows all arms' curves once they have left the start; never
    much below 0.
    """
    values = [
        y
        for arm in arms
        for split in ("train", "held_out")
        for x, y in arm.of(split, "variance_explained")
        if x >= _SETTLED * arm.steps * int(arm.settings["batch"])
    ] or [0.0, 1.0]
    low, high = max(0.0, min(values)), max(0.0, max(values))
    margin = max(0.05 * (high - low), 1e-3)
    return low - margin, high + margin
