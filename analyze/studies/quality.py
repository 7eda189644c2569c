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

Each is measured on several subsets of the rows, and a subset has one mean, its own: mu is over the
training rows that are in the subset, mean_b over the batch's rows that are in it. About a mean of
other rows too, a figure is too high: ordinary rows at .900 about their own mean are at .907 about
one that includes a BOS in 512 that is 100 times as long. The store has no mean of the training rows
of a span of positions or of norms; each span is about its own mean of the held-out rows.

`measure` is the pass. The functions below it turn what the pass keeps into figures.

Shapes: n rows, d d_model, F d_sae, S subsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze import stats
from residual_saes.analyze.latents.nearest import neighbours
from residual_saes.analyze.memory import Needed, of_pass, rows_read, width_of
from residual_saes.analyze.outcome import Outcome, Table, dumped, markdown
from residual_saes.analyze.reconstruction import (
    BATCH_ROWS,
    LINEAR,
    SHUFFLED,
    SKIP,
    TRAINED,
    Latents,
    Measured,
    Rows,
    Target,
    measure,
    of,
)
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.study import Definition, Study, at_least
from residual_saes.analyze.subject import Subject
from residual_saes.data.markdown import escaped
from residual_saes.data.rows import statistics
from residual_saes.data.rows import summary as summary_of_layer
from residual_saes.data.rows.split import Policy
from residual_saes.data.settings import build
from residual_saes.data.store.moments import Moments

_HISTOGRAM_BINS = 40
NAMED = {  # figures that are one number, as people read them
    "scalar": "variance explained, scalar (the reference SAE's definition)",
    "batch_mean": "variance explained, about the batch's mean (sparsify)",
    "mean_of_ratios": "variance explained, mean of the rows' ratios (SAELens, legacy)",
    "variance_of_error": "variance explained, by variance of the error (dictionary_learning)",
    "mse_per_element": "MSE per element",
    "l0": "L0, features per token",
    "cosine": "cosine of row and reconstruction",
    "l2_ratio": "norm of reconstruction / norm of row",
    "shrinkage": "shrinkage (1 is none)",
}

DEFINITIONS = {  # of variance explained, but for the headline's, by the heads of their columns
    "batch_mean": "batch mean",
    "mean_of_ratios": "mean of ratios",
    "variance_of_error": "variance of error",
    "scalar": "scalar",
}
_OF_BASELINE = {"explains": "explains", "more": "the transcoder explains more by"}
_OF_TARGET = {"cosine": "cosine", "l2_ratio": "norm of reconstruction / norm of row"}
SUBSET_HEADER = ("rows", "number", "centred", *DEFINITIONS.values(), "left out")
ABOUT = (
    "Each subset of the rows is centred about the mean of its own training rows, each span of "
    "positions or norms about the mean of its own held-out rows."
)
COVERAGE = (
    "Coverage is the mean over all orders of the rows; the reference's is of one random batch of "
    "4,096."
)


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/quality.yaml."""

    rows: int = 4_000_000  # held-out rows at most, in whole units

    def __post_init__(self) -> None:
        at_least("study.rows", self.rows, 1)


# -- figures ---------------------------------------------------------------------------------------


def quality(subject: Subject, limit: int) -> dict[str, Any]:
    """Every figure, as plain JSON.

    Args:
        limit: held-out rows to measure on, in whole units.

    Raises:
        StoreError: the run's policy keeps none of these rows.
    """
    measured = measure(subject, limit)
    every = measured.whole.rows
    rows = every.take(np.isin(every.kind, subject.policy.kinds))
    by_subset = _by_subset(measured, measured.whole)
    trained = by_subset[TRAINED]
    latents = measured.latents
    activations = measured.activations
    return {
        "rows": len(rows.kind),
        "documents": trained["documents"],
        "variance_explained": by_subset,
        **{key: trained[key] for key in DEFINITIONS},
        **_reconstruction(rows, subject.sae.d_out),
        "coverage": latents.coverage(),
        "d_sae": len(latents.fired),
        "silent": int((latents.fired == 0).sum()),
        "silent_for": latents.silent_for(),
        "density": _density(latents),
        "activations": _histogram(np.log10(activations)) if len(activations) else None,
        "decoder_cosine": decoder_cosine(neighbours(subject)[0][:, 0]),
        "by_position": measured.by_position.figures(),
        "by_norm_decile": measured.by_norm_decile.figures(),
        "by_k": measured.budgets.figures(rows.document, _about_mean(subject, measured, rows)),
        **_of_kind(subject, measured, rows),
    }


def _of_kind(subject: Subject, measured: Measured, rows: Rows) -> dict[str, Any]:
    """What there is of a transcoder or a crosscoder alone: its baselines, or its targets."""
    if subject.is_sae:
        return {}
    figures: dict[str, Any] = {"kind": subject.noun}
    if measured.baselines:
        about_mean = _about_mean(subject, measured, rows)
        figures["baselines"] = compared(rows, about_mean, measured.baselines.squares)
        fit = measured.baselines.linear
        figures["linear_rows"] = fit and fit.rows
    if measured.targets:
        figures["targets"] = {}
        for port in subject.ports.writes:
            target = measured.targets[port.name]
            own = target.rows.take(np.isin(target.rows.kind, subject.policy.kinds))
            width = len(target.subsets[subject.policy].mean)
            by_subset = _by_subset(measured, target)
            reconstruction = _reconstruction(own, width)
            figures["targets"][port.name] = {"variance_explained": by_subset, **reconstruction}
    return figures


def _about_mean(subject: Subject, measured: Measured, rows: Rows) -> Floats:
    """(n,) |y - mu|^2 of the rows as trained, about their own mean."""
    about_mean: Floats = rows.about_mean[:, list(measured.whole.subsets).index(subject.policy)]
    return about_mean


def compared(
    rows: Rows, about_mean: Floats, squares: Mapping[str, Floats]
) -> dict[str, dict[str, Any]]:
    """By baseline: the variance that it `explains`, and what the transcoder explains `more`.

    Each is a figure with its interval over documents; differences are paired.

    Args:
        about_mean: (n,) |y - mu|^2.
        squares: (n,) squared errors of each baseline.
    """
    figures = {}
    for name, squared_error in squares.items():
        explained = stats.variance_explained(rows.document, squared_error, about_mean)
        gain, total = stats.sums_by(rows.document, squared_error - rows.squared_error, about_mean)
        more = stats.figure(gain.sum() / total.sum(), stats.bootstrap_ratio(gain, total))
        figures[name] = {"explains": stats.figure(*explained), "more": more}
    return figures


def _by_subset(measured: Measured, target: Target) -> dict[str, dict[str, Any]]:
    every = target.rows
    by_subset = {}
    for name, policy in measured.names.items():
        by_subset[name] = variance_explained(measured, target, every, policy)
    return by_subset


def variance_explained(
    measured: Measured, target: Target, every: Rows, policy: Policy
) -> dict[str, Any]:
    """Every definition, of a target's rows that a policy keeps, and what it leaves out of `every`
    row.
    """
    subset = target.subsets[policy]
    rows = every.take(np.isin(every.kind, subset.kinds))
    column = list(target.subsets).index(policy)
    about_batch = rows.about_batch[:, column]
    total_error = rows.squared_error.sum()
    centred, interval = stats.variance_explained(
        rows.document, rows.squared_error, rows.about_mean[:, column]
    )
    spread = of(target.spread, subset)
    ratios = rows.squared_error[about_batch > 0] / about_batch[about_batch > 0]
    return {
        "rows": len(rows.kind),
        "documents": len(np.unique(rows.document)),
        "policy": policy.recorded(),
        "left_out": measured.left_out.left_out(policy),
        "mean_rows": subset.mean_rows,  # training rows that mu is the mean of
        "centred": centred,
        "centred_95": interval and list(interval),
        "batch_mean": float(1 - total_error / about_batch.sum()),
        "mean_of_ratios": float(1 - ratios.mean()),
        "variance_of_error": 1 - of(target.error, subset).m2.sum() / spread.m2.sum(),
        "scalar": _scalar(rows, spread),
    }


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


def decoder_cosine(largest: Tensor) -> dict[str, float]:
    """Figures of each latent's largest cosine with another latent's direction, (F,)."""
    return {
        "median": float(largest.median()),
        "max": float(largest.max()),
        "above_0.9": float((largest > 0.9).sum()),
    }


# -- output ----------------------------------------------------------------------------------------


def headline(figures: dict[str, Any]) -> str:
    """The figure to quote, and the rows and the energy that it says nothing of."""
    trained = figures["variance_explained"][TRAINED]
    return (
        f"The {figures.get('kind', 'SAE')} explains {_centred(trained)} of the variance of "
        f"{figures['rows']:,} held-out rows of {stats.counted(figures['documents'], 'document')}; "
        f"left out: {left_out(trained)}."
    )


def left_out(subset: dict[str, Any]) -> str:
    """The held-out rows that a subset's figures say nothing of, and their share of E|x|^2."""
    return statistics.told(Policy.of(subset["policy"]), subset["left_out"])


def _centred(subset: dict[str, Any]) -> str:
    return f"{stats.number(subset['centred'])} {stats.bracketed(subset['centred_95'], '#.4g')}"


def outcome_of(subject: Subject, figures: dict[str, Any]) -> Outcome:
    """The figures in words and tables."""
    model = subject.store.manifest["model"]["id"]
    summary = [
        f"{headline(figures)} {stats.resampled(figures['documents'], 'document')}",
        f"It has {figures['d_sae']:,} latents and L0 {figures['l0']:.1f}, on {subject.where} of "
        f"{model}.",
        *_verdicts(figures),
        f"Training left out {statistics.told(subject.policy, subject.config.get('left_out'))}.",
        f"{ABOUT} {COVERAGE}",
    ]
    trained = figures["variance_explained"][TRAINED]
    rows = [("variance explained, centred", _centred(trained))]
    rows += [(text, stats.number(figures[key])) for key, text in NAMED.items()]
    rows += _lost(subject)
    silent = f"{figures['silent']:,} of {figures['d_sae']:,}"
    rows.append(("latents silent on all held-out rows", silent))
    fired = [(f"{point['rows']:,}", f"{point['share']:.1%}") for point in figures["coverage"]]
    tables = [
        Table("Every definition, of the rows as trained", ("figure", "value"), rows),
        Table("Variance explained by kind of row", SUBSET_HEADER, subset_rows(figures)),
        Table("Coverage", ("rows", "latents that fire in so many"), fired),
    ]
    if by_k := figures["by_k"]:
        explained = [(str(at["k"]), stats.formatted(at["explained"], "#.4g")) for at in by_k]
        header = ("latents kept of a row", "variance explained, centred")
        tables.append(Table("With fewer latents, of the rows as trained", header, explained))
    return Outcome(figures, summary, [*tables_of_kind(figures), *tables])


def _lost(subject: Subject) -> Iterator[tuple[str, str]]:
    """What the stores' codec lost of the rows that are written."""
    several = len(subject.ports.writes) > 1
    for port in subject.ports.writes:
        store = subject.stores[port.store]
        lost = summary_of_layer.variance_lost(store, port.point)
        if lost is not None:
            of_port = f", {port}" if several else ""
            codec = store.manifest["codec"]
            yield (
                f"variance of its rows that the store lost (codec {codec}{of_port})",
                f"{lost:.2e}",
            )


def _verdicts(figures: dict[str, Any]) -> list[str]:
    """What a transcoder explains beside its baselines, or a crosscoder of each target."""
    if targets := figures.get("targets"):
        parts = [
            f"{_centred(of['variance_explained'][TRAINED])} of {name}"
            for name, of in targets.items()
        ]
        return [
            f"Target by target it explains {', '.join(parts)}; of all together, each scaled as in "
            "training, the share above."
        ]
    baselines = figures.get("baselines")
    if not baselines:
        return []
    skip = baselines[SKIP]
    gain = stats.formatted(skip["more"], "+.4f")
    adds = "The latents add" if _is_above(skip["more"]) else "The latents explain nothing: they add"
    lines = [
        f"{adds} {gain} to the {stats.formatted(skip['explains'], '.4f')} that is explained "
        "without them (b_dec, and the skip if there is one)."
    ]
    if LINEAR in baselines:
        other = baselines[LINEAR]
        than = "more" if _is_above(other["more"]) else "which is no more"
        lines[0] += (
            f" A linear map of {figures['linear_rows']:,} training rows explains "
            f"{stats.formatted(other['explains'], '.4f')}; the transcoder is at "
            f"{stats.formatted(other['more'], '+.4f')}, {than} than that."
        )
    null = baselines[SHUFFLED]
    if not _is_above(null["more"]):
        lines.append(
            "It knows no more of a token's own row than of another token's: it is worthless."
        )
    return lines


def _is_above(measured: dict[str, Any]) -> bool:
    """Whether a figure is above 0 with its whole interval."""
    interval = measured["interval"]
    return bool((measured["value"] if interval is None else interval[0]) > 0)


def tables_of_kind(figures: dict[str, Any]) -> list[Table]:
    """The table of a transcoder's baselines, or of a crosscoder's targets."""
    rows: list[tuple[str, ...]] = []
    if baselines := figures.get("baselines"):
        for name, of_baseline in baselines.items():
            explains, more = (stats.formatted(of_baseline[key], ".4f") for key in _OF_BASELINE)
            rows.append((name, explains, more))
        return [
            Table("Without latents, of the rows as trained", (" ", *_OF_BASELINE.values()), rows)
        ]
    if targets := figures.get("targets"):
        for name, of_target in targets.items():
            trained = of_target["variance_explained"][TRAINED]
            others = [stats.number(trained[key]) for key in DEFINITIONS]
            own = [stats.number(of_target[key]) for key in _OF_TARGET]
            rows.append((name, _centred(trained), *others, *own))
        header = ("target", "centred", *DEFINITIONS.values(), *_OF_TARGET.values())
        return [Table("Target by target, of the rows as trained", header, rows)]
    return []


def subset_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of `SUBSET_HEADER` for each subset."""
    rows = []
    for name, subset in figures["variance_explained"].items():
        others = [stats.number(subset[key]) for key in DEFINITIONS]
        count = f"{subset['rows']:,}"
        rows.append((name, count, _centred(subset), *others, left_out(subset)))
    return rows


def memory(study: Study) -> Needed:
    """Beside a pass seven float64 copies of a batch, and 40 numbers of each row; of several targets
    twice; and the products of a linear map.
    """
    subject = study.subject
    limit = build(Options, "study", study.options).rows
    targets = 2 if len(subject.ports.writes) > 1 else 1
    of_batch = 7 * 8 * BATCH_ROWS * subject.sae.d_out * targets
    of_rows = 40 * 8 * rows_read(subject, limit) * targets
    products = 0 if subject.ports.is_autoencoder else 24 * width_of(subject) ** 2
    needed = max(of_pass(subject, limit) + of_batch + of_rows, products)
    return Needed(needed, "study.rows")


def run(study: Study) -> Outcome:
    """Measure the SAE."""
    options = build(Options, "study", study.options)
    return outcome_of(study.subject, quality(study.subject, options.rows))


def beside(study: Study, outcome: Outcome) -> dict[str, bytes]:
    """quality.json and quality.md, which lie in the run's directory."""
    record = {"sae": study.subject.digest, **outcome.figures}
    lines = [f"# Quality of {escaped(study.subject.run.name)}", "", *markdown(outcome)]
    return {
        "quality.json": dumped(record).encode() + b"\n",
        "quality.md": "\n".join(lines).encode() + b"\n",
    }


DEFINITION = Definition(run, version=3, options=Options, memory=memory, order=0, beside=beside)
