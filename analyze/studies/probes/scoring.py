"""What probes are worth: figures with intervals over groups, their nulls, and the verdict.

Intervals resample groups. Every probe is judged on the same resampled groups, so a difference of
two probes is paired. Figures are means over splits and, one against the rest, over classes.

Shapes: n examples, S splits, C classes that are judged against the rest, D resamplings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from residual_saes.analyze.stats import Floats, Interval, figure, percentiles, permutation_p
from residual_saes.analyze.studies.probes.fitting import (
    DENSE,
    DIMENSIONS,
    LATENTS,
    LENGTH,
    RANDOM,
    WIDTH,
    Inputs,
    Probing,
    judged,
    split,
    targets,
)
from residual_saes.data.errors import StopRequest

LEVEL = 0.05
BETTER, NOT_BETTER, WORSE, UNDECIDED = "better", "no better", "worse", "undecided"
RULE = (
    "undecided if the dense probe reads nothing (its AUROC's 95% interval is not above 0.5, or "
    f"p >= {LEVEL} with labels permuted); better if the latents' AUROC, averaged over k, exceeds "
    "that of as many dimensions, of as many latents of a random dictionary, and of the length, "
    "each by a 99% interval above 0; worse if that of latents less dimensions is below 0; "
    "else no better"
)


class Scores(NamedTuple):
    """A probe's figures: first the figure itself, then one for each resampling; (D + 1,) each."""

    auroc: Floats
    balanced: Floats  # balanced accuracy: the mean over classes of the share that is recognised
    accuracy: Floats

    def record(self) -> dict[str, Any]:
        """As results keep it."""
        auroc, balanced, accuracy = map(measured, self)
        return {"auroc": auroc, "balanced": balanced, "accuracy": accuracy}


def measured(values: Floats) -> dict[str, Any]:
    """A figure with its interval, of values (D + 1,)."""
    return figure(float(values[0]), percentiles(values[1:]))


def difference(values: Floats) -> dict[str, Any]:
    """A difference of probes with its 99 % interval, of values (D + 1,).

    Resampled groups do not count that other train rows choose and fit otherwise. So where latents
    and dimensions have the same law, 95 % intervals leave out 0 in 14.5 % of 200 data sets
    (tests/bench/probe_nulls.py): as often as those of a spread that is 1.35 times too small. 99 %
    intervals are 1.31 times as long.
    """
    low, high = np.quantile(values[1:][~np.isnan(values[1:])], [0.005, 0.995])
    return figure(float(values[0]), Interval(float(low), float(high)))


def resampling(group: NDArray[np.int64], draws: int, seed: int) -> NDArray[np.float32]:
    """(D + 1, n) how often each example counts: once, then as often as its group is drawn."""
    groups = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    times = rng.multinomial(groups, np.full(groups, 1 / groups), draws)
    whole = np.concatenate([np.ones((1, groups)), times])
    return np.asarray(whole[:, group], np.float32)


def scores(
    odds: NDArray[np.float32], label: NDArray[np.int64], weight: NDArray[np.float32]
) -> Scores:
    """One probe's figures.

    Args:
        odds: (S, C, n) NaN outside of each split's test rows.
        weight: (D + 1, n) see `resampling`.
    """
    classes = targets(label)
    numbers = np.arange(int(label.max()) + 1)
    aurocs: list[Floats] = []
    balanced: list[Floats] = []
    accuracy: list[Floats] = []
    for of_split in odds:
        test = np.flatnonzero(~np.isnan(of_split[0]))
        own = weight[:, test]
        for target, values in zip(classes, of_split, strict=True):
            aurocs.append(_auroc(values[test], target[test], own))
        said = of_split[0, test] > 0 if len(classes) == 1 else of_split[:, test].argmax(0)
        right = said == label[test]
        accuracy.append(_share(own, right, np.ones(len(test), bool)))
        recalls = [_share(own, right, label[test] == number) for number in numbers]
        balanced.append(_mean(recalls))
    return Scores(*map(_mean, (aurocs, balanced, accuracy)))


@np.errstate(invalid="ignore")
def _mean(values: Sequence[Floats]) -> Floats:
    """(D + 1,) the mean over `values`, those left out that a resampling has no rows for."""
    stacked = np.array(values)
    known = ~np.isnan(stacked)
    return np.asarray(np.where(known, stacked, 0).sum(0) / known.sum(0))


def of_class(odds: NDArray[np.float32], label: NDArray[np.int64], number: int) -> float:
    """A probe's AUROC of one class, the mean over splits.

    Args:
        odds: (S, C, n).
        number: of the class among those that are judged.
    """
    target = targets(label)[number]
    found = []
    for values in odds[:, number]:
        test = np.flatnonzero(~np.isnan(values))
        found.append(_auroc(values[test], target[test], np.ones((1, len(test)), np.float32))[0])
    return float(np.nanmean(found))


@np.errstate(invalid="ignore")  # a resampling without one of the classes is NaN
def _auroc(
    odds: NDArray[np.float32], target: NDArray[np.bool_], weight: NDArray[np.float32]
) -> Floats:
    """(D + 1,) the share of pairs that are in order, ties half."""
    inside, outside = odds[target, None], odds[~target]
    above = (inside > outside).astype(np.float32) + np.float32(0.5) * (inside == outside)
    own, others = weight[:, target], weight[:, ~target]
    ordered = ((own @ above) * others).sum(1, dtype=np.float64)
    pairs = own.sum(1, dtype=np.float64) * others.sum(1, dtype=np.float64)
    return np.asarray(ordered / pairs)


@np.errstate(invalid="ignore")
def _share(weight: NDArray[np.float32], right: NDArray[np.bool_], of: NDArray[np.bool_]) -> Floats:
    """(D + 1,) the share of the rows `of` that are right."""
    total = weight[:, of].sum(1, dtype=np.float64)
    return np.asarray(weight[:, of & right].sum(1, dtype=np.float64) / total)


def of_latents(
    features: Any, label: NDArray[np.int64], group: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], Floats]:
    """(F,) the class that each latent tells best by itself, and its AUROC on other rows (F,).

    Args:
        features: (n, F) scipy.sparse.csr_array.
        seed: of the split, whose test rows do not choose the class.
    """
    sides = split(label, group, seed)
    classes = targets(label)
    best = []
    aurocs = []
    for start in range(0, features.shape[1], WIDTH):
        dense = features[:, start : start + WIDTH].toarray()
        chosen = _aurocs(dense[sides.known], classes[:, sides.known])
        best.append(np.abs(chosen - 0.5).argmax(0))
        other = _aurocs(dense[sides.test], classes[:, sides.test])
        aurocs.append(other[best[-1], np.arange(dense.shape[1])])
    return np.concatenate(best), np.concatenate(aurocs)


def _aurocs(x: NDArray[np.float32], classes: NDArray[np.bool_]) -> Floats:
    """(C, m) AUROC of every column (n, m) for every class (C, n)."""
    ranks = rankdata(x, axis=0)
    inside = classes.sum(1, keepdims=True)
    above = classes.astype(np.float64) @ ranks - inside * (inside + 1) / 2
    return np.asarray(above / (inside * (x.shape[0] - inside)))


# -- labels permuted -------------------------------------------------------------------------------


def permuted(
    label: NDArray[np.int64], group: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """(n,) the labels of whole groups, dealt out among groups.

    Groups of one label each exchange it. Groups of several exchange all theirs, row by row, with
    groups of the same size.
    """
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    ordered = label[order]
    low = np.minimum.reduceat(ordered, starts)
    is_one = low == np.maximum.reduceat(ordered, starts)
    drawn = label.copy()
    dealt = low.copy()
    dealt[is_one] = rng.permutation(low[is_one])
    whole = is_one[group]
    drawn[whole] = dealt[group[whole]]
    for size in np.unique(sizes[~is_one]):
        first = starts[~is_one & (sizes == size)]
        rows = order[first[:, None] + np.arange(size)]  # (groups, size)
        drawn[rows] = label[rng.permutation(rows)]
    return drawn


def null(
    inputs: Inputs,
    label: NDArray[np.int64],
    group: NDArray[np.int64],
    wanted: Sequence[Probing],
    number: int,
    stop: StopRequest,
) -> Floats:
    """(M,) AUROC of every wanted probe where labels are permuted.

    Each permutation is split, chosen, fitted and judged anew, once. Means over several splits of
    the true labels vary less, so to compare them with these errs towards no finding.

    Args:
        number: of the permutation.
    """
    drawn = permuted(label, group, np.random.default_rng([number, len(label)]))
    odds = judged(inputs, drawn, split(drawn, group, number), wanted, stop).odds
    once = np.ones((1, len(label)), np.float32)
    found = np.empty(len(wanted))
    for index, of_probe in enumerate(odds):
        found[index] = scores(of_probe[None], drawn, once).auroc[0]
    return found


# -- the verdict -----------------------------------------------------------------------------------


def averaged(found: Mapping[Probing, Scores], reads: str) -> Floats:
    """(D + 1,) AUROC of the probes of k columns, averaged over k."""
    return np.asarray(np.mean([s.auroc for p, s in found.items() if p.reads == reads], axis=0))


def judgement(found: Mapping[Probing, Scores], null_of_dense: Floats) -> dict[str, Any]:
    """The verdict by `RULE`, with the figures that it rests on.

    Args:
        found: the probes at what the dictionary reads.
        null_of_dense: (permutations,) AUROC of the dense probe.
    """
    dense = found[Probing(DENSE)].auroc
    latents = averaged(found, LATENTS)
    others = {
        DIMENSIONS: averaged(found, DIMENSIONS),
        RANDOM: averaged(found, RANDOM),
        LENGTH: found[Probing(LENGTH)].auroc,
        DENSE: dense,
    }
    ahead = {name: difference(latents - other) for name, other in others.items()}
    p = permutation_p(float(dense[0]), null_of_dense)
    why = []
    if _low(measured(dense)) <= 0.5:
        why.append("the dense probe's interval holds 0.5")
    if p >= LEVEL:
        least = 1 / (1 + len(null_of_dense))
        count = len(null_of_dense)
        why.append(f"p = {p:.2g}, and study.permutations={count} give no less than {least:.2g}")
    if why:
        verdict = UNDECIDED
    elif all(_low(ahead[name]) > 0 for name in (DIMENSIONS, RANDOM, LENGTH)):
        verdict = BETTER
    else:
        verdict = WORSE if ahead[DIMENSIONS]["interval"].high < 0 else NOT_BETTER
    of_latents = {"ahead": ahead, "latents": measured(latents)}
    return {"verdict": verdict, "why": why, **of_latents, "p_of_dense": p}


def _low(of: Mapping[str, Any]) -> float:
    interval: Interval = of["interval"]
    return interval.low


def kept_share(few: Floats, dense: Floats) -> dict[str, Any]:
    """How much of the dense probe's AUROC above chance a probe keeps."""
    return measured((few - 0.5) / (dense - 0.5))
