"""Pictures of a sweep: figures against the swept setting, and curves over training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.studies.sweep.arms import SEEDS, Arm, exact, short
from residual_saes.data.neutral import neutral

_LINES = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#be185d", "#4d7c0f")
# Text from directories and settings is not TeX: a dollar sign in it is a dollar sign.
_SWEEP_STYLE: Any = {**STYLE, "text.parse_math": False, "axes.prop_cycle": cycler(color=_LINES)}
_MANY_TICKS = 8  # values of the swept setting that all get a tick
_POINTS = 400  # of a training curve: 25,000 records of each arm would make the page 10 MB
# Settings that no sweep is about.
_NO_AXIS = (*SEEDS, "layer", "log_every", "eval_every", "eval_rows")
_SETTLED = 0.1  # share of the tokens after which a curve sets the axis: curves begin far below


@contextmanager
def _style() -> Iterator[None]:
    """The pictures' style. A letter that matplotlib's font lacks is drawn by the browser's font."""
    with mpl.rc_context(_SWEEP_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


class Layout(NamedTuple):
    """Which settings the axis and the lines of a picture stand for."""

    x: str | None  # key of the setting along the axis; None: no setting differs
    lines: list[str]  # keys of the settings by which lines differ


class Point(NamedTuple):
    """One arm in a picture."""

    x: Any  # value of the swept setting
    line: str  # legend
    y: float
    interval: tuple[float, float] | None


def layout(arms: Sequence[Arm], keys: Sequence[str]) -> Layout:
    """Which setting lies along the axis, and which ones make lines.

    Along the axis lies the learning rate, else the numeric setting with most values. The others
    make lines, but for a setting that follows from those chosen before, as a floor follows from
    its learning rate.
    """
    values = {key: [arm.settings.get(key) for arm in arms] for key in keys}
    count = {key: len(set(map(exact, values[key]))) for key in keys}
    varying = [key for key in keys if count[key] > 1]
    usable = [key for key in varying if key not in _NO_AXIS] or varying
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
    """How many different combinations of values the arms have."""
    columns = [map(exact, values[key]) for key in keys]
    return len(set(zip(*columns, strict=True)))


def formatted(value: Any) -> str:
    """A setting's value, for people."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else neutral(str(value))


def line_of(arm: Arm, axes: Layout) -> str:
    """The settings by which an arm's line differs from others, for the legend."""
    names = short(axes.lines)
    return ", ".join(f"{names[key]} {formatted(arm.settings.get(key))}" for key in axes.lines)


def against(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Every arm at its value of the swept setting.

    A line goes through the mean of the arms that share line and value.
    """
    scale = Scale.of([point.x for point in points])
    by_line: dict[str, list[Point]] = {}
    for point in points:
        by_line.setdefault(point.line, []).append(point)
    with _style():
        figure, axes = empty(x_label, y_label)
        for number, (line, own) in enumerate(by_line.items()):
            colour = _LINES[number % len(_LINES)]
            dash = ("-", "--", ":", "-.")[number // len(_LINES) % 4]
            at: dict[float, list[float]] = {}
            for point in own:
                at.setdefault(scale.position(point.x), []).append(point.y)
            xs = sorted(at)
            means = [float(np.mean(at[x])) for x in xs]
            axes.plot(xs, means, color=colour, linewidth=1.5, linestyle=dash, label=line)
            positions = [scale.position(point.x) for point in own]
            axes.plot(positions, [point.y for point in own], "o", color=colour, markersize=4)
            for x, point in zip(positions, own, strict=True):
                if point.interval:
                    axes.vlines(x, *point.interval, color=colour, linewidth=1, alpha=0.6)
        _set_scale(axes, scale)
        if any(by_line):
            axes.legend(frameon=False, fontsize=8)
        return svg(figure)


class Scale(NamedTuple):
    """Where the values of a setting lie along an axis."""

    positions: dict[str, float]  # by the value as `exact` text
    logarithmic: bool
    ticks: list[tuple[float, str]]  # (position, label)

    @classmethod
    def of(cls, values: Sequence[Any]) -> Scale:
        """Numbers above 0 on a logarithmic axis, other values in even steps."""
        distinct = {exact(value): value for value in values}
        numeric = _numeric(list(distinct.values()))
        logarithmic = numeric and min(distinct.values()) > 0
        ordered = sorted(distinct, key=lambda text: _order(text, distinct[text]))
        positions = {}
        ticks = []
        for number, text in enumerate(ordered):
            positions[text] = float(distinct[text]) if logarithmic else float(number)
            ticks.append((positions[text], formatted(distinct[text])))
        return cls(positions, logarithmic, ticks)

    def position(self, value: Any) -> float:
        return self.positions[exact(value)]


def _order(text: str, value: Any) -> tuple[bool, float, str]:
    """A sort key for a setting's values: numbers by size, before everything else."""
    number = _numeric([value])
    return not number, value if number else 0, text


def _set_scale(axes: Axes, scale: Scale) -> None:
    if scale.logarithmic:
        axes.set_xscale("log")
    if not scale.logarithmic or len(scale.ticks) <= _MANY_TICKS:
        axes.set_xticks([x for x, _ in scale.ticks], [label for _, label in scale.ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(scale.ticks) == 1:
        x = scale.ticks[0][0]
        axes.set_xlim((x / 2, x * 2) if scale.logarithmic else (x - 1, x + 1))


def over_tokens(arms: Sequence[tuple[str, Arm]], bottom: float, top: float) -> str:
    """Variance explained of training batches, faint, and of held-out rows, with marks, by name."""
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.7, max(len(arms), 2)))
    with _style():
        figure, axes = empty("training tokens", "variance explained")
        handles = []
        for (_, arm), shade in zip(arms, shades, strict=False):
            train = arm.of("train", "variance_explained")
            step = max(1, -(-len(train) // _POINTS))
            x, y = _columns(train[::step])
            axes.plot(x, y, color=shade, linewidth=0.8, alpha=0.45)
            x, y = _columns(arm.of("held_out", "variance_explained"))
            size = 3.5 if len(x) < 20 else 0
            handles += axes.plot(x, y, color=shade, linewidth=1.5, marker="o", markersize=size)
        axes.set_ylim(bottom, top)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        # matplotlib leaves a name that begins with an underscore out of a legend.
        names = [f" {name}" for name, _ in arms]
        axes.legend(handles, names, frameon=False, fontsize=8, loc="lower right")
        return svg(figure)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def settled_range(arms: Sequence[Arm]) -> tuple[float, float]:
    """Bottom and top of the axis of the curves.

    The axis shows all curves once they have left the start, and never reaches much below 0.
    """
    values = []
    for arm in arms:
        settled = _SETTLED * arm.steps * int(arm.settings["batch"])
        for split in ("train", "held_out"):
            values += [y for x, y in arm.of(split, "variance_explained") if x >= settled]
    values = values or [0.0, 1.0]
    low = max(0.0, min(values))
    high = max(0.0, max(values))
    margin = max(0.05 * (high - low), 1e-3)
    return low - margin, high + margin
