"""How good an SAE is on rows that it was never trained on: every published definition from one
float64 pass.

With e = x - x_hat on raw rows x (n, d), mu the training rows' mean, and b a batch of 4,096 rows:

    centred              1 - sum |e|^2 / sum |x - mu|^2                      the figure to quote
    batch_mean           1 - sum |e|^2 / sum |x - mean_b(x)|^2               sparsify's 1 - FVU
    mean_of_ratios       mean of 1 - |e|^2 / |x - mean_b(x)|^2               SAELens' legacy figure
    variance_of_error    1 - sum_j Var(e_j) / sum_j Var(x_j)                 dictionary_learning's; forgives a constant
    scalar               1 - mean(e^2) / Var(all elements of x)              the reference SAE's; nearly uncentred
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyze.directions import nearest
from analyze.outcome import Outcome, Table, markdown
from analyze.stats import variance_explained
from analyze.study import Definition, Study, at_least
from analyze.subject import Subject, Unit
from data import durable
from data.errors import StoreError
from data.rows import summary as summary_of_layer
from data.settings import build
from data.store.kinds import BOS, ORDINARY
from data.store.moments import Moments

BATCH_ROWS = 4096  # the reference's batch
_DEAD_SPANS = (1_000_000, 10_000_000, 100_000_000)  # tokens
_HISTOGRAM_BINS = 40
NAMED = {  # figures of all rows together that are one number, as people read them
    "scalar": "variance explained, scalar (the reference SAE's definition)",
    "batch_mean": "variance explained, about the batch's mean (sparsify)",
    "mean_of_ratios": "variance explained, mean of the rows' ratios (SAELens, legacy)",
    "variance_of_error": "variance explained, by variance of the error (dictionary_learning)",
    "mse_per_element": "MSE per element",
    "l0": "L0, latents per token",
    "cosine": "cosine of row and reconstruction",
    "l2_ratio": "norm of reconstruction / norm of row",
    "shrinkage": "shrinkage (1 is none)",
}


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/quality.yaml."""

    rows: int = 4_000_000  # held-out rows at most, in whole units

    def __post_init__(self) -> None:
        at_least("study.rows", self.rows, 1)


class Rows(NamedTuple):
    """What is kept of each held-out row, (n,) each."""

    squared_error: NDArray[np.float64]  # |e|^2
    about_mean: NDArray[np.float64]  # |x - mu|^2
    about_batch: NDArray[
        np.float64
    ]  # |x - mean_b(x)|^2, the mean over those that the run's policy keeps
    squared: NDArray[np.float64]  # |x|^2
    dot: NDArray[np.float64]  # x . x_hat
    squared_hat: NDArray[np.float64]  # |x_hat|^2
    l0: NDArray[np.int64]
    document: NDArray[np.uint32]
    position: NDArray[np.int64]
    norm: NDArray[np.float32]
    kind: NDArray[np.int8]


@dataclass
class Latents:
    """What is counted of each latent, over the rows that the run's policy keeps."""

    fired: NDArray[np.int64]  # (F,) rows
    first: NDArray[np.int64]  # (F,) row in which it first fired; the number of rows if never


def quality(subject: Subject, limit: int) -> dict[str, Any]:
    """Every figure, as plain JSON.

    Args:
        limit: held-out rows to measure on, in whole units.
    """
    rows, latents, spread, activations = _measure(subject, limit)
    kept = np.isin(rows.kind, subject.policy.kinds)
    if not kept.any():
        raise StoreError(
            f"no held-out row of {subject.store.name} passes the run's policy {subject.policy}"
        )
    subsets = {
        "as trained": kept,
        "all rows": np.ones(len(kept), bool),
        "without BOS": rows.kind != BOS,
        "without BOS and outliers": rows.kind == ORDINARY,
    }
    return {
        "rows": int(kept.sum()),
        "documents": len(np.unique(rows.document[kept])),
        "variance_explained": {
            name: _variance_explained(rows, mask) for name, mask in subsets.items() if mask.any()
        },
        "batch_mean": float(1 - rows.squared_error[kept].sum() / rows.about_batch[kept].sum()),
        "mean_of_ratios": float(np.mean(1 - rows.squared_error[kept] / rows.about_batch[kept])),
        "variance_of_error": 1 - spread[0].m2.sum() / spread[1].m2.sum(),
        "scalar": _scalar(rows, kept, spread[1]),
        **_reconstruction(_take(rows, kept), subject.store.d_model),
        "coverage": _coverage(latents, int(kept.sum())),
        **_dead(latents, int(kept.sum())),
        "density": _density(latents, int(kept.sum())),
        "activations": _histogram(np.log10(activations)) if len(activations) else None,
        "decoder_cosine": _decoder_cosine(subject.sae.W_dec),
        "by_position": _by_position(_take(rows, kept)),
        "by_norm_decile": _by_norm_decile(_take(rows, kept)),
    }


# -- the pass --------------------------------------------------------------------------------------


def _measure(
    subject: Subject, limit: int
) -> tuple[Rows, Latents, tuple[Moments, Moments], NDArray[np.float32]]:
    d_sae, d_model = subject.sae.d_sae, subject.sae.d_model
    never = np.iinfo(np.int64).max
    latents = Latents(np.zeros(d_sae, np.int64), np.full(d_sae, never))
    error_moments, row_moments = Moments.empty(d_model), Moments.empty(d_model)
    parts: list[Rows] = []
    sample: list[NDArray[np.float32]] = []
    mean = torch.from_numpy(subject.moments.mean).to(subject.device)
    seen = 0
    for unit in subject.rows(limit):
        for part in _batches(unit):
            x = part.rows.double()
            kept = subject.sae.encode(part.rows)
            error = x - subject.sae.decode(kept).double()
            mask = np.isin(part.kind, subject.policy.kinds)
            batch_mean = x[torch.from_numpy(mask).to(x.device)].mean(0) if mask.any() else mean
            parts.append(_row_figures(part, x, error, mean, batch_mean, kept.active()))
            values, indices, row = (t.cpu().numpy() for t in kept[:3])
            counted = mask[row] & (values > 0)
            number = np.cumsum(mask) - 1  # of each row among those that the policy keeps
            _count(latents, indices[counted], number[row[counted]] + seen)
            sample.append(
                values[counted & (number[row] < 64)]
            )  # for a histogram: all would be k values a row
            seen += int(mask.sum())
            error_moments = error_moments.merge(Moments.of(error.cpu().numpy()[mask]))
            row_moments = row_moments.merge(Moments.of(x.cpu().numpy()[mask]))
    latents.first = np.minimum(latents.first, seen)
    columns = zip(*parts, strict=True)
    return (
        Rows._make(map(np.concatenate, columns)),
        latents,
        (error_moments, row_moments),
        np.concatenate(sample),
    )


def _batches(unit: Unit) -> Iterator[Unit]:
    for at in range(0, len(unit.rows), BATCH_ROWS):
        part = slice(at, at + BATCH_ROWS)
        yield Unit._make([unit.number, *(column[part] for column in unit[1:])])


def _row_figures(
    unit: Unit, x: Tensor, error: Tensor, mean: Tensor, batch_mean: Tensor, l0: Tensor
) -> Rows:
    hat = x - error
    figures = (
        error.square().sum(1),
        (x - mean).square().sum(1),
        (x - batch_mean).square().sum(1),
        x.square().sum(1),
        (x * hat).sum(1),
        hat.square().sum(1),
        l0,
    )
    return Rows._make(
        [
            *(figure.cpu().numpy() for figure in figures),
            unit.document,
            unit.position,
            unit.norm,
            unit.kind,
        ]
    )


def _count(latents: Latents, fired: NDArray[np.int64], row: NDArray[np.int64]) -> None:
    """Count latents that fired, and the number of the row in which each did."""
    latents.fired += np.bincount(fired, minlength=len(latents.fired))
    np.minimum.at(latents.first, fired, row)


# -- figures ---------------------------------------------------------------------------------------


def _take(rows: Rows, mask: NDArray[np.bool_]) -> Rows:
    return Rows._make(column[mask] for column in rows)


def _variance_explained(every: Rows, mask: NDArray[np.bool_]) -> dict[str, Any]:
    rows = _take(every, mask)
    centred, interval = variance_explained(rows.document, rows.squared_error, rows.about_mean)
    return {"rows": int(mask.sum()), "centred": centred, "centred_95": list(interval)}


def _scalar(rows: Rows, kept: NDArray[np.bool_], spread: Moments) -> float:
    elements = spread.count * len(spread.mean)
    variance = (rows.squared[kept].sum() - (spread.mean.sum() * spread.count) ** 2 / elements) / (
        elements - 1
    )
    return float(1 - rows.squared_error[kept].sum() / elements / variance)


def _reconstruction(rows: Rows, d_model: int) -> dict[str, float]:
    norms = np.sqrt(rows.squared), np.sqrt(rows.squared_hat)
    cosine = rows.dot / np.maximum(norms[0] * norms[1], np.finfo(np.float64).tiny)
    return {
        "mse_per_element": float(rows.squared_error.mean() / d_model),
        "mse_per_row": float(rows.squared_error.mean()),
        "l0": float(rows.l0.mean()),
        "cosine": float(cosine.mean()),
        "l2_ratio": float((norms[1] / norms[0]).mean()),
        "shrinkage": float(
            rows.squared_hat.sum() / rows.dot.sum()
        ),  # E|x_hat|^2 / E<x, x_hat>; 1 is none
    }


def _coverage(latents: Latents, rows: int) -> list[dict[str, float]]:
    """Share of latents that have fired within the first n rows, for n doubling from 256 to all
    rows.
    """
    spans = [n for power in range(8, 40) if (n := 1 << power) < rows]
    return [{"rows": n, "share": float((latents.first < n).mean())} for n in [*spans, rows]]


def _dead(latents: Latents, rows: int) -> dict[str, Any]:
    return {
        "d_sae": len(latents.fired),
        "silent": int((latents.fired == 0).sum()),
        "silent_for": {
            str(span): int((latents.first >= span).sum()) for span in _DEAD_SPANS if span <= rows
        },
    }


def _density(latents: Latents, rows: int) -> dict[str, Any]:
    density = latents.fired / rows
    return {
        "above_1_percent": int((density > 0.01).sum()),
        "above_10_percent": int((density > 0.1).sum()),
        "log10": _histogram(np.log10(density[density > 0])) if density.any() else None,
    }


def _histogram(values: NDArray[Any]) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _decoder_cosine(W_dec: Tensor) -> dict[str, float]:
    """Each latent's largest cosine with another latent's direction."""
    largest = nearest(W_dec, W_dec, 1, itself=False)[0]
    return {
        "median": float(largest.median()),
        "max": float(largest.max()),
        "above_0.9": float((largest > 0.9).sum()),
    }


def _by_position(rows: Rows) -> list[dict[str, Any]]:
    """Figures by position in the document piece, in spans that double."""
    edges = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2**62]
    spans = [(0, 1), *pairwise(edges)]
    inside = [((low, high), (rows.position >= low) & (rows.position < high)) for low, high in spans]
    return [
        {"from": low, "to": int(rows.position[mask].max()), **_group(rows, mask)}
        for (low, _), mask in inside
        if mask.any()
    ]


def _by_norm_decile(rows: Rows) -> list[dict[str, Any]]:
    edges = np.quantile(rows.norm, np.linspace(0, 1, 11))
    decile = np.clip(np.searchsorted(edges, rows.norm, side="right") - 1, 0, 9)
    masks = [decile == number for number in range(10)]
    return [
        {
            "from": float(rows.norm[mask].min()),
            "to": float(rows.norm[mask].max()),
            **_group(rows, mask),
        }
        for mask in masks
        if mask.any()
    ]


def _group(rows: Rows, mask: NDArray[np.bool_]) -> dict[str, float]:
    error, total = rows.squared_error[mask], rows.about_mean[mask]
    return {
        "rows": int(mask.sum()),
        "centred": float(1 - error.sum() / total.sum()),
        "l0": float(rows.l0[mask].mean()),
    }


# -- output ----------------------------------------------------------------------------------------


def outcome_of(subject: Subject, figures: dict[str, Any]) -> Outcome:
    """The figures in words and tables."""
    model = subject.store.manifest["model"]["id"]
    trained = figures["variance_explained"]["as trained"]
    low, high = trained["centred_95"]
    explained = f"{trained['centred']:.4f} [{low:.4f}, {high:.4f}]"
    summary = [
        f"The SAE explains {explained} of the variance of {figures['rows']:,} held-out rows of "
        f"{figures['documents']:,} documents; brackets are 95 % intervals from resampling "
        "documents.",
        f"It has {figures['d_sae']:,} latents and L0 {figures['l0']:.1f}, on layer "
        f"{subject.layer} of {model}.",
    ]
    rows = [("variance explained, centred", explained)]
    rows += [(text, f"{figures[key]:.4f}") for key, text in NAMED.items()]
    if (lost := summary_of_layer.variance_lost(subject.store, subject.layer)) is not None:
        codec = subject.store.manifest["codec"]
        rows.append((f"variance of its rows that the store lost (codec {codec})", f"{lost:.2e}"))
    silent = f"{figures['silent']:,} of {figures['d_sae']:,}"
    rows.append(("latents silent on all held-out rows", silent))
    subsets = []
    for name, subset in figures["variance_explained"].items():
        subsets.append((name, f"{subset['rows']:,}", f"{subset['centred']:.4f}"))
    fired = [(f"{point['rows']:,}", f"{point['share']:.1%}") for point in figures["coverage"]]
    tables = [
        Table("Every definition", ("figure", "value"), rows),
        Table("By kind of row", ("rows", "number", "centred"), subsets),
        Table("Coverage", ("first rows", "latents that fired"), fired),
    ]
    return Outcome(figures, summary, tables)


def run(study: Study) -> Outcome:
    """Measure the SAE; quality.json and quality.md lie in the run's directory, too."""
    subject, options = study.subject, build(Options, "study", study.options)
    outcome = outcome_of(subject, quality(subject, options.rows))
    write(subject, outcome)
    return outcome


def write(subject: Subject, outcome: Outcome) -> None:
    """Write quality.json and quality.md into the run's directory."""
    record = {"sae": subject.digest, **outcome.figures}
    durable.write(subject.run / "quality.json", [json.dumps(record, indent=1).encode() + b"\n"])
    lines = [f"# Quality of {subject.run.name}", "", *markdown(outcome)]
    durable.write(subject.run / "quality.md", ["\n".join(lines).encode() + b"\n"])


DEFINITION = Definition(run, options=Options, order=0)
