"""Effect sizes of very many columns at once, with what chance makes of them.

A column is a dimension of a layer, or an SAE feature. All nulls shuffle the labels. The same
permutations serve every column and every layer, so that a maximum over them is a joint one
(Westfall and Young, 1993).

Shapes: n answers, c columns, L permutations of the labels, B draws or splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy import stats as scipy_stats

from analyze.stats import Floats, hedges_g_of_labels

# Columns at a time: 16 MB for each array of 1,000 permutations.
WIDTH = 2048
# Firings expected in the rarer label. With at least 10, all columns share one null: the share of
# permutations beyond the normal's 1e-4 is 0.6e-4 to 1.6e-4 (n = 1,319, 132 or 660 wrong). With 2.5
# it is 3.6e-4.
_MANY = 10
# Share of the labels' variance below which covariates leave nothing of them.
_EXPLAINED = 1e-9

Effect = Callable[[Floats], Floats]
"""Of (n, c) columns their effects (1 + L, c): with the labels as they are, then shuffled."""


def columns(x: Any, width: int = WIDTH) -> Iterator[Floats]:
    """The columns of (n, c), `width` at a time, dense and float64.

    Args:
        x: dense, or a scipy.sparse.csc_array.
    """
    for start in range(0, x.shape[1], width):
        part = x[:, start : start + width]
        yield np.asarray(part.toarray() if sparse.issparse(part) else part, np.float64)


def shuffled(block: NDArray[np.int64], draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(draws, n) orders that move cases within their block only.

    Args:
        block: (n,) of each case, or (draws, n) where the blocks differ from draw to draw.
    """
    blocks = np.broadcast_to(block, (draws, block.shape[-1]))
    positions = np.argsort(blocks, axis=1, kind="stable")
    cases = np.argsort(blocks + rng.random(blocks.shape), axis=1)
    orders = np.empty_like(positions)
    np.put_along_axis(orders, positions, cases, axis=1)
    return orders


# -- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """The labels, how they may be exchanged, and what else the answers differ by."""

    correct: NDArray[np.bool_]  # (n,)
    # (n,) Labels are exchanged within a block: the question if each has both labels, else 0 for
    # all.
    block: NDArray[np.int64]
    cluster: NDArray[np.int64]  # (n,) question, which is what is resampled
    covariates: Floats  # (n, q)
    orders: NDArray[np.int64]  # (1 + L, n) first as it is, then shuffled within blocks

    @classmethod
    def of(
        cls,
        correct: NDArray[np.bool_],
        question: NDArray[Any],
        covariates: Floats,
        *,
        paired: bool,
        shuffles: int,
        seed: int,
    ) -> Design:
        """The design of n answers.

        Args:
            paired: answers are compared within their question.
            shuffles: L.
        """
        cluster = np.unique(question, return_inverse=True)[1].astype(np.int64)
        block = cluster if paired else np.zeros_like(cluster)
        orders = shuffled(block, shuffles, np.random.default_rng(seed))
        every = np.vstack([np.arange(len(correct)), orders])
        return cls(correct, block, cluster, covariates, every)

    @property
    def paired(self) -> bool:
        return bool(self.block.any())

    def raw(self, x: Floats) -> Floats:
        """Cohen's d with Hedges' correction, nothing adjusted for. An `Effect`."""
        return hedges_g_of_labels(x, self.correct[self.orders])

    @cached_property
    def within(self) -> Effect:
        """Differences within blocks, by the spread within them. With one block it is `raw`."""
        effect = self._adjusted(np.empty((len(self.correct), 0)))
        assert effect is not None  # every block has both labels
        return effect

    @cached_property
    def adjusted(self) -> Effect | None:
        """Differences within blocks at equal covariates.

        The coefficient of the label in x ~ blocks + covariates + label, by the residual standard
        deviation, with Hedges' correction of its degrees of freedom. The residuals
        of x ~ blocks + covariates are permuted (Freedman and Lane, 1983). Permuted labels would
        lose their correlation with the covariates, and widen the null.

        Returns:
            None if the covariates leave nothing of the labels.
        """
        return self._adjusted(self.covariates)

    def _adjusted(self, covariates: Floats) -> Effect | None:
        # Labels with blocks and covariates regressed out.
        centre = _centring(self.block)
        basis = _basis(centre(covariates), np.linalg.norm(covariates, axis=0))

        def rest(x: Floats) -> Floats:
            x = centre(x)
            return x - basis @ (basis.T @ x)

        label = rest(self.correct[:, None].astype(np.float64))[:, 0]
        freedom = len(label) - len(np.unique(self.block)) - basis.shape[1] - 1
        squared = float(label @ label)
        if squared < _EXPLAINED * len(label) or freedom < 1:
            return None
        labels = label[self.orders]
        bases = [direction[self.orders] for direction in basis.T]
        correction = (1 - 3 / (4 * freedom - 1)) if freedom > 1 else 1.0

        def effect(x: Floats) -> Floats:
            left = rest(x)
            product = labels @ left
            # A shuffled residual is no longer orthogonal to the covariates. They would explain
            # this part of it.
            explained = product**2 / squared
            for direction in bases:
                explained = explained + np.square(direction @ left)
            spread = np.sqrt(np.maximum(np.square(left).sum(0) - explained, 0) / freedom)
            real = spread > 1e-9 * np.abs(x).max(0)  # of a constant column, rounding is left
            g = np.divide(product / squared, spread, out=np.zeros_like(product), where=real)
            return np.asarray(g * correction, np.float64)

        return effect


def _centring(block: NDArray[np.int64]) -> Callable[[Floats], Floats]:
    """A function that takes its block's mean from each row of (n, c)."""
    n = len(block)
    count = np.bincount(block)
    member = sparse.csr_array((np.ones(n), (block, np.arange(n))), shape=(len(count), n))

    def centre(x: Floats) -> Floats:
        means = (member @ x) / count[:, None]
        return np.asarray(x - means[block], np.float64)

    return centre


def _basis(covariates: Floats, before: Floats) -> Floats:
    """(n, rank) orthonormal basis of what the columns span.

    Args:
        before: (q,) their lengths before they were centred. A ratio near 0 marks a column
            that is constant in every block: only rounding is left of it.
    """
    sizes = np.linalg.norm(covariates, axis=0)
    varying = sizes > 1e-9 * before
    left, values, _ = np.linalg.svd(covariates[:, varying] / sizes[varying], full_matrices=False)
    return np.asarray(left[:, values > 1e-8], np.float64)


# -- effects against shuffled labels ---------------------------------------------------------------


class Tested(NamedTuple):
    """Effects of c columns beside those of shuffled labels."""

    d: Floats  # (c,)
    top: float  # mean of the largest |d|
    null_top: Floats  # (L,)
    null_max: Floats  # (L,) largest |d|


def against_shuffled(x: Any, effect: Effect, top: int, width: int = WIDTH) -> Tested:
    """Every column's effect, and what chance makes of the `top` largest."""
    parts = []
    best = None
    for part in columns(x, width):
        values = effect(part)
        parts.append(values[0])
        sizes = np.abs(values)
        best = largest(sizes if best is None else np.hstack([best, sizes]), top)
    assert best is not None
    means = best.mean(1)
    return Tested(np.concatenate(parts), float(means[0]), means[1:], best[1:].max(1))


def largest(values: Floats, count: int) -> Floats:
    """(L, count) the largest of each row of (L, c), in no order; all if there are fewer."""
    count = min(count, values.shape[1])
    return np.partition(values, values.shape[1] - count, axis=1)[:, values.shape[1] - count :]


def family_wise_p(sizes: Floats, null_max: Floats) -> Floats:
    """Max-T p values of |d|: how often shuffled labels have an effect as large anywhere.

    Args:
        sizes: |d|, of any shape.
        null_max: (L,) the largest |d| over everything that is looked at.
    """
    below = np.searchsorted(np.sort(null_max), sizes, side="left")
    return np.asarray((1 + len(null_max) - below) / (1 + len(null_max)), np.float64)


# -- resampling ------------------------------------------------------------------------------------


def weighted_g(x: Floats, first: Floats, second: Floats) -> Floats:
    """`stats.hedges_g` of two weighted groups, (B, c).

    Args:
        x: (n, c).
        first: (B, n) how often each case is in the first group.
        second: (B, n) likewise in the second. A draw in which either is empty has NaN.
    """
    x = x - x.mean(0)  # differences of sums of squares lose digits far from 0
    n1 = _size(first)
    n0 = _size(second)
    mean1 = (first @ x) / n1
    mean0 = (second @ x) / n0
    within = np.maximum((first + second) @ np.square(x) - n1 * mean1**2 - n0 * mean0**2, 0)
    freedom = n1 + n0 - 2
    spread = np.sqrt(within / freedom)
    real = spread > 1e-9 * np.abs(x).max(0)
    g = np.divide(mean1 - mean0, spread, out=np.zeros_like(spread), where=real)
    correction = 1 - 3 / (4 * freedom - 1)
    return np.asarray((g + 0 * n1 + 0 * n0) * correction, np.float64)  # NaN of an empty group


def _size(weights: Floats) -> Floats:
    """(B, 1) cases in a group; NaN of none."""
    total = weights.sum(1)[:, None]
    return np.where(total > 0, total, np.nan)


def drawn_top(
    x: Any, correct: NDArray[np.bool_], times: NDArray[np.int64], top: int, width: int = WIDTH
) -> Floats:
    """(B,) means of the largest |d| of (n, c) columns; NaN where a draw lacks a class.

    Args:
        times: (B, n) how often each answer was drawn.
    """
    right = np.asarray(times * correct, np.float64)
    wrong = np.asarray(times * ~correct, np.float64)
    best = [largest(np.abs(weighted_g(part, right, wrong)), top) for part in columns(x, width)]
    return np.asarray(largest(np.hstack(best), top).mean(1), np.float64)


def drawn(cluster: NDArray[np.int64], draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(draws, n) how often each case occurs if clusters are drawn with replacement."""
    clusters = int(cluster.max()) + 1
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)[:, cluster]


# -- halves of the questions -----------------------------------------------------------------------


class Halves(NamedTuple):
    """What one half of the questions says of the other.

    Means over splits, of the labels as they are and of permuted ones.
    """

    shared: float  # share of one half's top columns that are the other's too
    # mean signed d, in one half, of the columns that were chosen in the other half
    carried: float
    null_shared: float
    null_carried: float
    null_carried_95: float  # 95 % of single splits of shuffled labels are below


class Splits(NamedTuple):
    """Halves of the questions: (B, n) each."""

    first: NDArray[np.bool_]
    correct: NDArray[np.bool_]  # the labels
    shuffled: NDArray[np.bool_]  # the labels exchanged within block and half


def split(design: Design, splits: int, rng: np.random.Generator) -> Splits:
    """Random halves of the questions, with both labels in each if there are two of each."""
    # Unpaired questions have one answer and one label; each label is halved by itself.
    _, first_of = np.unique(design.cluster, return_index=True)
    stratum = np.zeros(len(first_of), np.int64)
    if not design.paired:
        stratum = design.correct[first_of].astype(np.int64)
    order = np.argsort(stratum + rng.random((splits, len(stratum))), axis=1)
    alternating = np.broadcast_to(np.arange(len(stratum)) % 2, order.shape)
    half = np.empty_like(order)
    np.put_along_axis(half, order, alternating, axis=1)

    of_case = half[:, design.cluster]
    orders = shuffled(2 * design.block + of_case, splits, rng)
    labels = np.broadcast_to(design.correct, of_case.shape)
    return Splits(of_case == 0, labels, design.correct[orders])


def halves(x: Any, splits: Splits, top: int, width: int = WIDTH) -> Halves:
    """How far the `top` columns of (n, c) chosen on one half of the questions hold on the other."""
    shared, carried = _across_halves(x, splits.first, splits.correct, top, width)
    null_shared, null_carried = _across_halves(x, splits.first, splits.shuffled, top, width)
    return Halves(
        shared=float(shared.mean()),
        carried=float(carried.mean()),
        null_shared=float(null_shared.mean()),
        null_carried=float(null_carried.mean()),
        null_carried_95=float(np.quantile(null_carried, 0.95)),
    )


def _across_halves(
    x: Any, first: NDArray[np.bool_], labels: NDArray[np.bool_], top: int, width: int
) -> tuple[Floats, Floats]:
    """(B,) share of the top columns that both halves choose; d carried to the other half."""
    effects = []
    for side in (first, ~first):
        right = (side & labels).astype(np.float64)
        wrong = (side & ~labels).astype(np.float64)
        effects.append(np.hstack([weighted_g(part, right, wrong) for part in columns(x, width)]))
    shared, there = _held(effects[0], effects[1], top)
    _, back = _held(effects[1], effects[0], top)  # the share is the same from either side
    return shared, (there + back) / 2


def _held(chosen: Floats, measured: Floats, top: int) -> tuple[Floats, Floats]:
    """Of d in two halves, (B, c) each: (B,) share of top columns in common, and d carried over."""
    top = min(top, chosen.shape[1])
    best = _top_columns(chosen, top)
    is_top = np.zeros(measured.shape, bool)
    np.put_along_axis(is_top, _top_columns(measured, top), True, axis=1)
    sign = np.sign(np.take_along_axis(chosen, best, axis=1))
    carried = sign * np.take_along_axis(measured, best, axis=1)
    return np.take_along_axis(is_top, best, axis=1).mean(1), carried.mean(1)


def _top_columns(d: Floats, top: int) -> NDArray[np.int64]:
    """(B, top) the columns of each row's largest |d|."""
    return np.argpartition(-np.abs(d), top - 1, axis=1)[:, :top]


# -- a p value for every feature -------------------------------------------------------------------


def rank_p(x: Any, fired: NDArray[np.int64], correct: NDArray[np.bool_], effect: Effect) -> Floats:
    """(c,) two-sided p values of sparse columns, by ranks.

    Where nothing is adjusted for, it is Mann and Whitney's test. The null is that of shuffled
    labels, pooled over columns that fire in like many answers (from 2^j up to 2^(j+1)): what a
    column's ranks can do depends on nothing else, since all its zeros share a rank. Columns that
    fire often in the rarer label (`_MANY`) are alike whatever their number, and are one pool.

    Pooling is needed: a column's own 1,000 permutations reach 1e-3, where 32,768 hypotheses need
    1e-6. The normal approximation reaches that, but is wrong there: of 5 firings all among the 132
    wrong of 1,319 answers it says 2e-11, and the truth is 9e-6.

    Args:
        x: (n, c) scipy.sparse.csc_array.
        fired: (c,) answers in which each column is not 0.
        effect: of ranks, see `Design.within` and `Design.adjusted`.
    """
    p = np.ones(x.shape[1])
    rarer = min(correct.mean(), 1 - correct.mean())
    pool = np.where(fired * rarer < _MANY, np.floor(np.log2(fired)), np.inf)
    for number in np.unique(pool):
        members = np.flatnonzero(pool == number)
        p[members] = _pooled_p(x[:, members], effect)
    return p


def _pooled_p(x: Any, effect: Effect) -> Floats:
    """(c,) p values of columns whose shuffled effects are one null."""
    sizes = [np.abs(effect(scipy_stats.rankdata(part, axis=0))) for part in columns(x)]
    # By rounding, the same ranks may give values that differ in the last digits.
    observed = np.concatenate([part[0] for part in sizes]) * (1 - 1e-9)
    order = np.argsort(observed)
    # Null values counted by how many of the sorted observed ones they reach.
    reaching = np.zeros(len(observed) + 1)
    total = 0
    for part in sizes:
        reached = np.searchsorted(observed[order], part[1:].ravel(), side="right")
        reaching += np.bincount(reached, minlength=len(reaching))
        total += reached.size
    at_least = np.cumsum(reaching[::-1])[::-1][1:]  # null values from the i-th smallest observed on
    p = np.empty(len(observed))
    p[order] = (1 + at_least) / (1 + total)
    return p
