"""What a sweep has shown, as Markdown, JSON and one page that needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analyze.contexts import visible
from analyze.studies.sweep import plot as pictures
from analyze.studies.sweep.arms import Arm, labels, short
from analyze.studies.sweep.plot import Point, said
from data import durable

JSON, MARKDOWN, PAGE, PICTURE = "sweep.json", "sweep.md", "sweep.html", "sweep_layer_{}.svg"

Drawn = list[tuple[str, str]]  # (caption, SVG)


class Shown(NamedTuple):
    """What the files say of one layer."""

    saes: dict[str, str | None]  # digest of each arm's SAE
    verdict: list[str]
    caption: str
    svg: str


def write(folder: Path, figures: dict[str, Any], arms: Sequence[Arm]) -> Path:
    """Write sweep.json, sweep.md, sweep.html and each layer's first picture into `folder`; the
    page's path.
    """
    durable.make_directory(folder)
    drawn = [
        _pictures(one, [arm for arm in arms if arm.layer == one["layer"]], figures)
        for one in figures["layers"]
    ]
    layers = []
    for layer, shown in zip(figures["layers"], drawn, strict=True):
        caption, svg = shown[0]
        durable.write(folder / PICTURE.format(layer["layer"]), [svg.encode()])
        layers.append({**layer, "picture": caption})
    said_of_all = json.dumps({**figures, "layers": layers}, indent=1, allow_nan=False)
    durable.write(folder / JSON, [said_of_all.encode() + b"\n"])
    durable.write(folder / MARKDOWN, ["\n".join(markdown(figures)).encode() + b"\n"])
    durable.write(folder / PAGE, [_page(folder, figures, drawn).encode()])
    return folder / PAGE


def read(folder: Path, layer: int) -> Shown | None:
    """What `write` left of a layer in `folder`; None if there is nothing whole."""
    try:
        layers = json.loads((folder / JSON).read_bytes())["layers"]
        (one,) = (one for one in layers if one["layer"] == layer)
        svg = (folder / PICTURE.format(layer)).read_text()
        saes = {arm["name"]: arm["sae"] for arm in one["arms"]}
        return Shown(saes, verdict(one, _labels(one)), one["picture"], svg)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def markdown(figures: dict[str, Any]) -> list[str]:
    """The tables and what follows from them, as Markdown lines."""
    lines = ["# Sweep", "", *map(_escaped, overview(figures))]
    for layer in figures["layers"]:
        heads, rows = table(figures, layer)
        name_of = _labels(layer)
        lines += [
            "",
            f"## Layer {layer['layer']}",
            "",
            *(_escaped(line) for line in verdict(layer, name_of)),
            "",
        ]
        lines += [_row(heads), "|---" * len(heads) + "|", *map(_row, rows)]
    lines += ["", *(_escaped(line) for line in left_out(figures))]
    return lines[:-1] if not lines[-1] else lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text that Markdown takes for text: a directory may be called `<b>` or `a|b`."""
    return re.sub(r"([\\|<])", r"\\\1", text)


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
    standing = {arm["name"]: arm for arm in layer["arms"]}
    best, compared = (
        standing[layer["best"]],
        sum(arm["variance_explained_95"] is not None for arm in layer["arms"]),
    )
    lines = [
        f"Best: {name_of(layer['best'])}, variance explained {_with_interval(best, 'variance_explained')}; "
        f"first in {best['first_share']:.0%} of resamples."
    ]
    if compared == 1:
        lines[0] = f"Only one arm is finished: {name_of(layer['best'])}, variance explained " + (
            f"{_with_interval(best, 'variance_explained')}."
        )
    elif alike := layer["not_distinguishable"]:
        names = "; ".join(
            f"{name_of(name)} (first in {standing[name]['first_share']:.0%})" for name in alike
        )
        lines.append(
            f"Not distinguishable from the best, the interval of the difference includes 0: {names}."
        )
    else:
        lines.append(
            "Every other arm is distinguishable from it: no interval of a difference includes 0."
        )
    if layer["seed_spread"] is not None:
        lines.append(
            f"Arms that differ in the seed alone are up to {layer['seed_spread']:.5f} apart: a difference that is not "
            "larger says nothing about the settings."
        )
    kinds = [
        word for word, key in (("BOS", "drop_bos"), ("outliers", "drop_outliers")) if layer[key]
    ]
    without = f" without {' and '.join(kinds)}" if kinds else ""
    basis = (
        f"Measured on {layer['rows']:,} held-out rows{without} of {layer['documents']:,} documents"
    )
    if not layer["one_policy"]:
        basis += ", those that every arm's policy keeps (the arms were trained with different ones)"
    lines.append(
        f"{basis}. Brackets are 95 % intervals from resampling documents, the same draws for all arms. They hold what "
        "other text would change, not what another training seed would; each difference is judged by itself; and the "
        "best of several arms looks a little better here than it is: its share of first places says how sure it is."
    )
    return lines


def left_out(figures: dict[str, Any]) -> list[str]:
    """A line for each arm that takes no part."""
    lines = [
        f"Not finished, left out of the comparison: {visible(arm['name'])} (step {arm['step']:,} of {arm['steps']:,})."
        for layer in figures["layers"]
        for arm in layer["arms"]
        if not arm["finished"]
    ]
    return [
        *lines,
        *(f"Damaged: {visible(name)}: {visible(why)}" for name, why in figures["damaged"].items()),
    ]


# -- the table -------------------------------------------------------------------------------------


def table(figures: dict[str, Any], layer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads, and a row of text for each arm."""
    keys = [key for key in figures["settings"] if key not in ("layer", "tokens")]
    keys = [key for key in keys if len({said(arm["settings"][key]) for arm in layer["arms"]}) > 1]
    keys.sort(key=lambda key: key != "optim.lr")
    names, name_of = short(keys), _labels(layer)
    heads = ["arm", *(names[key] for key in keys), "variance explained", "behind the best", "first"]
    heads += ["mse", "dead", "coverage", "L0", "tokens", "tokens/s", "finished"]
    rows = [
        [
            name_of(arm["name"]),
            *(said(arm["settings"][key]) for key in keys),
            _with_interval(arm, "variance_explained"),
            "best" if arm["name"] == layer["best"] else _with_interval(arm, "behind_best", 5),
            _number(arm["first_share"], "{:.0%}"),
            _number(arm["mse"], "{:.4g}"),
            _number(arm["dead_share"], "{:.1%}"),
            _number(arm["coverage"], "{:.1%}"),
            _number(arm["l0"], "{:.1f}"),
            f"{arm['tokens']:,}",
            _number(arm["tokens_per_s"], "{:,.0f}"),
            "yes" if arm["finished"] else f"step {arm['step']:,} of {arm['steps']:,}",
        ]
        for arm in layer["arms"]
    ]
    return heads, rows


def _labels(layer: dict[str, Any]) -> Callable[[str], str]:
    found = labels([arm["name"] for arm in layer["arms"]])
    return lambda name: visible(found[name])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _with_interval(arm: dict[str, Any], key: str, digits: int = 4) -> str:
    form = f"{{:.{digits}f}}"
    interval = arm[f"{key}_95"]
    return _number(arm[key], form) + (
        f" [{', '.join(map(form.format, interval))}]" if interval else ""
    )


# -- the page --------------------------------------------------------------------------------------


def _page(folder: Path, figures: dict[str, Any], drawn: Sequence[Drawn]) -> str:
    environment = Environment(
        loader=PackageLoader("analyze.pages"), autoescape=True, undefined=StrictUndefined
    )
    layers = []
    for layer, shown in zip(figures["layers"], drawn, strict=True):
        name_of = _labels(layer)
        heads, rows = table(figures, layer)
        layers.append(
            {
                "layer": layer["layer"],
                "verdict": verdict(layer, name_of),
                "heads": heads,
                "rows": [
                    {"cells": row, "run": visible(arm["run"]), "class": _class(arm, layer)}
                    for row, arm in zip(rows, layer["arms"], strict=True)
                ],
                "pictures": [
                    (caption, Markup(svg)) for caption, svg in shown
                ],  # ours; matplotlib escapes texts
            }
        )
    return environment.get_template("sweep.html").render(
        name=visible(Path(figures["folder"] or folder.absolute()).name),
        overview=overview(figures),
        layers=layers,
        same={key: said(value) for key, value in figures["same_in_all"].items()},
        left_out=left_out(figures),
    )


def _class(arm: dict[str, Any], layer: dict[str, Any]) -> str:
    if arm["name"] == layer["best"]:
        return "best"
    if arm["name"] in layer["not_distinguishable"]:
        return "alike"
    return "" if arm["finished"] else "unfinished"


def _pictures(layer: dict[str, Any], arms: Sequence[Arm], figures: dict[str, Any]) -> Drawn:
    """Three figures against the swept setting, then curves, a picture for each line of those."""
    keys, name_of = figures["settings"], _labels(layer)
    standing = {arm["name"]: arm for arm in layer["arms"]}
    shown = [arm for arm in arms if arm.name in standing]
    axes = pictures.layout(shown, keys)
    drawn = []
    if axes.x:
        x_key = axes.x
        x_label = visible(short(keys)[x_key])
        shown = sorted(
            shown,
            key=lambda arm: (
                pictures.line_of(arm, axes),
                _place(arm.settings.get(x_key)),
                arm.name,
            ),
        )
        for key, scale, y_label, caption in (
            (
                "variance_explained",
                1,
                "variance explained",
                "Variance explained on held-out rows, with its interval",
            ),
            ("dead_share", 100, "dead latents, %", "Latents that were dead at the end of training"),
            ("coverage", 100, "latents that fired, %", "Latents that fired on held-out rows"),
        ):
            points = [
                Point(
                    arm.settings.get(x_key),
                    pictures.line_of(arm, axes),
                    scale * figure[key],
                    _interval(figure, key),
                )
                for arm in shown
                if (figure := standing[arm.name])["finished"] and figure[key] is not None
            ]
            if points:
                drawn.append((caption, pictures.against(points, x_label, y_label)))
    bottom, top = pictures.settled_range(shown)
    for line in dict.fromkeys(pictures.line_of(arm, axes) for arm in shown):
        own = [arm for arm in shown if pictures.line_of(arm, axes) == line]
        names = [
            f"{x_label} {said(arm.settings.get(axes.x))}" if axes.x else name_of(arm.name)
            for arm in own
        ]
        if len(set(names)) < len(names):  # seeds, or copies
            names = [name_of(arm.name) for arm in own]
        caption = "Over training: batches faint, held-out rows with marks" + (
            f"; {line}" if line else ""
        )
        drawn.append(
            (caption, pictures.over_tokens(list(zip(names, own, strict=True)), bottom, top))
        )
    return drawn


def _interval(figure: dict[str, Any], key: str) -> tuple[float, float] | None:
    found = figure.get(f"{key}_95")
    return (found[0], found[1]) if found else None


def _place(value: Any) -> tuple[bool, float, str]:
    """A key to sort a setting's values by: numbers by size, before everything else."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)
