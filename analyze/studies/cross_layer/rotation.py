"""How often two latents would coincide if they knew nothing of each other's places in a document.

The null turns one latent's firing around within each document: its rows are shifted by the same
number of rows, and what leaves the end comes in at the start. So both latents keep how often they
fire in each document, and in which bursts. All shifts of a document are equally likely, and
documents are independent. The number of coincidences is then a sum over documents whose
distribution is known exactly, without a draw:

    P(at least as many)   by the product of the documents' characteristic functions, or, where it is
                          below TINY, Chernoff's bound of it, which is never below it

Shapes: n rows in the order of the text, R runs of rows of one document, p rows of a latent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from residual_saes.analyze.latents.codes import Codes, Ints
from residual_saes.analyze.stats import Floats

TINY = 1e-6
_STEPS = 12  # of Newton's method. Any tilt gives a bound, so an early end is no error.
_ELEMENTS = 1 << 21  # of characteristic functions that are held at a time


class Runs(NamedTuple):
    """Rows of one document that follow each other."""

    of_row: Ints  # (n,) the run of each row
    first: Ints  # (R,)
    length: Ints  # (R,)

    @classmethod
    def of(cls, document: Ints) -> Runs:
        """The runs of rows whose documents (n,) are given."""
        starts = np.flatnonzero(np.diff(document, prepend=document[:1] - 1))
        length = np.diff(starts, append=len(document))
        return cls(np.repeat(np.arange(len(starts)), length), starts, length)


def rotated(codes: Codes, runs: Runs, seed: int) -> Codes:
    """(n, F) activations, those of each run turned around by a random number of its rows."""
    by = np.random.default_rng(seed).integers(0, runs.length)
    within = np.arange(len(runs.of_row)) - runs.first[runs.of_row]
    from_row = (within + by[runs.of_row]) % runs.length[runs.of_row]
    return codes[runs.first[runs.of_row] + from_row]


def coincidences(x: Ints, y: Ints, runs: Runs) -> tuple[int, float, float]:
    """Rows that two latents share, how many the null expects, and P(at least as many).

    Args:
        x: (p,) the rows of one latent, ascending.
        y: (q,) those of the other.
    """
    # Every pair of their rows in one run, by the shift that brings them together.
    in_run = np.bincount(runs.of_row[y], minlength=len(runs.first))
    before = np.cumsum(in_run) - in_run
    pairs = in_run[runs.of_row[x]]
    of_x = np.repeat(np.arange(len(x)), pairs)
    among = np.arange(len(of_x)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    run = runs.of_row[x[of_x]]
    shift = (y[before[run] + among] - x[of_x]) % runs.length[run]
    together = int((shift == 0).sum())
    if not together:
        return 0, float((1 / runs.length[run]).sum()), 1.0

    # Of each run in which both fire: the share of its shifts that give 0, 1, ... coincidences.
    place, times = np.unique(runs.first[run] + shift, return_counts=True)
    both, dense = np.unique(runs.of_row[place], return_inverse=True)
    width = int(times.max()) + 1
    counts = np.bincount(dense * width + times, minlength=len(both) * width)
    shares: Floats = counts.reshape(len(both), width).astype(np.float64)
    shares[:, 0] = runs.length[both] - shares.sum(1)
    shares /= runs.length[both, None]
    expected = float((shares @ np.arange(width)).sum())
    return together, expected, _tail(shares, together)


def _tail(shares: Floats, least: int) -> float:
    """P(sum >= least) of independent counts, whose probabilities (R, c) `shares` has.

    TINY and more is exact up to rounding, less is an upper bound.
    """
    values = np.arange(shares.shape[1])
    bound = _chernoff(shares, values, least)
    if bound < TINY:
        return max(bound, float(np.finfo(np.float64).tiny))
    size = int(np.where(shares > 0, values, 0).max(1).sum()) + 1
    product = np.ones(size // 2 + 1, np.complex128)
    step = max(1, _ELEMENTS // size)
    for start in range(0, len(shares), step):
        product *= np.fft.rfft(shares[start : start + step], size, axis=1).prod(0)
    probability = np.fft.irfft(product, size)
    return float(np.clip(probability[least:].sum(), TINY, 1))


def _chernoff(shares: Floats, values: Ints, least: int) -> float:
    """An upper bound of P(sum >= least): E[exp(t (sum - least))] at the best t >= 0 found."""
    most = np.where(shares > 0, values, 0).max(1, keepdims=True)
    # About the largest count of each run, or the powers would overflow.
    about = np.minimum(values - most, 0)
    tilt = 0.0
    best = 0.0
    for _ in range(_STEPS):
        weights = shares * np.exp(tilt * about)
        moment = weights.sum(1)
        best = min(best, float(np.log(moment).sum() + tilt * (most.sum() - least)))
        mean = weights @ values / moment
        variance = float((weights @ values**2 / moment - mean**2).sum())
        if variance <= 0:
            break
        tilt = float(np.clip(tilt + (least - mean.sum()) / variance, 0, tilt + 2))
    return float(np.exp(best))
