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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from analyze import stats
from analyze.directions import neighbours
from analyze.memory import Needed, of_pass, rows_read
from analyze.outcome import Outcome, Table, dumped, markdown
from analyze.stats import Floats
from analyze.study import Definition, Study, at_least
from analyze.subject import Subject, Unit, positive, taken
from data.errors import StoreError
from data.journal import Progress
from data.markdown import escaped
from data.rows import statistics
from data.rows import summary as summary_of_layer
from data.rows.split import EXCLUDED, Policy, held_out_units, require_complete, stored_kind
from data.settings import build
from data.store.kinds import NON_FINITE
from data.store.moments import Moments, merge_all
from train.kernels import Kept

BATCH_ROWS = 4096  # the reference's batch
DEAD_SPANS = (1_000_000, 10_000_000, 100_000_000)  # tokens
_SAMPLED_ROWS = 64  # of each batch, for the histogram of activations
_HISTOGRAM_BINS = 40
_POSITION_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # between spans of positions
# Of the rows' squares: a span with less variance, as BOS rows have, has no share of it explained.
_NO_VARIANCE = 1e-12
TRAINED = "as trained"  # the subset of the headline: the rows that the run's policy keeps
_OTHERS = {
    "all rows": Policy(drop_bos=False, drop_outliers=False),
    "without BOS": Policy(drop_outliers=False),
    "without BOS and outliers": Policy(),
}
NAMED = {  # figures that are one number, as people read them
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

DEFINITIONS = {  # of variance explained, but for the headline's, by the heads of their columns
    "batch_mean": "batch mean",
    "mean_of_ratios": "mean of ratios",
    "variance_of_error": "variance of error",
    "scalar": "scalar",
}
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


# -- the pass --------------------------------------------------------------------------------------


class Subset(NamedTuple):
    """Rows that figures are of, and the mean that they are about."""

    kinds: tuple[int, ...]  # of its rows, as the run's `Policy.kinds_of` has them
    mean: Tensor  # (d,) float64, of the training rows
    mean_rows: int  # that the mean is over

    @classmethod
    def of(cls, subject: Subject, policy: Policy) -> Subset:
        """The rows that a policy keeps: the run's, or one without drop_tokens."""
        every = np.arange(2 * EXCLUDED, dtype=np.uint8)
        kinds = every if policy.drop_tokens else stored_kind(every)
        kept = np.flatnonzero(np.isin(kinds, policy.kinds)).tolist()
        moments = statistics.of_training(subject.store, subject.layer, policy).moments
        return cls(tuple(kept), torch.from_numpy(moments.mean).to(subject.device), moments.count)


class Rows(NamedTuple):
    """What is kept of each row, (n,) each, or (n, S) by subset."""

    squared_error: Floats  # |e|^2
    about_mean: Floats  # (n, S) |x - mu|^2
    about_batch: Floats  # (n, S) |x - mean_b(x)|^2
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
    """How often each latent fires, over the rows that the run's policy keeps."""

    def __init__(self, d_sae: int) -> None:
        """No row is counted yet."""
        self.rows = 0
        self.fired = np.zeros(d_sae, np.int64)  # (F,) rows in which it fires

    def add(self, latent: NDArray[np.int64], rows: int) -> None:
        """Count `rows` rows in which `latent` (p,) fire, each once a row."""
        self.fired += np.bincount(latent, minlength=len(self.fired))
        self.rows += rows

    def coverage(self) -> list[dict[str, float]]:
        """Share of latents that fire in n rows, n doubling from 256 to all rows."""
        spans = []
        span = 256
        while span < self.rows:
            spans.append(span)
            span *= 2
        spans.append(self.rows)
        return [{"rows": span, "share": float(self.seen_in(span).mean())} for span in spans]

    def silent_for(self, spans: Sequence[int] = DEAD_SPANS) -> dict[str, float]:
        """How many latents fire in none of n rows, for each n in `spans` that was read."""
        silent = {}
        for span in spans:
            if span <= self.rows:
                silent[str(span)] = float((1 - self.seen_in(span)).sum())
        return silent

    def seen_in(self, span: int) -> Floats:
        """(F,) the probability that each latent fires in `span` of the rows, drawn at random.

        It is the mean over every order of the rows; in stored order the first rows are of few
        documents. A latent that fires in f of N rows fires in none of n with probability
        C(N - f, n) / C(N, n) (Hurlbert, 1971).
        """
        left = self.rows - self.fired
        possible = left >= span
        log_ways = gammaln(left + 1) - gammaln(self.rows + 1)
        log_ways += gammaln(self.rows - span + 1) - gammaln(np.maximum(left - span, 0) + 1)
        return 1 - np.where(possible, np.exp(log_ways), 0.0)


class Group:
    """Rows of a span of positions or of norms, about their own mean."""

    def __init__(self, d_model: int) -> None:
        """No row is counted yet."""
        self.low = math.inf
        self.high = -math.inf
        self.spread = Moments.empty(d_model)
        self.squared_error = 0.0
        self.squared = 0.0
        self.active = 0

    def add(self, value: NDArray[Any], x: Floats, rows: Rows) -> None:
        """Count rows x (n, d) with their positions or norms (n,)."""
        self.low = min(self.low, value.min().item())
        self.high = max(self.high, value.max().item())
        self.spread = self.spread.merge(Moments.of(x))
        self.squared_error += rows.squared_error.sum()
        self.squared += rows.squared.sum()
        self.active += int(rows.l0.sum())

    def figures(self) -> dict[str, float]:
        """Its rows, variance explained and L0."""
        total = self.spread.m2.sum()
        varies = total > _NO_VARIANCE * self.squared
        return {
            "from": self.low,
            "to": self.high,
            "rows": self.spread.count,
            "centred": float(1 - self.squared_error / total) if varies else math.nan,
            "l0": self.active / self.spread.count,
        }


class Groups:
    """Rows in spans of a value."""

    def __init__(self, edges: Sequence[float], d_model: int) -> None:
        """No row is counted yet.

        Args:
            edges: between the spans; a value at an edge is above it.
        """
        self._edges = np.asarray(edges)
        self._groups = [Group(d_model) for _ in range(len(edges) + 1)]

    def add(self, value: NDArray[Any], x: Floats, rows: Rows) -> None:
        """Count rows x (n, d) with their values (n,)."""
        span = np.searchsorted(self._edges, value, side="right")
        for number in np.unique(span):
            mask = span == number
            self._groups[number].add(value[mask], x[mask], rows.take(mask))

    def figures(self) -> list[dict[str, float]]:
        """Those of every span that has rows."""
        return [group.figures() for group in self._groups if group.spread.count]


class Measured:
    """What the pass keeps."""

    def __init__(self, subject: Subject, limit: int) -> None:
        """Begin; norms are read beforehand, since their deciles are spans of rows."""
        d_model = subject.store.d_model
        require_complete(subject.store, subject.layer)
        self.names = {TRAINED: subject.policy, **_OTHERS}
        self.subsets = {
            policy: Subset.of(subject, policy) for policy in dict.fromkeys(self.names.values())
        }
        self.left_out = statistics.Tally()
        self.error: dict[int, Moments] = {}  # of e, by kind
        self.spread: dict[int, Moments] = {}  # of x, by kind
        # The rest is of the rows that the run's policy keeps.
        self.latents = Latents(subject.sae.d_sae)
        deciles = np.quantile(_norms(subject, limit), np.linspace(0.1, 0.9, 9))
        self.by_position = Groups(_POSITION_EDGES, d_model)
        self.by_norm_decile = Groups(deciles.tolist(), d_model)
        self._kinds = subject.policy.kinds
        self._rows: list[Rows] = []  # every finite row, BOS and outliers too
        self._activations: list[NDArray[np.float32]] = []  # a sample, > 0

    def add(self, batch: Unit, kept: Kept, x_hat: Tensor) -> None:
        """Count a batch and its reconstruction."""
        x = batch.rows.double()
        error = x - x_hat.double()
        exact = x.cpu().numpy()
        of_batch = _by_kind(exact, batch.kind)
        _merge(self.spread, of_batch)
        _merge(self.error, _by_kind(error.cpu().numpy(), batch.kind))

        # Every row's squares: variance explained is the ratio of two of their sums.
        subsets = self.subsets.values()
        batch_means = [torch.from_numpy(_of(of_batch, subset).mean) for subset in subsets]
        rows = _rows(batch, x, error, [subset.mean for subset in subsets], batch_means, kept)
        self._rows.append(rows)
        self.left_out.add(batch.kind, rows.squared)
        trained = batch.of_kinds(self._kinds)
        self.by_position.add(batch.position[trained], exact[trained], rows.take(trained))
        self.by_norm_decile.add(batch.norm[trained], exact[trained], rows.take(trained))

        # Which latents fire, and a sample of their values from the batch's first rows.
        latent, row, value = (column.cpu().numpy() for column in positive(kept))
        counted = trained[row]
        self.latents.add(latent[counted], int(trained.sum()))
        number = (np.cumsum(trained) - 1)[row[counted]]
        self._activations.append(value[counted][number < _SAMPLED_ROWS])

    @property
    def rows(self) -> Rows:
        return Rows._make(np.concatenate(column) for column in zip(*self._rows, strict=True))

    @property
    def activations(self) -> NDArray[np.float32]:
        return np.concatenate(self._activations)


def measure(subject: Subject, limit: int) -> Measured:
    """Encode and decode the held-out rows, and sum what the figures need.

    Args:
        limit: held-out rows to measure on, in whole units.

    Raises:
        StoreError: the run's policy keeps none of these rows.
    """
    measured = Measured(subject, limit)
    progress = Progress()
    read = 0
    for unit in subject.rows(limit):
        encoded = subject.encoded(unit)
        for numbers, batch in _batches(unit):
            kept = taken(encoded, numbers)
            measured.add(batch, kept, subject.sae.decode(kept))
            read += len(numbers)
            progress.show(f"{read:,} rows measured")
    return measured


def _norms(subject: Subject, limit: int) -> NDArray[np.float32]:
    """(n,) norms of the rows that the run's policy keeps, of those that `Subject.rows` yields."""
    store = subject.store
    norms = []
    read = 0
    for number in held_out_units(store):
        kind = subject.policy.kinds_of(store, subject.layer, number)
        norms.append(store.norms(subject.layer, number)[np.isin(kind, subject.policy.kinds)])
        read += int((kind != NON_FINITE).sum())
        if read >= limit:
            break
    if not any(map(len, norms)):
        raise StoreError(
            f"no held-out row of {store.name} passes the run's policy {subject.policy}"
        )
    return np.concatenate(norms)


def _batches(unit: Unit) -> Iterator[tuple[Tensor, Unit]]:
    """The unit in parts of BATCH_ROWS rows, each with the numbers of its rows."""
    numbers = torch.arange(len(unit.rows), device=unit.rows.device)
    for start in range(0, len(unit.rows), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        yield numbers[part], Unit._make([unit.number, *(column[part] for column in unit[1:])])


def _by_kind(rows: Floats, kind: NDArray[np.uint8]) -> dict[int, Moments]:
    """Moments of rows (n, d) by their kind (n,)."""
    return {int(number): Moments.of(rows[kind == number]) for number in np.unique(kind)}


def _merge(into: dict[int, Moments], of_batch: dict[int, Moments]) -> None:
    """Merge a batch's moments into those so far, in place."""
    for kind, moments in of_batch.items():
        into[kind] = into[kind].merge(moments) if kind in into else moments


def _of(by_kind: dict[int, Moments], subset: Subset) -> Moments:
    """The moments of a subset's rows."""
    return merge_all([by_kind[kind] for kind in by_kind if kind in subset.kinds], len(subset.mean))


def _rows(
    unit: Unit,
    x: Tensor,
    error: Tensor,
    means: Sequence[Tensor],
    batch_means: Sequence[Tensor],
    kept: Kept,
) -> Rows:
    x_hat = x - error
    return Rows(
        squared_error=error.square().sum(1).cpu().numpy(),
        about_mean=_about(x, means),
        about_batch=_about(x, batch_means),
        squared=x.square().sum(1).cpu().numpy(),
        dot=(x * x_hat).sum(1).cpu().numpy(),
        squared_hat=x_hat.square().sum(1).cpu().numpy(),
        l0=kept.active().cpu().numpy(),
        document=unit.document,
        position=unit.position,
        norm=unit.norm,
        kind=unit.kind,
    )


def _about(x: Tensor, means: Sequence[Tensor]) -> Floats:
    """(n, S) |x - mean|^2 of rows x (n, d) about each of some means (d,)."""
    about = [(x - mean.to(x.device)).square().sum(1) for mean in means]
    return torch.stack(about, 1).cpu().numpy()


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
    rows = every.take(np.isin(every.kind, subject.policy.kinds))
    by_subset = {}
    for name, policy in measured.names.items():
        by_subset[name] = variance_explained(measured, every, policy)
    trained = by_subset[TRAINED]
    latents = measured.latents
    activations = measured.activations
    return {
        "rows": len(rows.kind),
        "documents": trained["documents"],
        "variance_explained": by_subset,
        **{key: trained[key] for key in DEFINITIONS},
        **_reconstruction(rows, subject.store.d_model),
        "coverage": latents.coverage(),
        "d_sae": len(latents.fired),
        "silent": int((latents.fired == 0).sum()),
        "silent_for": latents.silent_for(),
        "density": _density(latents),
        "activations": _histogram(np.log10(activations)) if len(activations) else None,
        "decoder_cosine": decoder_cosine(neighbours(subject)[0][:, 0]),
        "by_position": measured.by_position.figures(),
        "by_norm_decile": measured.by_norm_decile.figures(),
    }


def variance_explained(measured: Measured, every: Rows, policy: Policy) -> dict[str, Any]:
    """Every definition, of the rows that a policy keeps, and what it leaves out of `every` row."""
    subset = measured.subsets[policy]
    rows = every.take(np.isin(every.kind, subset.kinds))
    column = list(measured.subsets).index(policy)
    about_batch = rows.about_batch[:, column]
    total_error = rows.squared_error.sum()
    centred, interval = stats.variance_explained(
        rows.document, rows.squared_error, rows.about_mean[:, column]
    )
    spread = _of(measured.spread, subset)
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
        "variance_of_error": 1 - _of(measured.error, subset).m2.sum() / spread.m2.sum(),
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
        f"The SAE explains {_centred(trained)} of the variance of {figures['rows']:,} held-out "
        f"rows of {figures['documents']:,} documents; left out: {left_out(trained)}."
    )


def left_out(subset: dict[str, Any]) -> str:
    """The held-out rows that a subset's figures say nothing of, and their share of E|x|^2."""
    return statistics.told(Policy.of(subset["policy"]), subset["left_out"])


def _centred(subset: dict[str, Any]) -> str:
    return f"{subset['centred']:.4f} {stats.bracketed(subset['centred_95'], '.4f')}"


def outcome_of(subject: Subject, figures: dict[str, Any]) -> Outcome:
    """The figures in words and tables."""
    model = subject.store.manifest["model"]["id"]
    summary = [
        f"{headline(figures)} {stats.resampled(figures['documents'], 'document')}",
        f"It has {figures['d_sae']:,} latents and L0 {figures['l0']:.1f}, on layer "
        f"{subject.layer} of {model}.",
        f"Training left out {statistics.told(subject.policy, subject.config.get('left_out'))}.",
        f"{ABOUT} {COVERAGE}",
    ]
    trained = figures["variance_explained"][TRAINED]
    rows = [("variance explained, centred", _centred(trained))]
    rows += [(text, f"{figures[key]:.4f}") for key, text in NAMED.items()]
    if (lost := summary_of_layer.variance_lost(subject.store, subject.layer)) is not None:
        codec = subject.store.manifest["codec"]
        rows.append((f"variance of its rows that the store lost (codec {codec})", f"{lost:.2e}"))
    silent = f"{figures['silent']:,} of {figures['d_sae']:,}"
    rows.append(("latents silent on all held-out rows", silent))
    fired = [(f"{point['rows']:,}", f"{point['share']:.1%}") for point in figures["coverage"]]
    tables = [
        Table("Every definition, of the rows as trained", ("figure", "value"), rows),
        Table("Variance explained by kind of row", SUBSET_HEADER, subset_rows(figures)),
        Table("Coverage", ("rows", "latents that fire in so many"), fired),
    ]
    return Outcome(figures, summary, tables)


def subset_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of `SUBSET_HEADER` for each subset."""
    rows = []
    for name, subset in figures["variance_explained"].items():
        others = [f"{subset[key]:.4f}" for key in DEFINITIONS]
        count = f"{subset['rows']:,}"
        rows.append((name, count, _centred(subset), *others, left_out(subset)))
    return rows


def memory(study: Study) -> Needed:
    """Beside a pass seven float64 copies of a batch, and 30 numbers of each row."""
    subject = study.subject
    limit = build(Options, "study", study.options).rows
    of_batch = 7 * 8 * BATCH_ROWS * subject.sae.d_model
    of_rows = 30 * 8 * rows_read(subject, limit)
    return Needed(of_pass(subject, limit) + of_batch + of_rows, "study.rows")


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


DEFINITION = Definition(run, version=2, options=Options, memory=memory, order=0, beside=beside)
