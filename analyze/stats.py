"""Statistics that the studies share: intervals, tests, effect sizes. from scipy where it has them.

Everything random takes a seed and is a pure function of it. p values of permutations count the data
themselves as one more permutation: (1 + #{null >= observed}) / (1 + draws). They are never 0
(Phipson and Smyth, 2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
FEW = 5  # of fewer clusters a bootstrap has 35 different resamples at most


def _scipy() -> Any:
    """scipy with its statistics: 1.3 s of a core, which most studies need not spend."""
    import scipy

    return scipy  # loads a part of it when that is first named


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def figure(value: float, interval: Interval | None) -> dict[str, Any]:
    """A value with its interval, as results keep it: {value, interval}."""
    return {"value": float(value), "interval": interval}


def number(value: float | None, digits: int = 4) -> str:
    """A figure for people: significant digits, thousands separated; a dash if it is not known.

    Whole numbers keep all their digits.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def percent(share: float | None) -> str:
    """A share as a percentage: a decimal, two digits if it is small; a dash if it is not known."""
    if share is None or not math.isfinite(share):
        return "-"
    percents = 100 * share
    if 0 < abs(percents) < 0.1:
        return f"{percents:.2g}%"
    return f"{percents:,.1f}%"


def formatted(measured: Mapping[str, Any], form: str) -> str:
    """The value of a `figure` with its interval in brackets; a dash if the value is NaN.

    Args:
        form: of each number, as in a format string.
    """
    value = measured["value"]
    if math.isnan(value):
        return "-"
    return f"{value:{form}} {bracketed(measured['interval'], form)}"


def bracketed(interval: Sequence[float] | None, form: str) -> str:
    """An interval's ends in brackets, each formatted by `form`."""
    if interval is None:
        return "[no interval]"
    low, high = interval
    return f"[{low:{form}}, {high:{form}}]"


def counted(count: int, noun: str) -> str:
    """1 document, 2,000 documents."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def resampled(count: int, noun: str) -> str:
    """What the brackets of a study are worth, in a sentence.

    Args:
        count: of what was resampled.
        noun: its name, for one.
    """
    if count < 2:
        return f"No figure has an interval: all is from one {noun}."
    if count < FEW:
        return (
            f"Brackets are what resampling {count} {noun}s gives: so few make them too narrow for "
            "95% intervals."
        )
    return f"Brackets are 95% intervals from resampling {count:,} {noun}s."


# -- resampling ------------------------------------------------------------------------------------


def sums_by(group: ArrayLike, *values: Floats) -> list[Floats]:
    """Each of `values` (n,) summed by group (n,), one sum per group that occurs."""
    _, dense = np.unique(group, return_inverse=True)
    return [np.bincount(dense, value).astype(np.float64) for value in values]


def bootstrap_ratio(
    numerator: Floats, denominator: Floats, draws: int = 1000, seed: int = 0
) -> Interval | None:
    """Percentile interval of sum(numerator) / sum(denominator) over resampled clusters.

    See Efron and Tibshirani, ch. 13. Rows of one document resemble each other, so documents are
    resampled, not rows. None of a single cluster, whose resamples are all the same.

    Args:
        numerator: (clusters,) sums within each cluster.
        denominator: (clusters,) likewise.
    """
    return bootstrap_ratios(numerator[:, None], denominator, draws, seed)[0]


def bootstrap_ratios(
    numerators: Floats, denominators: Floats, draws: int = 1000, seed: int = 0
) -> list[Interval | None]:
    """`bootstrap_ratio` of every column, over the same resampled clusters.

    Args:
        numerators: (clusters, columns).
        denominators: likewise, or (clusters,) for all columns.
    """
    n = len(numerators)
    if n < 2:
        return [None] * numerators.shape[1]
    rng = np.random.default_rng(seed)
    ratios = np.empty((draws, numerators.shape[1]))
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        ratios[draw] = (times @ numerators) / (times @ denominators)
    return [percentiles(column) for column in ratios.T]


def variance_explained(
    document: ArrayLike, squared_error: Floats, about_mean: Floats
) -> tuple[float, Interval | None]:
    """1 - sum |e|^2 / sum |x - mu|^2 over rows (n,), and its interval over documents, if many."""
    error, total = sums_by(document, squared_error, about_mean)
    unexplained = bootstrap_ratio(error, total)
    interval = unexplained and Interval(1 - unexplained.high, 1 - unexplained.low)
    return float(1 - error.sum() / total.sum()), interval


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], n: int, draws: int = 1000, seed: int = 0
) -> tuple[Interval | None, Floats]:
    """Percentile interval of a statistic over resampled cases, and its (draws,) values.

    A single case has no interval.

    Args:
        statistic: given (n,) indices of cases, drawn with replacement. A draw for which it is NaN
            (one class is missing, say) is left out of the interval.
        n: how many cases there are.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)], dtype=np.float64)
    return percentiles(values) if n > 1 else None, values


def percentiles(values: Floats) -> Interval:
    """The middle 95 % of `values`, NaN left out; NaN if nothing is left."""
    finite = values[~np.isnan(values)]
    if not len(finite):
        return Interval(np.nan, np.nan)
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(float(low), float(high))


def permutation_p(observed: float, null: ArrayLike) -> float:
    """One-sided p value of `observed` among `null` (draws,), from permutations of the same data."""
    values = np.asarray(null, np.float64)
    return float((1 + np.sum(values >= observed)) / (1 + len(values)))


# -- shares and counts -----------------------------------------------------------------------------


@cache
def wilson(right: int, total: int) -> Interval:
    """Wilson's score interval of the share `right` / `total`; (0, 1) of nothing."""
    if total == 0:
        return Interval(0.0, 1.0)
    interval = _scipy().stats.binomtest(right, total).proportion_ci(method="wilson")
    return Interval(float(interval.low), float(interval.high))


@cache
def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p value that gained and lost outcomes differ by chance; 1 of none."""
    if not gained + lost:
        return 1.0
    return float(_scipy().stats.binomtest(gained, gained + lost).pvalue)


def overlap_p(total: int, first: int, second: int, shared: int) -> float:
    """P(at least `shared` in common) of two sets drawn from `total` (hypergeometric).

    Args:
        first: size of the one set.
        second: size of the other.
    """
    return float(_scipy().stats.hypergeom.sf(shared - 1, total, first, second))


def detectable_change(
    pairs: int, discordant: float, power: float = 0.8, level: float = 0.05
) -> float:
    """The smallest change of a share that McNemar's two-sided test finds; NaN if it finds none.

    Connor (1987), solved for the change delta:

        sqrt(n) delta = z_level sqrt(psi) + z_power sqrt(psi - delta^2)

    Args:
        pairs: n, cases that are seen both ways.
        discordant: psi, the share of them whose outcome changes, to either side. No change is
            larger than this.
        power: probability of finding it.
    """
    z_level = _scipy().stats.norm.isf(level / 2)
    z_power = _scipy().stats.norm.isf(1 - power)

    def missing(delta: float) -> float:
        """By how much the left side falls short of the right one."""
        right_side = z_level * np.sqrt(discordant) + z_power * np.sqrt(discordant - delta**2)
        return float(right_side - np.sqrt(pairs) * delta)

    if missing(discordant) >= 0:
        return float("nan")
    return float(_scipy().optimize.brentq(missing, 0.0, discordant))


# -- many tests at once ----------------------------------------------------------------------------


def holm(p: ArrayLike) -> Floats:
    """p values adjusted for the family-wise error (Holm, 1979), in the order of `p`."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """q values, in the order of `p`: adjusted for the false discovery rate.

    See Benjamini and Hochberg (1995).
    """
    values = np.asarray(p, np.float64)
    if not len(values):
        return values
    return np.asarray(_scipy().stats.false_discovery_control(values), np.float64)


# -- two groups ------------------------------------------------------------------------------------


def hedges_g(x: Floats, label: NDArray[np.bool_]) -> Floats:
    """Standardised difference of means, labelled minus others, by column: see `hedges_g_of_labels`.

    Args:
        x: (n, columns) cases.
        label: (n,).
    """
    return np.asarray(hedges_g_of_labels(x, label[None])[0], np.float64)


def hedges_g_of_labels(x: Floats, labels: NDArray[np.bool_]) -> Floats:
    """(L, columns) Hedges' g of every column for many labellings at once, by two matrix products.

    It is Cohen's d, the difference of means over the pooled standard deviation, times the
    correction for small samples 1 - 3 / (4 n - 9) (Hedges, 1981, with n cases in all). A column
    without spread has 0.

    Args:
        x: (n, columns) cases.
        labels: (L, n) labellings, as of permutations; each has both values, and n is at least 3.
    """
    nothing = 1e-12 * np.abs(x).max(0)  # the spread that rounding gives a constant column
    x = x - x.mean(0)  # differences of sums of squares lose digits far from 0
    n = len(x)
    weight = labels.astype(np.float64)
    n1 = weight.sum(1, keepdims=True)
    n0 = n - n1
    sum1 = weight @ x
    mean1 = sum1 / n1
    mean0 = (x.sum(0) - sum1) / n0
    within = np.maximum(np.square(x).sum(0) - n1 * mean1**2 - n0 * mean0**2, 0)
    spread = np.sqrt(within / (n - 2))
    difference = mean1 - mean0
    g = np.divide(difference, spread, out=np.zeros_like(difference), where=spread > nothing)
    return np.asarray(g * (1 - 3 / (4 * n - 9)), np.float64)


def auroc(score: ArrayLike, label: NDArray[np.bool_]) -> float:
    """P(a labelled case scores above another one), ties half; NaN if there is one class only.

    It is Mann and Whitney's U over its number of pairs.
    """
    ranks = _scipy().stats.rankdata(np.asarray(score, np.float64))
    n1 = int(label.sum())
    n0 = len(label) - n1
    if not n1 or not n0:
        return float("nan")
    return float((ranks[label].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


# -- rank correlation ------------------------------------------------------------------------------


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, ties averaged; NaN if one of the two is constant."""
    x_ranks = _centred_ranks(x)
    y_ranks = _centred_ranks(y)
    scale = float(np.sqrt((x_ranks @ x_ranks) * (y_ranks @ y_ranks)))
    if scale <= 1e-12 * len(x_ranks):
        return float("nan")
    return float(x_ranks @ y_ranks) / scale


def _centred_ranks(x: ArrayLike) -> Floats:
    ranks = _scipy().stats.rankdata(x)
    return np.asarray(ranks - ranks.mean(), np.float64)


def spearman_cap(score: ArrayLike, label: NDArray[np.bool_]) -> float:
    """The largest `spearman` of this score with any yes/no labels of which as many are yes.

    Those labels say yes to the cases of the highest ranks. Of n cases without ties the cap is
    sqrt(3 p (1 - p)) n / sqrt(n^2 - 1), where p is the share that is yes. Ties lower or raise it.

    Args:
        score: (n,).
        label: (n,) how many are yes.

    Returns:
        NaN if one of the two is constant.
    """
    ranks = _scipy().stats.rankdata(np.asarray(score, np.float64))
    best = np.zeros(len(ranks))
    best[np.argsort(-ranks, kind="stable")[: int(label.sum())]] = 1
    return spearman(ranks, best)
