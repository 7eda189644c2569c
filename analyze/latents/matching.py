"""Latents of two dictionaries matched by the correlation of their activations on the same rows.

The correlation of latents i and j is Pearson's over rows, zeros included:

    r_ij = (sum a_i b_j / n - mean a_i mean b_j) / (sd a_i sd b_j)

Only pairs that are active together on some row can have r > 0. So a product of sparse matrices
finds the best partners, block by block of our latents. A maximum over many candidates is above 0
by chance. So partners are chosen on some documents, and correlations are measured on others.

Shapes: n rows, F and G latents, m documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from residual_saes.analyze.latents.codes import Codes, Ints
from residual_saes.analyze.stats import Floats
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress

# Latents whose products with all others are in memory at a time: at most 67 MB at 32,768 latents.
BLOCK = 256
NONE = -1  # no partner: never active together with any latent of the other dictionary


class Partners(NamedTuple):
    """The latent of the other dictionary with the largest correlation; NONE if none is above 0."""

    ours: Ints  # (F,) partners of our latents
    theirs: Ints  # (G,) partners of theirs
    correlation: Floats  # (F,) on the rows on which partners were chosen; 0 without a partner


def best_partners(a: Codes, b: Codes, block: int = BLOCK) -> Partners:
    """Each latent's best partner; of equal ones the first."""
    ours = np.full(a.shape[1], NONE)
    theirs = np.full(b.shape[1], NONE)
    our_best = np.zeros(a.shape[1])
    their_best = np.zeros(b.shape[1])
    for first, row, column, r in _blocks(a, b, block):
        rows = row + first
        # Written backwards, so that of equal ones the first is written last.
        np.maximum.at(our_best, rows, r)
        best = np.flatnonzero((r == our_best[rows]) & (r > 0))[::-1]
        ours[rows[best]] = column[best]
        before = their_best.copy()
        np.maximum.at(their_best, column, r)
        best = np.flatnonzero((r == their_best[column]) & (r > before[column]))[::-1]
        theirs[column[best]] = rows[best]
    return Partners(ours, theirs, our_best)


def best_few(
    a: Codes, b: Codes, count: int, eligible: NDArray[np.bool_], stop: StopRequest
) -> tuple[Ints, Floats]:
    """(F, count) partners of each latent, the best first, and their correlations.

    NONE and 0 where fewer are above 0. Of equal ones the first comes first.

    Args:
        eligible: (G,) whether a latent of the other dictionary may be a partner.
    """
    partners = np.full((a.shape[1], count), NONE)
    values = np.zeros(partners.shape)
    progress = Progress()
    for first, row, column, r in _blocks(a, b, BLOCK):
        stop.check()
        progress.show(f"partners of {first:,} of {a.shape[1]:,} latents")
        r = np.where(eligible[column] & (r > 0), r, 0)
        bounds = np.searchsorted(row, np.arange(row.max(initial=-1) + 2))
        for latent, (low, high) in enumerate(pairwise(bounds.tolist()), first):
            of_row = r[low:high]
            few = np.arange(high - low)
            if len(few) > count:
                # More than are kept, so that equal ones are told apart by their numbers.
                least = np.partition(of_row, -count)[-count]
                few = np.flatnonzero(of_row >= least)
            few = few[np.lexsort((few, -of_row[few]))][:count]
            few = few[of_row[few] > 0]
            partners[latent, : len(few)] = column[low + few]
            values[latent, : len(few)] = of_row[few]
    return partners, values


def correlations(a: Codes, b: Codes, block: int = BLOCK) -> Floats:
    """(F, G) all correlations, 0 for a latent without variance.

    For dictionaries whose product fits into memory.
    """
    mean_a, inverse_a = _moments(a)
    mean_b, inverse_b = _moments(b)
    # Pairs that are never active together.
    r_of_pairs = -np.outer(mean_a * inverse_a, mean_b * inverse_b)
    for first, row, column, r in _blocks(a, b, block):
        r_of_pairs[row + first, column] = r
    return r_of_pairs


def _blocks(a: Codes, b: Codes, block: int) -> Iterator[tuple[int, Ints, Ints, Floats]]:
    """The correlations of all pairs that are active together on some row, by blocks of our latents.

    Yields:
        the block's first latent; then by pair our latent, counted from that one, their latent, and
        r.
    """
    by_latent = sparse.csr_array(a.T)
    n = a.shape[0]
    mean_a, inverse_a = _moments(a)
    mean_b, inverse_b = _moments(b)
    for first in range(0, a.shape[1], block):
        product = by_latent[first : first + block] @ b
        product.sort_indices()
        row = np.repeat(np.arange(product.shape[0]), np.diff(product.indptr))
        column = product.indices.astype(np.int64)
        covariance = product.data / n - mean_a[row + first] * mean_b[column]
        yield first, row, column, covariance * inverse_a[row + first] * inverse_b[column]


def _moments(codes: Codes) -> tuple[Floats, Floats]:
    """(F,) mean over rows, and 1 / standard deviation, 0 without variance."""
    exact = codes.astype(np.float64)
    mean = np.asarray(exact.sum(0)).ravel() / codes.shape[0]
    variance = np.asarray(exact.multiply(exact).sum(0)).ravel() / codes.shape[0] - mean**2
    varies = variance > 1e-12 * np.maximum(mean**2, np.finfo(np.float64).tiny)
    return mean, np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)


def assignment(r: Floats) -> Ints:
    """(F,) the one-to-one assignment with the largest sum of correlations (Kuhn, 1955).

    NONE for latents that are left over.
    """
    rows, columns = linear_sum_assignment(r, maximize=True)
    partner = np.full(len(r), NONE)
    partner[rows] = columns
    return partner


class Measured(NamedTuple):
    """Correlations of fixed pairs."""

    r: Floats  # (F,) 0 where a partner is missing or silent, NaN where the latent itself is
    # (draws, F) the same over documents drawn with replacement; no draw of a single document
    draws: Floats


def measure(
    a: Codes, b: Codes, partner: Ints, document: Ints, draws: int, seed: int, block: int = BLOCK
) -> Measured:
    """The correlation of each latent with its partner, on all rows and over resampled documents.

    Args:
        document: (n,) the row's document.
    """
    _, dense = np.unique(document, return_inverse=True)
    n = len(dense)
    m = int(dense.max()) + 1
    into_documents = sparse.csr_array((np.ones(n), (dense, np.arange(n))), shape=(m, n))
    size = np.bincount(dense, minlength=m).astype(np.float64)
    # How often each document counts: once, then as often as it is drawn.
    rng = np.random.default_rng(seed)
    times = np.ones((1 + (draws if m > 1 else 0), m))
    for draw in range(1, len(times)):
        times[draw] = np.bincount(rng.integers(0, m, m), minlength=m)
    rows = times @ size
    ours = sparse.csc_array(a.astype(np.float64))
    theirs = sparse.csc_array(b.astype(np.float64))
    parts = []
    for first in range(0, a.shape[1], block):
        chosen = partner[first : first + block]
        has_partner = sparse.diags_array((chosen != NONE).astype(np.float64))
        x = ours[:, first : first + block]
        y = theirs[:, np.maximum(chosen, 0)] @ has_partner
        columns = (x, y, x.multiply(x), y.multiply(y), x.multiply(y))
        sums = [times @ (into_documents @ column).toarray() for column in columns]
        parts.append(_pearson(rows, *sums))
    r = np.concatenate(parts, axis=1)
    return Measured(r[0], r[1:])


def _pearson(n: Floats, x: Floats, y: Floats, xx: Floats, yy: Floats, xy: Floats) -> Floats:
    """(draws, F) correlations from sums over rows (draws, F); n (draws,) is the number of rows."""
    n = n[:, None]
    variance_x = np.maximum(xx / n - (x / n) ** 2, 0)
    variance_y = np.maximum(yy / n - (y / n) ** 2, 0)
    scale = np.sqrt(variance_x * variance_y)
    r = np.divide(xy / n - x * y / n**2, scale, out=np.zeros_like(x), where=scale > 0)
    return np.where(variance_x > 0, r, np.nan)
