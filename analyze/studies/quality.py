"""How well an SAE reconstructs rows that it was never trained on.

With e = x - x_hat on raw rows x (n, d), mu the training rows' mean, and b a batch of 4,096 rows,
variance explained has five published definitions. All are float64 and come from one pass:

    centred              1 - sum |e|^2 / sum |x - mu|^2            the figure to quote
    batch_mean           1 - sum |e|^2 / sum |x - mean_b(x)|^2     sparsify's 1 - FVU
    mean_of_ratios       mean of 1 - |e|^2 / |x - mean_b(x)|^2     SAELens' legacy figure
    variance_of_error    1 - sum_j Var(e_j) / sum_j Var(x_j)       dictionary_learning's; a constant
                                                                   error costs nothing
    scalar               1 - mean(e^2) / Var(all elements of x)    the reference SAE's; nearly
                                                                   uncentred, so higher

`measure` is the pass. The functions below it turn what the pass keeps into figures.

Shapes: n rows, d d_model, F d_sae.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from analyze import stats
from analyze.directions import nearest
from analyze.outcome import Outcome, Table, markdown
from analyze.stats import Floats
from analyze.study import Definition, Study, at_least
from analyze.subject import Subject, Unit, positive
from data import durable
from data.errors import StoreError
from data.rows import statistics
from data.rows import summary as summary_of_layer
from data.rows.split import stored_kind
from data.settings import build
from data.store.kinds import BOS, ORDINARY
from data.store.moments import Moments

BATCH_ROWS = 4096  # the reference's batch
DEAD_SPANS = (1_000_000, 10_000_000, 100_000_000)  # tokens
_SAMPLED_ROWS = 64  # of each batch, for the histogram of activations
_HISTOGRAM_BINS = 40
_POSITION_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2**62)
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


# -- the pass --------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What is kept of each row, (n,) each."""

    squared_error: Floats  # |e|^2
    about_mean: Floats  # |x - mu|^2
    about_batch: Floats  # |x - mean_b(x)|^2, the mean over the rows that the run's policy keeps
    squared: Floats  # |x|^2
    dot: Floats  # x . x_hat
    squared_hat: Floats  # |x_hat|^2
    l0: NDArray[np.int64]
    document: NDArray[np.uint32]
    position: NDArray[np.int64]
    norm: NDArray[np.float32]
    kind: NDArray[np.uint8]

    def take(self, mask: NDArray[np.bool_]) -> Rows:
        """The rows that `mask` (n,) chooses."""
        return Rows._make(column[mask] for column in self)


class Latents:
    """When each latent fires, over the rows that the run's policy keeps."""

    def __init__(self, d_sae: int) -> None:
        """No row is counted yet."""
        self.rows = 0
        self.fired = np.zeros(d_sae, np.int64)  # (F,) rows in which it fires
        # (F,) number of the first row in which it fires; huge if it never does
        self.first = np.full(d_sae, np.iinfo(np.int64).max)

    def add(self, latent: NDArray[np.int64], row: NDArray[np.int64], rows: int) -> None:
        """Count a batch of `rows` rows: each `latent` (p,) fires in the batch's row `row` (p,)."""
        self.fired += np.bincount(latent, minlength=len(self.fired))
        np.minimum.at(self.first, latent, row + self.rows)
        self.rows += rows

    def coverage(self) -> list[dict[str, float]]:
        """Share of latents that fired in the first n rows, n doubling from 256 to all rows."""
        spans = []
        span = 256
        while span < self.rows:
            spans.append(span)
            span *= 2
        spans.append(self.rows)
        return [{"rows": span, "share": float((self.first < span).mean())} for span in spans]

    def silent_for(self, spans: Sequence[int] = DEAD_SPANS) -> dict[str, int]:
        """Latents that fire in none of the first n rows, for each n in `spans` that was read."""
        silent = {}
        for span in spans:
            if span <= self.rows:
                silent[str(span)] = int((self.first >= span).sum())
        return silent


class Measured(NamedTuple):
    """What the pass keeps."""

    rows: Rows  # every finite held-out row, BOS and outliers too
    # The rest is of the rows that the run's policy keeps.
    latents: Latents
    error: Moments  # of e
    spread: Moments  # of x
    activations: NDArray[np.float32]  # a sample, > 0


def measure(subject: Subject, limit: int) -> Measured:
    """Encode and decode the held-out rows, and sum what the figures need.

    Args:
        limit: held-out rows to measure on, in whole units.
    """
    sae = subject.sae
    latents = Latents(sae.d_sae)
    error_moments = Moments.empty(sae.d_model)
    row_moments = Moments.empty(sae.d_model)
    parts: list[Rows] = []
    activations: list[NDArray[np.float32]] = []
    for unit in subject.rows(limit):
        for batch in _batches(unit):
            # Reconstruct the batch.
            x = batch.rows.double()
            kept = sae.encode(batch.rows)
            error = x - sae.decode(kept).double()

            # Every row's squares: variance explained is the ratio of two of their sums.
            trained = batch.of_kinds(subject.policy.kinds)
            mean_b = x[trained].mean(0) if trained.any() else subject.mean
            parts.append(_rows(batch, x, error, subject.about_mean(x), mean_b, kept.active()))
            error_moments = error_moments.merge(Moments.of(error.cpu().numpy()[trained]))
            row_moments = row_moments.merge(Moments.of(x.cpu().numpy()[trained]))

            # Which latents fire, by the number of the row among those that the policy keeps.
            latent, row, value = (column.cpu().numpy() for column in positive(kept))
            counted = trained[row]
            number = (np.cumsum(trained) - 1)[row[counted]]
            latents.add(latent[counted], number, int(trained.sum()))
            activations.append(value[counted][number < _SAMPLED_ROWS])
    return Measured(
        rows=Rows._make(np.concatenate(column) for column in zip(*parts, strict=True)),
        latents=latents,
        error=error_moments,
        spread=row_moments,
        activations=np.concatenate(activations),
    )


def _batches(unit: Unit) -> Iterator[Unit]:
    """The unit in parts of BATCH_ROWS rows."""
    for start in range(0, len(unit.rows), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        yield Unit._make([unit.number, *(column[part] for column in unit[1:])])


def _rows(
    unit: Unit, x: Tensor, error: Tensor, about_mean: Tensor, mean_b: Tensor, l0: Tensor
) -> Rows:
    x_hat = x - error
    return Rows(
        squared_error=error.square().sum(1).cpu().numpy(),
        about_mean=about_mean.cpu().numpy(),
        about_batch=(x - mean_b).square().sum(1).cpu().numpy(),
        squared=x.square().sum(1).cpu().numpy(),
        dot=(x * x_hat).sum(1).cpu().numpy(),
        squared_hat=x_hat.square().sum(1).cpu().numpy(),
        l0=l0.cpu().numpy(),
        document=unit.document,
        position=unit.position,
        norm=unit.norm,
        kind=unit.kind,
    )


# -- figures ---------------------------------------------------------------------------------------


def quality(subject: Subject, limit: int) -> dict[str, Any]:
    """Every figure, as plain JSON.

    Args:
        limit: held-out rows to measure on, in whole units.

    Raises:
        StoreError: the run's policy keeps none of these rows.
    """
    measured = measure(subject, limit)
    every = measured.rows
    kept = np.isin(every.kind, subject.policy.kinds)
    if not kept.any():
        raise StoreError(
            f"no held-out row of {subject.store.name} passes the run's policy {subject.policy}"
        )
    rows = every.take(kept)
    latents = measured.latents
    unexplained = rows.squared_error / rows.about_batch
    activations = measured.activations
    return {
        "rows": len(rows.kind),
        "documents": len(np.unique(rows.document)),
        "variance_explained": variance_explained(every, kept),
        "batch_mean": float(1 - rows.squared_error.sum() / rows.about_batch.sum()),
        "mean_of_ratios": float(np.mean(1 - unexplained)),
        "variance_of_error": 1 - measured.error.m2.sum() / measured.spread.m2.sum(),
        "scalar": _scalar(rows, measured.spread),
        **_reconstruction(rows, subject.store.d_model),
        "coverage": latents.coverage(),
        "d_sae": len(latents.fired),
        "silent": int((latents.fired == 0).sum()),
        "silent_for": latents.silent_for(),
        "density": _density(latents),
        "activations": _histogram(np.log10(activations)) if len(activations) else None,
        "decoder_cosine": decoder_cosine(subject.sae.W_dec),
        "by_position": _by_position(rows),
        "by_norm_decile": _by_norm_decile(rows),
    }


def variance_explained(rows: Rows, kept: NDArray[np.bool_]) -> dict[str, Any]:
    """The centred figure with its interval over documents, for several subsets of the rows.

    Args:
        kept: (n,) the rows that the run's policy keeps.
    """
    stored = stored_kind(rows.kind)
    subsets = {
        "as trained": kept,
        "all rows": np.ones(len(kept), np.bool_),
        "without BOS": stored != BOS,
        "without BOS and outliers": stored == ORDINARY,
    }
    figures = {}
    for name, mask in subsets.items():
        if mask.any():
            subset = rows.take(mask)
            centred, interval = stats.variance_explained(
                subset.document, subset.squared_error, subset.about_mean
            )
            figures[name] = {
                "rows": int(mask.sum()),
                "centred": centred,
                "centred_95": list(interval),
            }
    return figures


def _scalar(rows: Rows, spread: Moments) -> float:
    elements = spread.count * len(spread.mean)
    total = spread.mean.sum() * spread.count
    variance = (rows.squared.sum() - total**2 / elements) / (elements - 1)
    return float(1 - rows.squared_error.sum() / elements / variance)


def _reconstruction(rows: Rows, d_model: int) -> dict[str, float]:
    norm = np.sqrt(rows.squared)
    norm_hat = np.sqrt(rows.squared_hat)
    cosine = rows.dot / np.maximum(norm * norm_hat, np.finfo(np.float64).tiny)
    return {
        "mse_per_element": float(rows.squared_error.mean() / d_model),
        "mse_per_row": float(rows.squared_error.mean()),
        "l0": float(rows.l0.mean()),
        "cosine": float(cosine.mean()),
        "l2_ratio": float((norm_hat / norm).mean()),
        # E|x_hat|^2 / E<x, x_hat>; 1 is none
        "shrinkage": float(rows.squared_hat.sum() / rows.dot.sum()),
    }


def _density(latents: Latents) -> dict[str, Any]:
    density = latents.fired / latents.rows
    return {
        "above_1_percent": int((density > 0.01).sum()),
        "above_10_percent": int((density > 0.1).sum()),
        "log10": _histogram(np.log10(density[density > 0])) if density.any() else None,
    }


def _histogram(values: NDArray[Any]) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def decoder_cosine(W_dec: Tensor) -> dict[str, float]:
    """Figures of each latent's largest cosine with another latent's direction, W_dec (F, d)."""
    largest = nearest(W_dec, W_dec, 1, itself=False)[0]
    return {
        "median": float(largest.median()),
        "max": float(largest.max()),
        "above_0.9": float((largest > 0.9).sum()),
    }


def _by_position(rows: Rows) -> list[dict[str, Any]]:
    """Figures by position in the document piece, in spans that double."""
    groups = []
    for low, high in pairwise(_POSITION_EDGES):
        mask = (rows.position >= low) & (rows.position < high)
        if mask.any():
            last = int(rows.position[mask].max())
            groups.append({"from": low, "to": last, **_group(rows.take(mask))})
    return groups


def _by_norm_decile(rows: Rows) -> list[dict[str, Any]]:
    edges = np.quantile(rows.norm, np.linspace(0, 1, 11))
    decile = np.clip(np.searchsorted(edges, rows.norm, side="right") - 1, 0, 9)
    groups = []
    for number in range(10):
        mask = decile == number
        if mask.any():
            norm = rows.norm[mask]
            span = {"from": float(norm.min()), "to": float(norm.max())}
            groups.append({**span, **_group(rows.take(mask))})
    return groups


def _group(rows: Rows) -> dict[str, float]:
    return {
        "rows": len(rows.kind),
        "centred": float(1 - rows.squared_error.sum() / rows.about_mean.sum()),
        "l0": float(rows.l0.mean()),
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
        f"Training left out {statistics.told(subject.policy, subject.config.get('left_out'))}.",
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
    options = build(Options, "study", study.options)
    outcome = outcome_of(study.subject, quality(study.subject, options.rows))
    write(study.subject, outcome)
    return outcome


def write(subject: Subject, outcome: Outcome) -> None:
    """Write quality.json and quality.md into the run's directory."""
    record = {"sae": subject.digest, **outcome.figures}
    durable.write(subject.run / "quality.json", [json.dumps(record, indent=1).encode() + b"\n"])
    lines = [f"# Quality of {subject.run.name}", "", *markdown(outcome)]
    durable.write(subject.run / "quality.md", ["\n".join(lines).encode() + b"\n"])


DEFINITION = Definition(run, options=Options, order=0)
