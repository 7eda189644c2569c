"""Effect sizes of very many columns at once (dimensions of a layer, SAE features), with what chance
makes of them.

Shapes: n answers, c columns, L shufflings of the labels, B draws or splits. All nulls shuffle the
labels; the same shufflings serve every column and every layer, so that a maximum over them is a
joint one (Westfall and Young, 1993).
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

_COLUMNS = 2048  # at a time: 16 MB for each of some arrays of 1,000 shufflings
# Firings expected in the rarer label. From 10 on, the share of shufflings beyond the normal's 1e-4
# is 0.6e-4 to 1.6e-4 (n = 1,319, 132 or 660 wrong), with 2.5 it is 3.6e-4.
_MANY = 10
_EXPLAINED = 1e-9  # share of the labels' variance below which nothing is left of them

Effect = Callable[[Floats], Floats]
"""Of (n, c) columns their effects (1 + L, c): with the labels as they are, then with each shuffling."""


def columns(x: Any) -> Iterator[Floats]:
    """Of (n, c), dense or a scipy.sparse.csc_array, some columns after the others, dense and
    float64.
    """
    for at in range(0, x.shape[1], _COLUMNS):
        part = x[:, at : at + _COLUMNS]
        yield np.asarray(part.toarray() if sparse.issparse(part) else part, np.float64)


def shuffled(block: NDArray[np.int64], draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(draws, n) orders that move cases within their block only.

    Args:
        block: (n,) of each case, or (draws, n) where the blocks differ from draw to draw.
    """
    blocks = np.broadcast_to(block, (draws, block.shape[-1]))
    places, cases = (
        np.argsort(blocks, axis=1, kind="stable"),
        np.argsort(blocks + rng.random(blocks.shape), axis=1),
    )
    orders = np.empty_like(places)
    np.put_along_axis(orders, places, cases, axis=1)
    return orders


# -- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """Which answers are right, which labels could as well be exchanged, and what else the answers
    differ by.
    """

    correct: NDArray[np.bool_]  # (n,)
    block: NDArray[
        np.int64
    ]  # (n,) labels are exchanged within: the question where each has both, else 0 for all
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
        cluster = np.unique(question, return_inverse=True)[1].astype(np.int64)
        block = cluster if paired else np.zeros_like(cluster)
        orders = shuffled(block, shuffles, np.random.default_rng(seed))
        return cls(
            correct, block, cluster, covariates, np.vstack([np.arange(len(correct)), orders])
        )

    @property
    def paired(self) -> bool:
        return bool(self.block.any())

    def raw(self, x: Floats) -> Floats:
        """Cohen's d with Hedges' correction, as it is defined: nothing is adjusted for. An
        `Effect`.
        """
        return hedges_g_of_labels(x, self.correct[self.orders])

    @cached_property
    def within(self) -> Effect:
        """Differences within blocks, by the spread within them; the same as `raw` if there is one
        block.
        """
        found = self._adjusted(np.empty((len(self.correct), 0)))
        assert found is not None  # every block has both labels
        return found

    @cached_property
    def adjusted(self) -> Effect | None:
        """Differences within blocks at equal covariates; None if covariates leave nothing of the
        labels.

        The coefficient of the label in x ~ blocks + covariates + label, by the residual standard
        deviation, with Hedges' correction of its degrees of freedom. Shuffled are the residuals of
        x ~ blocks + covariates (Freedman and Lane, 1983): shuffling labels would also break what
        ties them to the covariates, and give a null that is too wide.
        """
        return self._adjusted(self.covariates)

    def _adjusted(self, covariates: Floats) -> Effect | None:
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
        labels, bases = label[self.orders], [one[self.orders] for one in basis.T]
        correction = (1 - 3 / (4 * freedom - 1)) if freedom > 1 else 1.0

        def effect(x: Floats) -> Floats:
            left = rest(x)
            product = labels @ left
            # A shuffled residual is no longer orthogonal to the covariates; this part of it they
            # would explain.
            explained = sum((np.square(one @ left) for one in bases), start=product**2 / squared)
            spread = np.sqrt(np.maximum(np.square(left).sum(0) - explained, 0) / freedom)
            real = spread > 1e-9 * np.abs(x).max(0)  # of a constant column, rounding is left
            g = np.divide(product / squared, spread, out=np.zeros_like(product), where=real)
            return np.asarray(g * correction, np.float64)

        return effect


def _centring(block: NDArray[np.int64]) -> Callable[[Floats], Floats]:
    """Takes its block's mean from each row of (n, c)."""
    n, count = len(block), np.bincount(block)
    member = sparse.csr_array((np.ones(n), (block, np.arange(n))), shape=(len(count), n))
    return lambda x: np.asarray(x - ((member @ x) / count[:, None])[block], np.float64)


def _basis(covariates: Floats, before: Floats) -> Floats:
    """(n, rank) orthonormal basis of what the columns span.

    Args:
        before: (q,) their lengths before they were centred; of one that is constant in every block
            rounding is left.
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


def tested(x: Any, effect: Effect, top: int) -> Tested:
    """Every column's effect, and what chance makes of the `top` largest."""
    found, best = [], None
    for part in columns(x):
        values = effect(part)
        found.append(values[0])
        sizes = np.abs(values)
        best = largest(sizes if best is None else np.hstack([best, sizes]), top)
    assert best is not None
    means = best.mean(1)
    return Tested(np.concatenate(found), float(means[0]), means[1:], best[1:].max(1))


def largest(values: Floats, count: int) -> Floats:
    """(L, count) the largest of each row of (L, c), in no order; all of them where there are
    fewer.
    """
    count = min(count, values.shape[1])
    return np.partition(values, values.shape[1] - count, axis=1)[:, values.shape[1] - count :]


def family_wise_p(sizes: Floats, null_max: Floats) -> Floats:
    """Max-T p values of |d|, of any shape: how often shuffled labels have anywhere an effect as
    large.

    Args:
        null_max: (L,) the largest |d| over everything that is looked at.
    """
    below = np.searchsorted(np.sort(null_max), sizes, side="left")
    return np.asarray((1 + len(null_max) - below) / (1 + len(null_max)), np.float64)


# -- resampling ------------------------------------------------------------------------------------


def weighted_g(x: Floats, one: Floats, other: Floats) -> Floats:
    """`stats.hedges_g` of two groups, (B, c), in which cases occur as often as their weights say.

    Args:
        x: (n, c).
        one: (B, n) how often each case is in the first group.
        other: (B, n) likewise in the second. A draw in which either is empty has NaN.
    """
    x = x - x.mean(0)  # differences of sums of squares lose digits far from 0
    n1, n0 = (
        np.where(total > 0, total, np.nan) for total in (one.sum(1)[:, None], other.sum(1)[:, None])
    )
    mean1, mean0 = (one @ x) / n1, (other @ x) / n0
    within = np.maximum((one + other) @ np.square(x) - n1 * mean1**2 - n0 * mean0**2, 0)
    freedom = n1 + n0 - 2
    spread = np.sqrt(within / freedom)
    real = spread > 1e-9 * np.abs(x).max(0)
    g = np.divide(mean1 - mean0, spread, out=np.zeros_like(spread), where=real)
    return np.asarray((g + 0 * n1 + 0 * n0) * (1 - 3 / (4 * freedom - 1)), np.float64)


def drawn_top(x: Any, correct: NDArray[np.bool_], times: NDArray[np.int64], top: int) -> Floats:
    """(B,) means of the largest |d| of (n, c) columns; NaN where a draw lacks a class.

    Args:
        times: (B, n) how often each answer was drawn.
    """
    one, other = (np.asarray(times * label, np.float64) for label in (correct, ~correct))
    best = [largest(np.abs(weighted_g(part, one, other)), top) for part in columns(x)]
    return np.asarray(largest(np.hstack(best), top).mean(1), np.float64)


def drawn(cluster: NDArray[np.int64], draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(draws, n) how often each case occurs if clusters are drawn with replacement."""
    clusters = int(cluster.max()) + 1
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)[:, cluster]


class Halves(NamedTuple):
    """What one half of the questions says of the other; means over splits, and the same with labels
    shuffled.
    """

    shared: float  # share of one half's top columns that are the other's too
    # mean d in one half, with the sign it has in the other, of the columns that the other chose
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
    _, first_of = np.unique(design.cluster, return_index=True)
    stratum = (
        np.zeros(len(first_of), np.int64)
        if design.paired
        else design.correct[first_of].astype(np.int64)
    )
    order = np.argsort(stratum + rng.random((splits, len(stratum))), axis=1)
    half = np.empty_like(order)
    np.put_along_axis(
        half, order, np.broadcast_to(np.arange(len(stratum)) % 2, order.shape), axis=1
    )
    of_case = half[:, design.cluster]
    orders = shuffled(2 * design.block + of_case, splits, rng)
    labels = np.broadcast_to(design.correct, of_case.shape)
    return Splits(of_case == 0, labels, design.correct[orders])


def halves(x: Any, splits: Splits, top: int) -> Halves:
    """How far the `top` columns of (n, c) chosen on one half of the questions hold on the other."""
    sides = (splits.first, ~splits.first)
    shared, carried = [], []
    for labels in (splits.correct, splits.shuffled):
        groups = [
            ((side & labels).astype(np.float64), (side & ~labels).astype(np.float64))
            for side in sides
        ]
        parts = [[weighted_g(part, *group) for group in groups] for part in columns(x)]
        first, second = (np.hstack(side) for side in zip(*parts, strict=True))
        there, back = _held(first, second, top), _held(second, first, top)
        shared.append(there[0])  # the same from either side
        carried.append((there[1] + back[1]) / 2)
    return Halves(
        shared=float(shared[0].mean()),
        carried=float(carried[0].mean()),
        null_shared=float(shared[1].mean()),
        null_carried=float(carried[1].mean()),
        null_carried_95=float(np.quantile(carried[1], 0.95)),
    )


def _held(chosen: Floats, measured: Floats, top: int) -> tuple[Floats, Floats]:
    """Of (B, c): share of the top columns that both have, and the d of one's in the other."""
    top = min(top, chosen.shape[1])
    best, others = (
        np.argpartition(-np.abs(d), top - 1, axis=1)[:, :top] for d in (chosen, measured)
    )
    mask = np.zeros(chosen.shape, bool)
    np.put_along_axis(mask, others, True, axis=1)
    sign = np.sign(np.take_along_axis(chosen, best, axis=1))
    return np.take_along_axis(mask, best, 1).mean(1), (
        sign * np.take_along_axis(measured, best, 1)
    ).mean(1)


# -- a p value for every feature -------------------------------------------------------------------


def rank_p(x: Any, fired: NDArray[np.int64], correct: NDArray[np.bool_], effect: Effect) -> Floats:
    """(c,) two-sided p values of sparse columns, by ranks (Mann and Whitney's test where nothing is
    adjusted for).

    The null is that of shuffled labels, pooled over columns that fire in like many answers (from
    2^j up to 2^(j+1)): what a column's ranks can do depends on nothing else, since all its zeros
    share a rank. A column's own 1,000 shufflings reach 1e-3, where 32,768 hypotheses need 1e-6. The
    normal approximation reaches that, but is wrong there: of 5 firings all among the 132 wrong of
    1,319 answers it says 2e-11, and the truth is 9e-6. Only columns that fire in many of the rarer
    label are alike whatever their number (`_MANY`), and are pooled all together.

    Args:
        x: (n, c) scipy.sparse.csc_array.
        fired: (c,) answers in which each column is not 0.
        effect: of ranks, see `Design.within` and `Design.adjusted`.
    """
    p, rarer = np.ones(x.shape[1]), min(correct.mean(), 1 - correct.mean())
    stratum = np.where(fired * rarer < _MANY, np.floor(np.log2(fired)), np.inf)
    for level in np.unique(stratum):
        members = np.flatnonzero(stratum == level)
        sizes = [
            np.abs(effect(scipy_stats.rankdata(part, axis=0))) for part in columns(x[:, members])
        ]
        # By rounding, the same ranks may give values that differ in the last digits.
        observed = np.concatenate([part[0] for part in sizes]) * (1 - 1e-9)
        order, above, total = np.argsort(observed), np.zeros(len(observed) + 1), 0
        for part in sizes:
            passed = np.searchsorted(observed[order], part[1:].ravel(), side="right")
            above += np.bincount(passed, minlength=len(above))
            total += passed.size
        reached = np.cumsum(above[::-1])[::-1][
            1:
        ]  # null values that are at least the i-th smallest observed
        p[members[order]] = (1 + reached) / (1 + total)
    return p
