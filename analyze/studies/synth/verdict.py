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

import numpy as np
from numpy.typing import NDArray
from scipy.stats import studentized_range

LEVEL = 0.95

Floats = NDArray[np.float64]


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


def disagreements(first: Floats, second: Floats) -> list[tuple[int, int]]:
    """Pairs (a, b) of arms of which a has more of the first figure, and b more of the second.

    Those farthest beyond their intervals come first.

    Args:
        first: (A, S) of one figure.
        second: (A, S) of the other.
    """
    tiny = np.finfo(np.float64).tiny
    by_first = differences(first) / max(half_width(first), tiny)
    by_second = -differences(second) / max(half_width(second), tiny)
    beyond = np.minimum(by_first, by_second)  # in half-widths
    pairs = np.argwhere(beyond > 1)
    order = np.argsort(-beyond[tuple(pairs.T)], kind="stable")
    return [(int(more), int(less)) for more, less in pairs[order]]
