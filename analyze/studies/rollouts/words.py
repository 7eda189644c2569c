"""What study=rollouts says: sentences, tables and pictures, from the figures of the judgement."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.stats import Interval, formatted
from residual_saes.analyze.studies.stage_gate.best_of import MAJORITY, ORACLE, RANDOM
from residual_saes.analyze.studies.stage_gate.words import (
    RANDOM_LATENTS,
    SCORE,
    auroc_picture,
    beside,
    picked,
    tables_of_choice,
    tables_within,
    verdict,
    within,
)

CONTRAST = "features by contrast"
_SHAPES = {RANDOM: ":", MAJORITY: "--", ORACLE: "-."}
_GREY = "#6b7280"
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#92400e", "#111827")


def summary(figures: dict[str, Any]) -> list[str]:
    """The verdict with its rule, AUROC within questions, and best of n."""
    lines = [verdict(figures), _asked(figures)]
    if figures["within"]:
        lines += [within(figures), beside(figures)]
    return [*lines, picked(figures), _by_n(figures), *figures["left_out"]]


def _asked(figures: dict[str, Any]) -> str:
    """How many answers there are, and how they came to be."""
    discovery = figures["discovery"]
    validation = figures["validation"]
    how = "none of them drawn"
    if drawn := figures["drawn"]:
        how = f"drawn at temperature {drawn['temperature']:g}, seed {drawn['seed']}"
    return (
        f"{validation['answers']:,} answers to {validation['questions']:,} validation questions "
        f"({how}), {validation['right']:,} of them right, judge what {discovery['answers']:,} "
        f"answers to {discovery['questions']:,} other questions chose. Answers without a token, "
        f"which are left out: {figures['empty']:,}."
    )


def _by_n(figures: dict[str, Any]) -> str:
    """R's picks by n."""
    best = figures["best_of"]
    curve = zip(best["n"], best["accuracy"][SCORE], strict=True)
    points = ", ".join(f"{n}: {formatted(point, '.3f')}" for n, point in curve)
    left_out = ""
    if best["left_out"]:
        left_out = f" {best['left_out']:,} questions with fewer answers are left out."
    return f"R's accuracy by n: {points}.{left_out} Each p is of one comparison alone."


# -- tables ----------------------------------------------------------------------------------------


def tables(figures: dict[str, Any]) -> list[Table]:
    """AUROC of every candidate, best of n, what it is ahead of, and the choice."""
    best = figures["best_of"]
    rows: list[tuple[str, ...]] = []
    for name, points in best["accuracy"].items():
        rows.append((name, *map(_cell, points)))
    if chance := figures["random_latents"]:
        cells = map(_spread, chance["accuracy"])
        rows.append((f"{RANDOM_LATENTS}: median (95% of sets)", *cells))
    header = ("picked by", *map("n = {}".format, best["n"]))
    caption = f"Best of n: accuracy on {best['questions']} validation questions"
    return [
        *tables_within(figures),
        Table(caption, header, rows),
        _ahead(best),
        *tables_of_choice(figures),
    ]


def _ahead(best: dict[str, Any]) -> Table:
    others = list(best["ahead"][SCORE])
    rows = []
    for name, compared in best["ahead"].items():
        if name in (RANDOM, ORACLE):
            continue
        cells = []
        for other in others:
            own = compared.get(other)
            said = f"{formatted(own[-1], '+.3f')}, p = {own[-1]['p']:.2g}" if own else "-"
            cells.append(said)
        rows.append((name, *cells))
    caption = f"Best of {best['n'][-1]}: accuracy less that of another pick, paired by question"
    return Table(caption, ("picked by", *map("less {}".format, others)), rows)


def _cell(point: dict[str, Any]) -> str:
    return formatted(point, ".3f")


def _spread(point: dict[str, Any]) -> str:
    low, high = point["interval"]
    return f"{point['median']:.3f} ({low:.3f}-{high:.3f})"


# -- pictures --------------------------------------------------------------------------------------


def pictures(figures: dict[str, Any]) -> dict[str, Picture]:
    """Accuracy against n, and AUROC with intervals."""
    return {"best_of_n": _curves(figures), "auroc": auroc_picture(figures)}


def _curves(figures: dict[str, Any]) -> Picture:
    best = figures["best_of"]
    n = best["n"]
    with mpl.rc_context(STYLE):
        drawing, axes = empty("n", "accuracy")
        drawing.set_size_inches(6.4, 3.6)
        axes.set_prop_cycle(color=_COLOURS)
        for name, points in best["accuracy"].items():
            values, intervals = _ends(points)
            if name in _SHAPES:
                axes.plot(n, values, _SHAPES[name], color=_GREY, label=name, linewidth=1.5)
                continue
            wide = 2.5 if name == SCORE else 1.2
            (line,) = axes.plot(n, values, "-o", label=name, linewidth=wide, markersize=3)
            if name == SCORE:
                _band(axes, n, intervals, line.get_color())
        if chance := figures["random_latents"]:
            _, intervals = _ends(chance["accuracy"])
            _band(axes, n, intervals, _GREY, f"{RANDOM_LATENTS}, 95% of sets")
        axes.set_xscale("log", base=2)
        axes.set_xticks(n, [str(value) for value in n])
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        caption = (
            f"Accuracy of the answer that each picks among n, on {best['questions']} validation "
            "questions; around R the 95% interval over questions"
        )
        return Picture(caption, svg(drawing))


def _ends(points: list[dict[str, Any]]) -> tuple[list[float], list[Interval | None]]:
    """Values, or medians, and intervals of points."""
    values = []
    intervals = []
    for point in points:
        values.append(point["value"] if "value" in point else point["median"])
        intervals.append(point["interval"])
    return values, intervals


def _band(
    axes: Axes, n: list[int], intervals: list[Interval | None], colour: Any, label: str = ""
) -> None:
    """The area between the intervals' ends; nothing where there are none."""
    if any(interval is None for interval in intervals):
        return
    low, high = zip(*intervals, strict=True)
    axes.fill_between(n, low, high, color=colour, alpha=0.15, linewidth=0, label=label or None)
