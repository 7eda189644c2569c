"""Pictures of stage gate 2, from the figures of `study.figures_of`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.outcome import Picture
from residual_saes.analyze.studies.stage_gate_2.arms import OUTCOME
from residual_saes.analyze.studies.stage_gate_2.verdict import ACCURACY

_COLOURS = {"R0": "#6b7280", "R1": "#2563eb", "R2": "#d97706", "R3": "#059669", "R4": "#7c3aed"}
# What the curves show of a step's rollouts, by the name in `Trained.curve`.
_CURVES = {
    "outcome": "right rollouts",
    "feature": "R1's reward\n(frozen reader)",
    "length": "tokens a rollout",
    "kl": "KL to the\nuntrained model",
}

Rows = Sequence[Mapping[str, Any]]


def pictures(figures: Mapping[str, Any]) -> dict[str, Picture]:
    """Right answers by arm, curves of each level, and reward against right answers."""
    rows = figures["arms"]
    drawn = {"right": _right(rows, figures["untrained"][ACCURACY])}
    for level in dict.fromkeys(row["level"] for row in rows if row["reward"] != OUTCOME):
        of_level = [row for row in rows if row["level"] == level or row["reward"] == OUTCOME]
        drawn[f"curves_{level}"] = _curves(of_level, level)
    drawn["reward"] = _reward(rows, figures["untrained"])
    return drawn


def _right(rows: Rows, untrained: Mapping[str, Any]) -> Picture:
    """A line for each arm with a mark for each seed."""
    with mpl.rc_context(STYLE):
        figure, axes = empty("right answers to questions that trained none", "")
        figure.set_size_inches(7.2, 0.9 + 0.24 * len(rows))
        names = []
        for height, row in enumerate(rows):
            seeds = row[ACCURACY]["seeds"]
            colour = _COLOURS[row["reward"]]
            axes.plot([min(seeds), max(seeds)], [height, height], color=colour, linewidth=1)
            axes.plot(seeds, [height] * len(seeds), "o", color=colour, markersize=3.5, alpha=0.7)
            axes.plot(row[ACCURACY]["value"], height, "|", color=colour, markersize=12)
            level = "" if row["reward"] == OUTCOME else f" {row['level']}"
            names.append(f"{row['reward']}{level}, lr {row['lr']:g}")
        axes.axvline(untrained["value"], color="#6b7280", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        caption = "Right answers: a dot for each seed, a bar for their mean; dashed: untrained"
        return Picture(caption, svg(figure))


def _curves(rows: Rows, level: str) -> Picture:
    """Over training, a column for each learning rate: the mean of the seeds, and their range."""
    rates = sorted({row["lr"] for row in rows})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.6 * len(rates), 1.9 * len(_CURVES)), layout="constrained")
        grid = figure.subplots(len(_CURVES), len(rates), sharex=True, sharey="row", squeeze=False)
        for line, (key, label) in zip(grid, _CURVES.items(), strict=True):
            for axes, rate in zip(line, rates, strict=True):
                for row in rows:
                    if row["lr"] == rate and key in row["curve"]:
                        _curve(axes, row, key)
            line[0].set_ylabel(label)
        for axes, rate in zip(grid[0], rates, strict=True):
            axes.set_title(f"lr {rate:g}", fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("optimizer steps")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
        caption = (
            f"Training by {level}, arms of one rate in one column: mean and range of the seeds"
        )
        return Picture(caption, svg(figure))


def _curve(axes: Axes, row: Mapping[str, Any], key: str) -> None:
    steps, values = row["curve"]["step"], row["curve"][key]
    colour = _COLOURS[row["reward"]]
    axes.plot(steps, values["mean"], color=colour, linewidth=1.5, label=row["reward"])
    axes.fill_between(steps, values["low"], values["high"], color=colour, alpha=0.12, linewidth=0)


def _reward(rows: Rows, untrained: Mapping[str, Any]) -> Picture:
    """A mark for each policy: R1's reward by the frozen reader, and right answers."""
    name = "reward of R1"
    with mpl.rc_context(STYLE):
        figure, axes = empty("R1's reward of its answers, by the frozen reader", "right answers")
        axes.plot(
            untrained[name]["value"],
            untrained[ACCURACY]["value"],
            "*",
            color="#111827",
            markersize=10,
            label="untrained",
        )
        seen = set()
        for row in rows:
            reward = row["reward"]
            axes.plot(
                row[name]["seeds"],
                row[ACCURACY]["seeds"],
                "o",
                color=_COLOURS[reward],
                markersize=4,
                alpha=0.7,
                label=None if reward in seen else reward,
            )
            seen.add(reward)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        caption = "The frozen reader's reward against right answers, a dot for each policy"
        return Picture(caption, svg(figure))
