"""Which arms differ, and where two figures order them differently.

Every arm is trained on every world: a table of arms by seeds. A world's difficulty is the same for
all its arms, so it is taken off. What is left over of arm a and seed s is

    r_as = v_as - mean_a - mean_s + mean         s^2 = sum r^2 / ((A - 1) (S - 1))

and all pairs have simultaneous 95 % intervals (Tukey's range test in a randomised block design):

    mean_a - mean_b +- q(.95; A, (A - 1) (S - 1)) s / sqrt(S)

Two arms are told apart by a figure if that interval leaves out 0. Two figures disagree on two arms
if each tells them apart and they order them differently.

Shapes: A arms, S seeds.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import studentized_range

LEVEL = 0.95

Floats = NDArray[np.float64]


class Pair(NamedTuple):
    """Two arms that figures order differently."""

    more: int  # the arm with more of the first figure
    less: int
    first: float  # how much more it has of the first figure
    second: float  # how much more it has of the second: below 0


def log_explained(explained: Floats) -> Floats:
    """-log of the share of variance that is left: it varies evenly, as that share by itself does
    not: of worlds in which 5 % is left it differs by a tenth of what it does where half is left.
    """
    return np.asarray(-np.log(np.maximum(1 - explained, 1e-12)))


def half_width(values: Floats) -> float:
    """Of the simultaneous intervals; infinite of a single seed, and of a single arm.

    Args:
        values: (A, S).
    """
    arms, seeds = values.shape
    freedom = (arms - 1) * (seeds - 1)
    if not freedom:
        return float("inf")
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    deviation = np.sqrt(np.square(rest).sum() / freedom)
    return float(_quantile(arms, freedom) * deviation / np.sqrt(seeds))


@cache  # an integral over two variables
def _quantile(arms: int, freedom: int) -> float:
    return float(studentized_range.ppf(LEVEL, arms, freedom))


def differences(values: Floats) -> Floats:
    """(A, A) the mean of the row's arm less that of the column's."""
    means = values.mean(1)
    return np.asarray(means[:, None] - means)


def disagreements(first: Floats, second: Floats) -> list[Pair]:
    """Pairs that the figures order differently; those farthest beyond their intervals come first.

    Args:
        first: (A, S) of one figure.
        second: (A, S) of the other.
    """
    by_first, by_second = differences(first), differences(second)
    half_first, half_second = half_width(first), half_width(second)
    found = []
    for more, less in zip(
        *np.nonzero((by_first > half_first) & (by_second < -half_second)), strict=True
    ):
        pair = Pair(int(more), int(less), float(by_first[more, less]), float(by_second[more, less]))
        found.append(pair)

    def beyond(pair: Pair) -> float:
        return min(pair.first / max(half_first, 1e-12), -pair.second / max(half_second, 1e-12))

    return sorted(found, key=beyond, reverse=True)
