"""The catalogue in figures, sentences, pictures and a short table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from residual_saes.analyze import drawing
from residual_saes.analyze.latents.targets import class_names
from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.studies.catalogue.state import State
from residual_saes.analyze.studies.catalogue.table import OfTargets

ABOUT_CLASSES = "study=diff tests own ones, and has nulls."
SHOWN = 20  # latents of the short table
_SHOWN_TOKENS = 5  # contexts of each, and tokens raised


def figures_of(state: State) -> dict[str, Any]:
    """The figures over all latents."""
    density = state.count / state.rows
    return {
        "features": len(density),
        "silent": int((state.count == 0).sum()),
        "density_above_1_percent": int((density > 0.01).sum()),
        "density_above_10_percent": int((density > 0.1).sum()),
        "pairs": int(state.count.sum()),
        "l0": float(state.count.sum() / state.rows),
        "histogram_edges": state.edges.tolist(),
        "histogram_clipped": _clipped(state),
    }


def of_targets(targets: OfTargets, state: State) -> dict[str, Any]:
    """The figures of a crosscoder: latents that fire, by whose they are."""
    classes = targets.written.classes[state.count > 0]
    names = class_names(targets.names)
    counts = np.bincount(classes, minlength=len(names)).tolist()
    return {"classes": dict(zip(names, counts, strict=True))}


def _clipped(state: State) -> float:
    """Share of activations in the histogram's end bins, which also count what lies beyond them."""
    ends = state.histogram[:, [0, -1]]
    return float(ends.sum() / max(state.histogram.sum(), 1))


def summary(figures: dict[str, Any]) -> list[str]:
    rows = figures["rows"]
    # No event in n trials: 1 - 0.05^(1/n), about 3 / n ("rule of three"; Hanley and Lippman-Hand,
    # 1983).
    below = 1 - 0.05 ** (1 / rows)
    lines = [
        f"{figures['features']:,} latents in one pass over {rows:,} rows: {FEATURES} has a row for "
        f"each, index/ all {figures['pairs']:,} places where they fire (L0 {figures['l0']:.1f}).",
        f"{figures['silent']:,} latents never fire; were rows independent, each would be below a "
        f"density of {below:.2g} with 95% confidence.",
        f"{figures['density_above_1_percent']:,} fire in more than 1% of rows, "
        f"{figures['density_above_10_percent']:,} in more than 10%.",
    ]
    if classes := figures.get("classes"):
        counts = ", ".join(f"{count:,} {name}" for name, count in classes.items())
        lines.append(f"By their decoder norms those that fire are: {counts}. {ABOUT_CLASSES}")
    if figures["no_logits"]:
        lines.append(f"There are no logits: {figures['no_logits']}.")
    return lines


def pictures(state: State) -> dict[str, Picture]:
    """Histograms over latents; none if no latent fires."""
    alive = state.count > 0
    if not alive.any():
        return {}
    density = np.log10(state.count[alive] / state.rows)
    largest = np.log10(state.largest[alive])
    return {
        "density": Picture("How often latents fire", _histogram(density, "log10 density")),
        "largest": Picture(
            "Largest activation of each latent", _histogram(largest, "log10 largest activation")
        ),
    }


def _histogram(values: NDArray[Any], label: str) -> str:
    counts, edges = np.histogram(values, bins=40)
    return drawing.histogram(counts.tolist(), edges.tolist(), label, "latents")


def table_of(path: Path, chosen: list[int]) -> Table:
    """The chosen latents, read from features.parquet as any reader reads it."""
    columns = ["feature", "density", "mean", "max", "top", "raised", "neighbours"]
    filters = [("feature", "in", chosen or [0])]
    rows = {}
    for row in pq.read_table(path, columns=columns, filters=filters).to_pylist():
        rows[row["feature"]] = row
    header = ("latent", "density", "mean", "max", "strongest at", "raises", "nearest (cosine)")
    caption = (
        f"{len(chosen)} latents spread evenly over the ranking by density, none picked for its "
        "looks."
    )
    return Table(caption, header, [_cells(rows[feature]) for feature in chosen])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A latent's row of the short table."""
    peaks = []
    for context in row["top"][:_SHOWN_TOKENS]:
        texts = context["text"] or context["tokens"]
        peaks.append(f"`{texts[context['peak']]}`")
    raised = []
    for token in (row["raised"] or [])[:_SHOWN_TOKENS]:
        raised.append(f"`{token['text'] or token['token']}`")
    nearest = "-"
    if row["neighbours"]:
        neighbour = row["neighbours"][0]
        nearest = f"{neighbour['feature']} ({neighbour['cosine']:.2f})"
    return (
        str(row["feature"]),
        f"{row['density']:.3%}",
        f"{row['mean']:.3g}",
        f"{row['max']:.3g}",
        " ".join(peaks),
        " ".join(raised) or "-",
        nearest,
    )
