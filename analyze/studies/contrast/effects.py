"""Effect sizes of very many columns at once, with what chance makes of them.

A column is a dimension of a layer, or an SAE feature. All nulls shuffle the labels. The same
permutations serve every column and every layer, so that a maximum over them is a joint one
(Westfall and Young, 1993).

Shapes: n answers, c columns, L permutations of the labels, B draws or splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy import stats as scipy_stats

from residual_saes.analyze.stats import Floats

# Columns at a time: 4 MB for each array of 1,000 permutations, and 0.5 s of one core at 1,319
# answers.
WIDTH = 512
# Firings expected in the rarer label. With at least 10, all columns share one null: the share of
# permutations beyond the normal's 1e-4 is 0.6e-4 to 1.6e-4 (n = 1,319, 132 or 660 wrong). With 2.5
# it is 3.6e-4.
_MANY = 10
# Share of the labels' variance below which covariates leave nothing of them.
_EXPLAINED = 1e-9

# Pairs of answers to a question at a time: 2 x 128 MB of 1,000 permutations.
_PAIRS = 1 << 14


@dataclass(frozen=True)
class Watched:
    """Columns (n, c) of which each part calls `check` before it is looked at."""

    x: Any  # dense, or a scipy.sparse.csc_array
    check: Callable[[], None]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.x.shape)

    def __getitem__(self, key: Any) -> Watched:
        return Watched(self.x[key], self.check)


def columns(x: Any, width: int = WIDTH) -> Iterator[Floats]:
    """The columns of (n, c), `width` at a time, dense and float64.

    Args:
        x: dense, a scipy.sparse.csc_array, or one of these that is `Watched`.
    """
    for start in range(0, x.shape[1], width):
        part = x[:, start : start + width]
        if isinstance(part, Watched):
            part.check()
            part = part.x
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

    @cached_property
    def raw(self) -> Effect:
        """Differences within blocks, nothing else adjusted for. With one block d is Hedges'."""
        effect = Effect.of(self, np.empty((len(self.correct), 0)))
        assert effect is not None  # every block has both labels
        return effect

    @cached_property
    def adjusted(self) -> Effect | None:
        """Differences within blocks at equal covariates; None if these leave nothing of labels."""
        return Effect.of(self, self.covariates)


@dataclass(frozen=True)
class Effect:
    """The label's coefficient in x ~ blocks + covariates + label, for many labels at once.

    The residuals of x ~ blocks + covariates are permuted (Freedman and Lane, 1983). Permuted labels
    would lose their correlation with the covariates, and widen the null.

    `d` divides the coefficient by the residual standard deviation. Its null is right only where
    right and wrong answers spread alike: at 136 right and 64 wrong answers that spread 1.5 times
    as far, a third of nulls would pass for findings. `sizes` are therefore judged. They are
    studentised by a standard error that lets spreads differ, which makes permutations right for
    equal means (Janssen, 1997; Chung and Romano, 2013): Welch's, which is HC2 in a regression, or
    the question's sum of scores where answers are compared within questions.
    """

    centre: Callable[[Floats], Floats]  # of (n, c), takes each block's means
    design: Floats  # (1 + rank, n) orthonormal rows: the label's rest, then the covariates'
    length: float  # of the label's rest, before it was scaled
    freedom: int
    parts: Parts
    orders: NDArray[np.int64]  # (1 + L, n)

    @classmethod
    def of(cls, design: Design, covariates: Floats) -> Effect | None:
        """The effect at equal covariates (n, q); None if they leave nothing of the labels."""
        centre = _centring(design.block)
        basis = _basis(centre(covariates), np.linalg.norm(covariates, axis=0))
        label = centre(design.correct[:, None].astype(np.float64))[:, 0]
        label = label - basis @ (basis.T @ label)
        freedom = len(label) - len(np.unique(design.block)) - basis.shape[1] - 1
        length = float(np.linalg.norm(label))
        if length**2 < _EXPLAINED * len(label) or freedom < 1:
            return None
        rows = np.vstack([label / length, basis.T])
        if design.paired:
            parts = Parts.of_questions(rows, design.block)
        else:
            parts = Parts.of_labels(rows, design.correct)
        return cls(centre, rows, length, freedom, parts, design.orders)

    def d(self, x: Floats) -> Floats:
        """(1 + L, c) Cohen's d with Hedges' correction of (n, c) columns."""
        rest = self._rest(x)
        return self._d(x, rest, self._products(rest))

    def sizes(self, x: Floats) -> Floats:
        """(1 + L, c) the d that groups of equal spread would need for the same p value."""
        return self.both(x)[1]

    def both(self, x: Floats) -> tuple[Floats, Floats]:
        """`d` and `sizes` of (n, c) columns."""
        rest = self._rest(x)
        products = self._products(rest)
        d = self._d(x, rest, products)
        real = d != 0
        parts = self.parts.variance(rest, products, self.orders)
        # A group without spread has what rounding leaves.
        least = 1e-12 * np.square(rest).sum(0)
        variance = np.maximum(np.sum(parts, axis=0), least)
        t = np.divide(products[0], np.sqrt(variance), out=np.zeros_like(d), where=real)

        # Welch's and Satterthwaite's degrees of freedom.
        per_freedom = np.zeros_like(d)
        for part, freedom in zip(parts, self.parts.freedom, strict=True):
            per_freedom += np.maximum(part, least) ** 2 / freedom
        own = np.divide(variance**2, per_freedom, out=np.ones_like(d), where=real)
        equal = np.sign(t) * _same_p(np.abs(t), own, self.freedom)
        return d, np.asarray(equal / self.length * self._correction, np.float64)

    @property
    def _correction(self) -> float:
        return 1 - 3 / (4 * self.freedom - 1) if self.freedom > 1 else 1.0

    def _rest(self, x: Floats) -> Floats:
        x = self.centre(x)
        basis = self.design[1:]
        return np.asarray(x - basis.T @ (basis @ x), np.float64)

    def _products(self, rest: Floats) -> list[Floats]:
        """Of each row of `design`, shuffled, the products (1 + L, c) with the rest."""
        return [row[self.orders] @ rest for row in self.design]

    def _d(self, x: Floats, rest: Floats, products: Sequence[Floats]) -> Floats:
        # A shuffled residual is no longer orthogonal to the covariates. They would explain this
        # part of it.
        explained = sum(np.square(product) for product in products)
        spread = np.sqrt(np.maximum(np.square(rest).sum(0) - explained, 0) / self.freedom)
        real = spread > 1e-9 * np.abs(x).max(0)  # of a constant column, rounding is left
        d = np.divide(products[0], spread, out=np.zeros_like(spread), where=real)
        return np.asarray(d / self.length * self._correction, np.float64)


class Parts(NamedTuple):
    """The variance of the label's coefficient as sums of squared scores.

    A score is the sum of weight times residual over an answer, or over a question's answers.
    """

    weights: list[Floats]  # (n,) each: a part's weights of the residuals; 0 of other parts' answers
    score: NDArray[np.int64]  # (n,) which score an answer belongs to
    freedom: list[int]  # of each part
    design: Floats

    @classmethod
    def of_labels(cls, design: Floats, correct: NDArray[np.bool_]) -> Parts:
        """Right and wrong answers, as in Welch's test."""
        leverage = 1 / len(correct) + np.square(design).sum(0)
        weight = design[0] / np.sqrt(np.maximum(1 - leverage, _EXPLAINED))
        weights = [np.where(correct == label, weight, 0.0) for label in (True, False)]
        freedom = [max(1, int((correct == label).sum()) - 1) for label in (True, False)]
        return cls(weights, np.arange(len(correct)), freedom, design)

    @classmethod
    def of_questions(cls, design: Floats, question: NDArray[np.int64]) -> Parts:
        """One part, with a score for each question: its answers' residuals are not independent."""
        return cls([design[0]], question, [max(1, len(np.unique(question)) - 1)], design)

    def variance(
        self, rest: Floats, products: Sequence[Floats], orders: NDArray[np.int64]
    ) -> list[Floats]:
        """Each part's sum of squared scores, (1 + L, c), of the residuals rest - design' products.

        The square is multiplied out, so that all but sums over permutations are constants.
        """
        sums = []
        for weight in self.weights:
            own = np.array([np.bincount(self.score, weight * row) for row in self.design])
            total = self._squares(weight, rest, orders)
            for product, of_score in zip(products, own, strict=True):
                total -= 2 * product * ((weight * of_score[self.score])[orders] @ rest)
            constants = own @ own.T
            for first, row in zip(products, constants, strict=True):
                for second, constant in zip(products, row, strict=True):
                    total += constant * first * second
            sums.append(np.maximum(total, 0))
        return sums

    def _squares(self, weight: Floats, rest: Floats, orders: NDArray[np.int64]) -> Floats:
        """(1 + L, c) sum over scores of (sum of weight times rest) squared."""
        shuffled_weights = weight[orders]
        total = np.square(shuffled_weights) @ np.square(rest)
        first, second = _pairs(self.score)
        for start in range(0, len(first), _PAIRS):
            i = first[start : start + _PAIRS]
            j = second[start : start + _PAIRS]
            total += 2 * (shuffled_weights[:, i] * shuffled_weights[:, j]) @ (rest[i] * rest[j])
        return np.asarray(total, np.float64)


def _pairs(score: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of different cases that have a score in common."""
    pairs = [np.empty((2, 0), np.int64)]
    order = np.argsort(score, kind="stable")
    sizes = np.bincount(score)
    for cases in np.split(order, np.cumsum(sizes)[:-1]):
        first, second = np.triu_indices(len(cases), 1)
        if len(first):
            pairs.append(np.array([cases[first], cases[second]]))
    first, second = np.hstack(pairs)
    return first, second


def _same_p(t: Floats, freedom: Floats, other: int) -> Floats:
    """The |t| of `other` degrees of freedom that has the p value of t at its own.

    Both are taken to the normal distribution by Wallace's approximation (1959).
    """
    scale = (8 * freedom + 1) / (8 * freedom + 3)
    squared = freedom * np.log1p(t**2 / freedom) * scale**2
    scale_of_other = (8 * other + 1) / (8 * other + 3)
    return np.asarray(np.sqrt(other * np.expm1(squared / scale_of_other**2 / other)), np.float64)


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
    """Effects of c columns beside those of shuffled labels, judged by `Effect.sizes`."""

    d: Floats  # (c,) Hedges'
    sizes: Floats  # (c,)
    top: float  # mean of the largest |size|
    null_top: Floats  # (L,)
    null_max: Floats  # (L,) largest |size|


def against_shuffled(
    x: Any,
    effect: Effect,
    top: int,
    width: int = WIDTH,
    rare: NDArray[np.bool_] | None = None,
) -> Tested:
    """Every column's effect, and what chance makes of the `top` largest.

    Args:
        x: (n, c), see `columns`.
        rare: (c,) columns that are 0 but for few answers. They are judged by d: where these few
            are all right, or all wrong, the other label has no spread to be studentised by.
    """
    d = []
    sizes = []
    best = None
    start = 0
    for part in columns(x, width):
        plain, values = effect.both(part)
        if rare is not None:
            values = np.where(rare[start : start + part.shape[1]], plain, values)
        start += part.shape[1]
        d.append(plain[0])
        sizes.append(values[0])
        values = np.abs(values)
        best = largest(values if best is None else np.hstack([best, values]), top)
    assert best is not None
    means = best.mean(1)
    null_max = best[1:].max(1)
    return Tested(np.concatenate(d), np.concatenate(sizes), float(means[0]), means[1:], null_max)


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


def is_rare(fired: NDArray[np.int64], correct: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(c,) whether columns fire in few answers of the rarer label, see `_MANY`."""
    return np.asarray(fired * min(correct.mean(), 1 - correct.mean()) < _MANY)


def rank_p(x: Any, fired: NDArray[np.int64], correct: NDArray[np.bool_], effect: Effect) -> Floats:
    """(c,) two-sided p values of sparse columns, by ranks.

    Columns that fire often in the rarer label (`_MANY`) are judged by Welch's test on ranks. Its
    squared statistic is 1.02 to 1.08 times Brunner and Munzel's (2000) in normal groups of which
    one spreads twice as far (scipy's, medians of 200 draws of 200 or 1,000 answers, 11 to 89 %
    right). The others are judged by Mann and Whitney's: what they tell is how often they
    fire. The null is that of shuffled labels, pooled over columns that fire in like many answers
    (from 2^j up to 2^(j+1)): what a column's ranks can do depends on nothing else, since all its
    zeros share a rank. Columns that fire often are alike whatever their number, and are one pool.

    Pooling is needed: a column's own 1,000 permutations reach 1e-3, where 32,768 hypotheses need
    1e-6. The normal approximation reaches that, but is wrong there: of 5 firings all among the 132
    wrong of 1,319 answers it says 2e-11, and the truth is 9e-6.

    Args:
        x: (n, c) scipy.sparse.csc_array.
        fired: (c,) answers in which each column is not 0.
        effect: of ranks, see `Design`.
    """
    p = np.ones(x.shape[1])
    rare = is_rare(fired, correct)
    pool = np.where(rare, np.floor(np.log2(fired)), np.inf)
    for number in np.unique(pool):
        members = np.flatnonzero(pool == number)
        sizes = effect.sizes if np.isinf(number) else effect.d
        p[members] = _pooled_p(x[:, members], sizes)
    return p


def _pooled_p(x: Any, effect: Callable[[Floats], Floats]) -> Floats:
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
