"""Probes of labels: what each reads, and what it says of examples that it has not seen.

A split has whole groups on three sides. On train rows columns are chosen, by the size of Hedges' g
between a class and the rest. On validation rows the penalty is chosen. Both together fit the probe
that test rows judge. Classes weigh alike, so that log odds of 0 stand between them.

Of k columns: latents, dimensions of what the dictionary reads, and latents of a random dictionary.
Beside them: `dense` reads all dimensions, `means` the projection on the difference of the two means
(raw, as Marks and Tegmark, arXiv 2310.06824), `length` the number of tokens and its square.

Shapes: n examples, m columns, C classes that are judged against the rest, M probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.probe import PENALTIES, fit
from residual_saes.analyze.stats import Floats, hedges_g_of_labels
from residual_saes.data.errors import StopRequest

VALIDATION, TEST = 0.2, 0.3  # shares of each class's groups
LATENTS, DIMENSIONS, RANDOM = "latents", "dimensions", "random latents"  # of which k are chosen
DENSE, MEANS, LENGTH = "dense", "means", "length"
WIDTH = 4096  # columns that are dense at a time

Inputs = Mapping[str, Any]  # by what is read (n, m): an array, or a scipy.sparse.csr_array


class Split(NamedTuple):
    """Rows of the three sides."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def known(self) -> NDArray[np.int64]:
        return np.concatenate([self.train, self.validation])


class Probing(NamedTuple):
    """A probe: what it reads, and how many columns of that."""

    reads: str
    k: int | None = None  # None: all

    def __str__(self) -> str:
        if self.k is None:
            return self.reads
        return f"{self.k} {self.reads.removesuffix('s') if self.k == 1 else self.reads}"


class Judged(NamedTuple):
    """What probes say of one split's test rows."""

    odds: NDArray[np.float32]  # (M, C, n) log odds of the class; NaN outside of test rows
    latents: NDArray[np.int64]  # (C, largest k) latents, the best first


def split(label: NDArray[np.int64], group: NDArray[np.int64], seed: int) -> Split:
    """The sides of every row, by whole groups; a function of the arguments alone.

    Each class has its share of groups on every side. A group of several classes counts as its first
    row's.

    Args:
        label: (n,) numbers of classes, each of which has at least three groups.
        group: (n,) numbers of groups, from 0.
    """
    rng = np.random.default_rng(seed)
    _, first = np.unique(group, return_index=True)
    side = np.zeros(len(first), np.int64)
    for number in np.unique(label[first]):
        members = rng.permutation(np.flatnonzero(label[first] == number))
        test = max(1, round(TEST * len(members)))
        validation = max(1, round(VALIDATION * len(members)))
        side[members[:test]] = 2
        side[members[test : test + validation]] = 1
    of_row = side[group]
    return Split(
        np.flatnonzero(of_row == 0), np.flatnonzero(of_row == 1), np.flatnonzero(of_row == 2)
    )


def targets(label: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(C, n) every class against the rest; of two classes the second alone."""
    classes = int(label.max()) + 1
    numbers = np.arange(1 if classes == 2 else 0, classes)
    return np.asarray(label == numbers[:, None])


def probings(inputs: Inputs, k: Sequence[int]) -> list[Probing]:
    """The probes of some inputs, in the order in which results have them."""
    found = [Probing(name, size) for name in inputs if name != LENGTH for size in k]
    if DIMENSIONS in inputs:
        found += [Probing(DENSE), Probing(MEANS)]
    return [*found, Probing(LENGTH)] if LENGTH in inputs else found


def judged(
    inputs: Inputs,
    label: NDArray[np.int64],
    sides: Split,
    wanted: Sequence[Probing],
    stop: StopRequest,
) -> Judged:
    """Every wanted probe, chosen and fitted on the known rows, on the test rows."""
    classes = targets(label)
    most: dict[str, int] = {}
    for reads, k in wanted:
        if k is not None:
            most[reads] = max(k, most.get(reads, 0))
    ranked = {}
    for name, count in most.items():
        ranked[name] = ranking(inputs[name], classes, sides.train, count, stop)
    odds = np.full((len(wanted), len(classes), len(label)), np.nan, np.float32)
    for number, probing in enumerate(wanted):
        for of_class, target in enumerate(classes):
            stop.check()
            order = ranked.get(probing.reads)
            columns = None if order is None else order[of_class, : probing.k]
            x = _read(inputs, probing, columns, target, sides)
            odds[number, of_class, sides.test] = _odds(x, target, sides, stop)
    nothing = np.zeros((len(classes), 0), np.int64)
    return Judged(odds, ranked.get(LATENTS, nothing))


def ranking(
    x: Any, classes: NDArray[np.bool_], rows: NDArray[np.int64], count: int, stop: StopRequest
) -> NDArray[np.int64]:
    """(C, count) the columns whose means differ most between each class and the rest.

    Args:
        x: (n, m).
        rows: those that choose.
    """
    chosen = x[rows]
    effect = np.zeros((len(classes), x.shape[1]))
    for start in range(0, x.shape[1], WIDTH):
        stop.check()
        part = slice(start, start + WIDTH)
        effect[:, part] = hedges_g_of_labels(_dense(chosen[:, part]), classes[:, rows])
    order = np.argsort(-np.abs(np.nan_to_num(effect)), axis=1, kind="stable")
    return np.asarray(order[:, :count], np.int64)


def _dense(x: Any) -> Floats:
    return np.asarray(x if isinstance(x, np.ndarray) else x.toarray(), np.float64)


def _read(
    inputs: Inputs,
    probing: Probing,
    columns: NDArray[np.int64] | None,
    target: NDArray[np.bool_],
    sides: Split,
) -> Floats:
    """(n, m) what a probe reads of every row."""
    if columns is not None:
        return _dense(inputs[probing.reads][:, columns])
    if probing.reads == LENGTH:
        length = np.asarray(inputs[LENGTH], np.float64)
        return np.stack([length, length**2], 1)
    x = _dense(inputs[DIMENSIONS])
    if probing.reads == DENSE:
        return x
    is_class = target[sides.known]
    known = x[sides.known]
    direction = known[is_class].mean(0) - known[~is_class].mean(0)
    return np.asarray((x @ direction)[:, None])


def _odds(x: Floats, target: NDArray[np.bool_], sides: Split, stop: StopRequest) -> Floats:
    """(test rows,) log odds, by the penalty of least loss on validation rows.

    They are 0 where all train rows are of one class, as groups of several classes may leave it.
    """
    if len(np.unique(target[sides.train])) < 2:
        return np.zeros(len(sides.test))
    validation = target[sides.validation]
    weight = _balanced(validation)
    losses = []
    for penalty in PENALTIES:
        stop.check()
        own = target[sides.train]
        odds = fit(x[sides.train], own, penalty, _balanced(own))(x[sides.validation])
        losses.append(float(weight @ np.logaddexp(0, np.where(validation, -odds, odds))))
    best = PENALTIES[int(np.argmin(losses))]
    own = target[sides.known]
    probe = fit(x[sides.known], own, best, _balanced(own))
    return probe(x[sides.test])


def _balanced(target: NDArray[np.bool_]) -> Floats:
    """(n,) weights by which both classes weigh alike, as far as both are there."""
    share = target.mean()
    return np.asarray(np.where(target, 1 / max(share, 1e-12), 1 / max(1 - share, 1e-12)))
