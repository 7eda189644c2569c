"""The pass over held-out rows that `study=quality` makes: what is kept of rows and of latents.

Squares are kept of the rows that are written, target by target. Of a crosscoder there are the
targets one by one, and all of them together, each scaled as in training. Of a transcoder there are
baselines beside it: see `Baselines`.

Shapes: n rows, d the width of what is explained, F d_sae, S subsets.

Figures of rows are made on the host, so each batch waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze import linear
from residual_saes.analyze.latents.budgets import Budgets
from residual_saes.analyze.latents.encoding import Unit, positive, taken
from residual_saes.analyze.linear import LinearMap
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import StoreError
from residual_saes.data.journal import Progress
from residual_saes.data.rows import statistics
from residual_saes.data.rows.split import EXCLUDED, Policy, held_out_units, stored_kind
from residual_saes.data.store.kinds import NON_FINITE
from residual_saes.data.store.moments import Moments, merge_all
from residual_saes.train.kernels import Kept
from residual_saes.train.ports import Port

BATCH_ROWS = 4096  # the reference's batch
DEAD_SPANS = (1_000_000, 10_000_000, 100_000_000)  # tokens
_SAMPLED_ROWS = 64  # of each batch, for the histogram of activations
_POSITION_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # between spans of positions
# Of the rows' squares: a span with less variance, as BOS rows have, has no share of it explained.
_NO_VARIANCE = 1e-12
TRAINED = "as trained"  # the subset of the headline: the rows that the run's policy keeps
_OTHERS = {
    "all rows": Policy(drop_bos=False, drop_outliers=False),
    "without BOS": Policy(drop_outliers=False),
    "without BOS and outliers": Policy(),
}
SKIP = "skip alone"
LINEAR = "linear map"
SHUFFLED = "rows of other tokens"


class Subset(NamedTuple):
    """Rows that figures are of, and the mean that they are about."""

    kinds: tuple[int, ...]  # of its rows, as the run's `Policy.kinds_of` has them
    mean: Tensor  # (d,) float64, of the training rows
    mean_rows: int  # that the mean is over

    @classmethod
    def of(cls, subject: Subject, policy: Policy, port: Port | None) -> Subset:
        """The rows that a policy keeps: the run's, or one without drop_tokens.

        Args:
            port: see `Target`.
        """
        every = np.arange(2 * EXCLUDED, dtype=np.uint8)
        kinds = every if policy.drop_tokens else stored_kind(every)
        kept = np.flatnonzero(np.isin(kinds, policy.kinds)).tolist()
        moments = subject.moments_of(policy)
        mean = _part(subject, torch.from_numpy(moments.mean).to(subject.device), port)
        return cls(tuple(kept), mean, moments.count)


def _part(subject: Subject, written: Tensor, port: Port | None) -> Tensor:
    """The columns of one port, or of all, scaled, in written rows (..., d_out)."""
    return subject.scaled(written) if port is None else written[..., subject.columns(port)]


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
        from scipy.special import gammaln

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


class Target:
    """Sums over the rows of one target, or over all targets together, scaled as in training."""

    def __init__(self, subject: Subject, policies: Sequence[Policy], port: Port | None) -> None:
        """No row is counted yet.

        Args:
            policies: of the subsets.
            port: one that is written; None: all together.
        """
        self.subsets = {policy: Subset.of(subject, policy, port) for policy in policies}
        self.error: dict[int, Moments] = {}  # of e, by kind
        self.spread: dict[int, Moments] = {}  # of x, by kind
        self._subject = subject
        self._port = port
        self._rows: list[Rows] = []  # every finite row, BOS and outliers too

    def add(self, batch: Unit, kept: Kept, x_hat: Tensor) -> tuple[Floats, Rows]:
        """Count a batch and its reconstruction (n, d_out); its rows (n, d), and what is kept."""
        x = _part(self._subject, batch.targets.double(), self._port)
        error = x - _part(self._subject, x_hat.double(), self._port)
        exact = x.cpu().numpy()
        of_batch = _by_kind(exact, batch.kind)
        _merge(self.spread, of_batch)
        _merge(self.error, _by_kind(error.cpu().numpy(), batch.kind))

        # Every row's squares: variance explained is the ratio of two of their sums.
        subsets = self.subsets.values()
        batch_means = [torch.from_numpy(of(of_batch, subset).mean) for subset in subsets]
        rows = _rows(batch, x, error, [subset.mean for subset in subsets], batch_means, kept)
        self._rows.append(rows)
        return exact, rows

    @property
    def rows(self) -> Rows:
        return Rows._make(np.concatenate(column) for column in zip(*self._rows, strict=True))


class Baselines:
    """Squared errors of what does without a transcoder's latents, on the rows as trained.

    skip alone             what it writes if no latent fires
    linear map             see analyze/linear.py; none in a ring
    rows of other tokens   its reconstruction of another row as trained, as the null
    """

    def __init__(self, subject: Subject) -> None:
        """Fit the linear map; no row is counted yet."""
        self._kinds = subject.policy.kinds
        self.linear: LinearMap | None = linear.fitted(subject)
        self._maps: dict[str, Callable[[Tensor], Tensor]] = {SKIP: linear.skip_of(subject.sae)}
        if self.linear:
            self._maps[LINEAR] = self.linear.__call__
        self._squares: dict[str, list[Floats]] = {name: [] for name in (*self._maps, SHUFFLED)}

    def add(self, batch: Unit, x_hat: Tensor) -> None:
        """Count a batch and the transcoder's reconstruction (n, d_out)."""
        trained = torch.from_numpy(batch.of_kinds(self._kinds)).to(x_hat.device)
        x = batch.rows[trained]
        y = batch.targets[trained].double()
        guesses = {name: guess(x) for name, guess in self._maps.items()}
        guesses[SHUFFLED] = x_hat[trained].roll(1, 0)
        for name, y_hat in guesses.items():
            self._squares[name].append((y - y_hat.double()).square().sum(1).cpu().numpy())

    @property
    def squares(self) -> Mapping[str, Floats]:
        """(n,) squared errors of the rows as trained, by name."""
        return {name: np.concatenate(squares) for name, squares in self._squares.items()}


class Measured:
    """What the pass keeps."""

    def __init__(self, subject: Subject, limit: int) -> None:
        """Begin; norms are read beforehand, since their deciles are spans of rows."""
        subject.require_complete()
        self.names = {TRAINED: subject.policy, **_OTHERS}
        policies = list(dict.fromkeys(self.names.values()))
        writes = subject.ports.writes
        self.whole = Target(subject, policies, None)
        self.targets: dict[str, Target] = {}  # by the port's name, where there are several
        if len(writes) > 1:
            self.targets = {port.name: Target(subject, policies, port) for port in writes}
        self.baselines = None if subject.ports.is_autoencoder else Baselines(subject)
        self.budgets = Budgets(subject)
        self.left_out = statistics.Tally()
        # The rest is of the rows that the run's policy keeps.
        self.latents = Latents(subject.sae.d_sae)
        deciles = np.quantile(_norms(subject, limit), np.linspace(0.1, 0.9, 9))
        self.by_position = Groups(_POSITION_EDGES, subject.sae.d_out)
        self.by_norm_decile = Groups(deciles.tolist(), subject.sae.d_out)
        self._kinds = subject.policy.kinds
        self._activations: list[NDArray[np.float32]] = []  # a sample, > 0

    def add(self, batch: Unit, kept: Kept, x_hat: Tensor) -> None:
        """Count a batch and its reconstruction."""
        exact, rows = self.whole.add(batch, kept, x_hat)
        for target in self.targets.values():
            target.add(batch, kept, x_hat)
        if self.baselines:
            self.baselines.add(batch, x_hat)
        self.budgets.add(batch, kept)
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
            measured.add(batch, kept, subject.sae.reconstruct(batch.rows, kept))
            read += len(numbers)
            progress.show(f"{read:,} rows measured")
    return measured


def _norms(subject: Subject, limit: int) -> NDArray[np.float32]:
    """(n,) norms of the rows that the run's policy keeps, of those that `Subject.rows` yields."""
    store = subject.store
    norms = []
    read = 0
    for number in held_out_units(store):
        kind = subject.kinds_of(number)
        norms.append(subject.norms_of(number)[np.isin(kind, subject.policy.kinds)])
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


def of(by_kind: dict[int, Moments], subset: Subset) -> Moments:
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
