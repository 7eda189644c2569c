"""Logistic regression with an L2 penalty, the linear probe that others stand beside.

Shapes: n cases, d inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from analyze.stats import Floats

PENALTIES = tuple(10.0**power for power in range(-3, 2))
_FOLDS = 5
_STEPS, _PRECISION = (
    100,
    1e-14,
)  # of Newton's method: steps at most, and the squared step, in loss, that ends it


class Probe(NamedTuple):
    """log odds = ((x - mean) / scale) @ w + b"""

    mean: Floats  # (d,)
    scale: Floats  # (d,) 1 where an input is constant
    w: Floats  # (d,)
    b: float
    penalty: float

    def __call__(self, x: ArrayLike) -> Floats:
        """(n,) log odds of (n, d) cases."""
        found: Floats = ((np.asarray(x, np.float64) - self.mean) / self.scale) @ self.w + self.b
        return found


def fit(x: ArrayLike, label: NDArray[np.bool_], penalty: float) -> Probe:
    """The minimum of mean log loss + penalty / 2 |w|^2 on standardised inputs.

    Args:
        x: (n, d).
        label: (n,); both values occur.
    """
    x = np.asarray(x, np.float64)
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12 * np.abs(x).max(initial=0), scale, 1.0)
    z, basis = (x - mean) / scale, None
    if z.shape[1] > len(z):  # the penalty keeps w within the span of the cases
        basis, factor = np.linalg.qr(z.T)
        z = factor.T
    w = _newton(np.c_[z, np.ones(len(z))], label.astype(np.float64), penalty)
    return Probe(mean, scale, w[:-1] if basis is None else basis @ w[:-1], float(w[-1]), penalty)


def _newton(z: Floats, target: Floats, penalty: float) -> Floats:
    """(d + 1,) weights, the last of which, of a column of ones, is free of the penalty.

    By Newton's steps, halved until the loss falls; it is convex, and so this ends at its minimum.
    """
    n, ridge = len(z), np.append(np.full(z.shape[1] - 1, penalty), 0.0)

    def loss(w: Floats) -> float:
        odds = z @ w
        return float(np.mean(np.logaddexp(0, odds) - target * odds) + (ridge * w) @ w / 2)

    w = np.zeros(z.shape[1])
    for _ in range(_STEPS):
        share = special.expit(z @ w)
        gradient = z.T @ (share - target) / n + ridge * w
        curvature = (z.T * (share * (1 - share) / n)) @ z + np.diag(ridge)
        step, here = np.linalg.solve(curvature, gradient), loss(w)
        if gradient @ step < _PRECISION:
            break
        while loss(w - step) > here:
            step /= 2
        w = w - step
    return w


def cross_validated(
    x: ArrayLike, label: NDArray[np.bool_], group: ArrayLike, seed: int = 0
) -> Probe:
    """`fit` at that of PENALTIES whose held-out log loss is least, over five folds of whole groups.

    Args:
        group: (n,) cases that stay together, as answers to one question do.
    """
    x = np.asarray(x, np.float64)
    _, dense = np.unique(group, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(dense.max() + 1)[dense] % _FOLDS
    losses = np.zeros(len(PENALTIES))
    for number in range(_FOLDS):
        inside, outside = fold != number, fold == number
        if not outside.any() or label[inside].all() or not label[inside].any():
            continue
        for at, penalty in enumerate(PENALTIES):
            odds = fit(x[inside], label[inside], penalty)(x[outside])
            losses[at] += float(np.sum(np.logaddexp(0, np.where(label[outside], -odds, odds))))
    return fit(x, label, PENALTIES[int(np.argmin(losses))])
