"""A sweep in sentences and tables, and both as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from analyze.contexts import visible
from analyze.studies.sweep.arms import labels, short
from analyze.studies.sweep.plot import formatted
from data.markdown import table_lines


def markdown(figures: dict[str, Any]) -> list[str]:
    """The sentences and tables as lines of Markdown."""
    lines = ["# Sweep", "", *map(_escaped, overview(figures))]
    for layer in figures["layers"]:
        heads, rows = table(figures, layer)
        sentences = verdict(layer, name_in(layer))
        lines += ["", f"## Layer {layer['layer']}", "", *map(_escaped, sentences), ""]
        lines += table_lines(heads, rows, _escaped)
    if rest := left_out(figures):
        lines += ["", *map(_escaped, rest)]
    return lines


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: a directory may be called `<b>` or `a|b`."""
    return re.sub(r"([\\|<])", r"\\\1", text)


def name_in(layer: dict[str, Any]) -> Callable[[str], str]:
    """From an arm's name to the name that people see; see `labels`."""
    label = labels([arm["name"] for arm in layer["arms"]])
    return lambda name: visible(label[name])


# -- sentences -------------------------------------------------------------------------------------


def overview(figures: dict[str, Any]) -> list[str]:
    """What was compared."""
    arms = [arm for layer in figures["layers"] for arm in layer["arms"]]
    finished = sum(arm["finished"] for arm in arms)
    model = f" on {visible(figures['model'])}" if figures["model"] else ""
    store = f" from {visible(figures['store'])}" if figures["store"] else ""
    return [f"{len(arms)} arms{model}{store}: {finished} finished, {len(arms) - finished} not."]


def verdict(layer: dict[str, Any], name_of: Callable[[str], str]) -> list[str]:
    """The best arm of a layer, those that cannot be told from it, and what that rests on."""
    if not layer["best"]:
        return ["No arm is finished, so none is compared."]
    figures_of = {arm["name"]: arm for arm in layer["arms"]}
    best = figures_of[layer["best"]]
    name = name_of(layer["best"])
    explained = f"variance explained {_with_interval(best, 'variance_explained')}"
    compared = sum(arm["variance_explained_95"] is not None for arm in layer["arms"])
    if compared == 1:
        lines = [f"Only one arm is finished: {name}, {explained}."]
    else:
        lines = [f"Best: {name}, {explained}; first in {best['first_share']:.0%} of resamples."]
        lines.append(_alike(layer, figures_of, name_of))
    if layer["seed_spread"] is not None:
        lines.append(
            f"Arms that differ in the seed alone are up to {layer['seed_spread']:.5f} apart: "
            "a difference that is not larger says nothing about the settings."
        )
    lines.append(
        f"{_basis(layer)}. Brackets are 95 % intervals from resampling documents, the same draws "
        "for all arms. They hold what other text would change, not what another training seed "
        "would; each difference is judged by itself; and the best of several arms looks a little "
        "better here than it is: its share of first places says how sure it is."
    )
    return lines


def _alike(
    layer: dict[str, Any], figures_of: dict[str, dict[str, Any]], name_of: Callable[[str], str]
) -> str:
    """The arms that cannot be told from the best."""
    if not layer["not_distinguishable"]:
        return "Every other arm is distinguishable from it: no interval of a difference includes 0."
    arms = []
    for name in layer["not_distinguishable"]:
        arms.append(f"{name_of(name)} (first in {figures_of[name]['first_share']:.0%})")
    return (
        "Not distinguishable from the best, the interval of the difference includes 0: "
        f"{'; '.join(arms)}."
    )


def _basis(layer: dict[str, Any]) -> str:
    """The rows that a layer's arms are measured on."""
    dropped = []
    if layer["drop_bos"]:
        dropped.append("BOS")
    if layer["drop_outliers"]:
        dropped.append("outliers")
    if layer.get("drop_tokens"):
        dropped.append(f"token ids {', '.join(map(str, layer['drop_tokens']))}")
    without = f" without {' and '.join(dropped)}" if dropped else ""
    basis = (
        f"Measured on {layer['rows']:,} held-out rows{without} of {layer['documents']:,} documents"
    )
    if not layer["one_policy"]:
        basis += ", those that every arm's policy keeps (the arms were trained with different ones)"
    return basis


def left_out(figures: dict[str, Any]) -> list[str]:
    """A line for each arm that takes no part."""
    lines = []
    for layer in figures["layers"]:
        for arm in layer["arms"]:
            if not arm["finished"]:
                lines.append(
                    f"Not finished, left out of the comparison: {visible(arm['name'])} "
                    f"(step {arm['step']:,} of {arm['steps']:,})."
                )
    for name, error in figures["damaged"].items():
        lines.append(f"Damaged: {visible(name)}: {visible(error)}")
    return lines


# -- the table -------------------------------------------------------------------------------------


def table(figures: dict[str, Any], layer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads, and a row of text for each arm."""
    keys = _columns(figures, layer)
    names = short(keys)
    name_of = name_in(layer)
    heads = ["arm", *(names[key] for key in keys), "variance explained", "behind the best", "first"]
    heads += ["mse", "dead", "coverage", "L0", "tokens", "tokens/s", "finished"]
    rows = []
    for arm in layer["arms"]:
        best = arm["name"] == layer["best"]
        step = f"step {arm['step']:,} of {arm['steps']:,}"
        rows.append(
            [
                name_of(arm["name"]),
                *(formatted(arm["settings"][key]) for key in keys),
                _with_interval(arm, "variance_explained"),
                "best" if best else _with_interval(arm, "behind_best", 5),
                _number(arm["first_share"], ".0%"),
                _number(arm["mse"], ".4g"),
                _number(arm["dead_share"], ".1%"),
                _number(arm["coverage"], ".1%"),
                _number(arm["l0"], ".1f"),
                f"{arm['tokens']:,}",
                _number(arm["tokens_per_s"], ",.0f"),
                "yes" if arm["finished"] else step,
            ]
        )
    return heads, rows


def _columns(figures: dict[str, Any], layer: dict[str, Any]) -> list[str]:
    """The settings that get a column: those that differ in this layer, the learning rate first."""
    keys = []
    for key in figures["settings"]:
        values = {formatted(arm["settings"][key]) for arm in layer["arms"]}
        if key not in ("layer", "tokens") and len(values) > 1:
            keys.append(key)
    return sorted(keys, key=lambda key: key != "optim.lr")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_interval(arm: dict[str, Any], key: str, digits: int = 4) -> str:
    value = _number(arm[key], f".{digits}f")
    interval = arm[f"{key}_95"]
    if not interval:
        return value
    low, high = interval
    return f"{value} [{low:.{digits}f}, {high:.{digits}f}]"
