"""The files of a sweep's comparison: JSON, Markdown, pictures, and a page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.analyze.pages.template import rendered
from residual_saes.analyze.studies.sweep import plot, words
from residual_saes.analyze.studies.sweep.arms import Arm, short
from residual_saes.analyze.studies.sweep.plot import Layout, Point, formatted
from residual_saes.data import digests, durable, locks
from residual_saes.data.errors import StoreError, TemporaryError
from residual_saes.data.journal import tell
from residual_saes.data.neutral import neutral

JSON = "sweep.json"
MARKDOWN = "sweep.md"
PAGE = "sweep.html"
RECORD = ".sweep"  # folder of their digests
PICTURE = "sweep_layer_{}.svg"
_AGAINST = (  # figure, scale, label of the axis, caption
    (
        "variance_explained",
        1,
        "variance explained",
        "Variance explained on held-out rows, with its interval",
    ),
    ("dead_share", 100, "dead latents, %", "Latents that were dead at the end of training"),
    ("coverage", 100, "latents that fired, %", "Latents that fired on held-out rows"),
)

Drawn = list[tuple[str, str]]  # (caption, SVG)


class Shown(NamedTuple):
    """What the files say of one layer."""

    saes: dict[str, str | None]  # digest of each arm's SAE
    verdict: list[str]
    caption: str
    svg: str


def write(folder: Path, figures: dict[str, Any], arms: Sequence[Arm]) -> Path:
    """Write all files into `folder`; returns the page's path."""
    drawn: list[Drawn] = []
    layers = []
    contents: dict[str, bytes] = {}
    for layer in figures["layers"]:
        own = [arm for arm in arms if arm.place == layer["layer"]]
        pictures = _pictures(layer, own, figures["settings"])
        drawn.append(pictures)
        caption, svg = pictures[0]
        contents[PICTURE.format(layer["layer"])] = svg.encode()
        layers.append({**layer, "picture": caption})
    record = json.dumps({**figures, "layers": layers}, indent=1, allow_nan=False)
    contents[JSON] = record.encode() + b"\n"
    contents[MARKDOWN] = "\n".join(words.markdown(figures)).encode() + b"\n"
    contents[PAGE] = _page(folder, figures, drawn)
    _put(folder, contents)
    return folder / PAGE


def _put(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files, and record them in .sweep: the folder is not the comparison's alone."""
    busy = f"another process writes the comparison in {folder}; wait, or stop it"
    with locks.locked(folder / RECORD, busy):
        files = {}
        for name, content in contents.items():
            files[f"../{name}"] = durable.write(folder / name, [content])
        digests.put(folder / RECORD, files, {"study": "sweep"})


def read(folder: Path, layer: int | str) -> Shown | None:
    """What `write` left of what a run writes, `Subject.place`, in `folder`; None if there is
    nothing whole.

    A line says if something is damaged.
    """
    way_out = "the comparison is left out; do study=sweep again"
    try:
        recorded = digests.read(folder / RECORD, way_out)
        if recorded is None:
            if (folder / JSON).exists():
                tell(f"nothing vouches for {folder / JSON}; {way_out}")
            return None
        recorded.require(None, way_out)
        layers = json.loads(recorded.content(f"../{JSON}", way_out))["layers"]
        (figures,) = (entry for entry in layers if entry["layer"] == layer)
        svg = recorded.content(f"../{PICTURE.format(layer)}", way_out).decode()
        saes = {arm["name"]: arm["sae"] for arm in figures["arms"]}
        verdict = words.verdict(figures, words.name_in(figures))
        return Shown(saes, verdict, figures["picture"], svg)
    except TemporaryError:
        raise
    except StoreError as error:
        tell(str(error))
    except (ValueError, KeyError, TypeError):  # the comparison is of other layers
        pass
    return None


# -- the page --------------------------------------------------------------------------------------


def _page(folder: Path, figures: dict[str, Any], drawn: Sequence[Drawn]) -> bytes:
    layers = []
    for layer, pictures in zip(figures["layers"], drawn, strict=True):
        heads, table = words.table(figures, layer)
        rows = []
        for cells, arm in zip(table, layer["arms"], strict=True):
            rows.append({"cells": cells, "run": neutral(arm["run"]), "class": _class(arm, layer)})
        layers.append(
            {
                "heading": words.heading(layer),
                "verdict": words.verdict(layer, words.name_in(layer)),
                "next": words.next_step(layer),
                "taken": layer["choice"] and words.name_in(layer)(layer["choice"]),
                "heads": heads,
                "rows": rows,
                "pictures": pictures,
            }
        )
    return rendered(
        "sweep.html",
        name=neutral(Path(figures["folder"] or folder.absolute()).name),
        overview=words.overview(figures),
        layers=layers,
        same={key: formatted(value) for key, value in figures["same_in_all"].items()},
        left_out=words.left_out(figures),
    )


def _class(arm: dict[str, Any], layer: dict[str, Any]) -> str:
    if arm["name"] == layer["best"]:
        return "best"
    if arm["name"] in layer["not_distinguishable"]:
        return "alike"
    return "" if arm["finished"] else "unfinished"


# -- pictures --------------------------------------------------------------------------------------


def _pictures(layer: dict[str, Any], arms: Sequence[Arm], keys: Sequence[str]) -> Drawn:
    """Figures against the swept setting, then training curves: a picture for each line of those."""
    names = {arm["name"] for arm in layer["arms"]}
    shown = [arm for arm in arms if arm.name in names]
    axes = plot.layout(shown, keys)
    key = axes.x
    if not key:
        return _curves(layer, shown, axes, "")
    label = neutral(short(keys)[key])
    shown.sort(key=lambda arm: (plot.line_of(arm, axes), _order(arm.settings.get(key)), arm.name))
    return _against(layer, shown, axes, label) + _curves(layer, shown, axes, label)


def _against(layer: dict[str, Any], arms: Sequence[Arm], axes: Layout, label: str) -> Drawn:
    """Each figure of the finished arms against the swept setting."""
    assert axes.x
    figures_of = {arm["name"]: arm for arm in layer["arms"]}
    drawn = []
    for key, scale, y_label, caption in _AGAINST:
        points = []
        for arm in arms:
            figures = figures_of[arm.name]
            if figures["finished"] and figures[key] is not None:
                interval = figures.get(f"{key}_95")
                points.append(
                    Point(
                        x=arm.settings.get(axes.x),
                        line=plot.line_of(arm, axes),
                        y=scale * figures[key],
                        interval=(interval[0], interval[1]) if interval else None,
                    )
                )
        if points:
            drawn.append((caption, plot.against(points, label, y_label)))
    return drawn


def _curves(layer: dict[str, Any], arms: Sequence[Arm], axes: Layout, label: str) -> Drawn:
    """Variance explained over training."""
    name_of = words.name_in(layer)
    bottom, top = plot.settled_range(arms)
    by_line: dict[str, list[Arm]] = {}
    for arm in arms:
        by_line.setdefault(plot.line_of(arm, axes), []).append(arm)
    drawn = []
    for line, own in by_line.items():
        names = [name_of(arm.name) for arm in own]
        key = axes.x
        if key:
            values = [f"{label} {formatted(arm.settings.get(key))}" for arm in own]
            # Arms that differ in the seed, and copies, have the same value: they keep their names.
            if len(set(values)) == len(values):
                names = values
        caption = "Over training: batches faint, held-out rows with marks"
        if line:
            caption += f"; {line}"
        curves = list(zip(names, own, strict=True))
        drawn.append((caption, plot.over_tokens(curves, bottom, top)))
    return drawn


def _order(value: Any) -> tuple[bool, float, str]:
    """A sort key for a setting's values: numbers by size, before everything else."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)
