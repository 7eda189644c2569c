"""The card's picture: variance explained over training, and how often latents fire."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

FILE = "training.png"  # the Hub shows no SVG
_STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
_COLOUR = "#2563eb"
_LOOKS: dict[str, Any] = {"train": {"alpha": 0.4}, "held_out": {"marker": "o", "markersize": 3}}
_FEW = 10  # records; the lowest tenth of more is below the axis


def drawn(metrics: Sequence[Mapping[str, Any]], quality: Mapping[str, Any] | None) -> bytes:
    """A PNG of one panel, or of two if study=quality was done.

    Args:
        metrics: records of metrics.jsonl.
        quality: quality.json.
    """
    points: dict[str, list[tuple[float, float]]] = {"train": [], "held_out": []}
    for record in metrics:
        if record.get("split") in points and record.get("variance_explained") is not None:
            points[record["split"]].append((record.get("tokens", 0), record["variance_explained"]))
    density = ((quality or {}).get("density") or {}).get("log10")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8 if density else 4, 2.8), layout="constrained")
        axes = figure.subplots(1, 2 if density else 1, squeeze=False)[0]
        for split, look in _LOOKS.items():
            axes[0].plot(*np.array(points[split]).reshape(-1, 2).T, color=_COLOUR, **look)
        axes[0].set(xlabel="tokens trained on", ylabel="variance explained")
        explained = sorted(value for of_split in points.values() for _, value in of_split)
        if len(explained) > _FEW:  # a curve begins far below
            axes[0].set_ylim(bottom=explained[len(explained) // _FEW], top=1)
        axes[0].xaxis.set_major_locator(MaxNLocator(5))
        axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
        if density:
            axes[1].stairs(density["counts"], density["edges"], fill=True, color=_COLOUR)
            axes[1].set(xlabel="log10 of the share of rows in which it fires", ylabel="latents")
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
            return file.getvalue()
