"""Latents of one dictionary matched with latents of another by how their activations go together on
the same rows.

The correlation of latents i and j is Pearson's over rows, zeros included:

    r_ij = (sum a_i b_j / n - mean a_i mean b_j) / (sd a_i sd b_j)

Only pairs that are ever active together can have r > 0, so best partners are found in a product of
sparse matrices, block by block. A maximum over many candidates is above 0 by chance: so partners
are chosen on some documents, and correlations are measured on others.

Shapes: n rows, F and G latents, m documents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

Codes = Any  # scipy.sparse.csr_array, (n, F) float32: activations, 0 where a latent is silent
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# latents whose products with all others are held at a time: 67 MB at 32,768, were none of them 0
_BLOCK = 256
NONE = -1  # no partner: never active together with any


class Partners(NamedTuple):
    """The latent of the other dictionary with the largest correlation, NONE if there is none above
    0.
    """

    ours: Ints  # (F,) for each of ours
    theirs: Ints  # (G,) for each of theirs
    correlation: Floats  # (F,) on the rows on which they were chosen; 0 without a partner


def best_partners(a: Codes, b: Codes) -> Partners:
    """Each latent's best partner, of equals the first."""
    largest, other = np.zeros(a.shape[1]), np.zeros(b.shape[1])
    ours, theirs = np.full(a.shape[1], NONE), np.full(b.shape[1], NONE)
    for first, row, column, r in _correlations(a, b):
        rows = row + first
        np.maximum.at(largest, rows, r)
        best = np.flatnonzero((r == largest[rows]) & (r > 0))[::-1]
        ours[rows[best]] = column[best]  # backwards: the first is written last
        before = other.copy()
        np.maximum.at(other, column, r)
        best = np.flatnonzero((r == other[column]) & (r > before[column]))[::-1]
        theirs[column[best]] = rows[best]
    return Partners(ours, theirs, largest)


def correlations(a: Codes, b: Codes) -> Floats:
    """(F, G) all of them, 0 for a latent without variance. For dictionaries whose product fits into
    memory.
    """
    (mean_a, inverse_a), (mean_b, inverse_b) = _moments(a), _moments(b)
    found = -np.outer(
        mean_a * inverse_a, mean_b * inverse_b
    )  # of pairs that are never active together
    for first, row, column, r in _correlations(a, b):
        found[row + first, column] = r
    return found


def _correlations(a: Codes, b: Codes) -> Any:
    """By blocks of our latents: the first of them, and (row, column, r) of each pair ever active
    together.
    """
    by_latent, n = sparse.csr_array(a.T), a.shape[0]
    (mean_a, inverse_a), (mean_b, inverse_b) = _moments(a), _moments(b)
    for first in range(0, a.shape[1], _BLOCK):
        product = by_latent[first : first + _BLOCK] @ b
        product.sort_indices()
        row = np.repeat(np.arange(product.shape[0]), np.diff(product.indptr))
        column = product.indices.astype(np.int64)
        r = (
            (product.data / n - mean_a[row + first] * mean_b[column])
            * inverse_a[row + first]
            * inverse_b[column]
        )
        yield first, row, column, r


def _moments(codes: Codes) -> tuple[Floats, Floats]:
    """(F,) mean over rows, and 1 / standard deviation, 0 without variance."""
    exact = codes.astype(np.float64)
    mean = np.asarray(exact.sum(0)).ravel() / codes.shape[0]
    variance = np.asarray(exact.multiply(exact).sum(0)).ravel() / codes.shape[0] - mean**2
    varies = variance > 1e-12 * np.maximum(mean**2, np.finfo(np.float64).tiny)
    return mean, np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)


def assignment(r: Floats) -> Ints:
    """(F,) the one-to-one assignment with the largest sum of correlations (Kuhn, 1955); NONE for
    who is left over.
    """
    rows, columns = linear_sum_assignment(r, maximize=True)
    found = np.full(len(r), NONE)
    found[rows] = columns
    return found


class Measured(NamedTuple):
    """Correlations of fixed pairs."""

    r: Floats  # (F,) 0 where a partner is missing or silent, NaN where the latent itself is
    draws: Floats  # (draws, F) the same over documents drawn with replacement


def measure(a: Codes, b: Codes, partner: Ints, document: Ints, draws: int, seed: int) -> Measured:
    """The correlation of each latent with its partner, and over resampled documents.

    Args:
        document: (n,) each row's.
    """
    _, dense = np.unique(document, return_inverse=True)
    m, n = int(dense.max()) + 1, len(dense)
    into = sparse.csr_array((np.ones(n), (dense, np.arange(n))), shape=(m, n))
    size = np.bincount(dense, minlength=m).astype(np.float64)
    rng = np.random.default_rng(seed)
    times = np.stack(
        [np.ones(m), *(np.bincount(rng.integers(0, m, m), minlength=m) for _ in range(draws))]
    )
    ours, theirs = sparse.csc_array(a.astype(np.float64)), sparse.csc_array(b.astype(np.float64))
    found = []
    for first in range(0, a.shape[1], _BLOCK):
        x = ours[:, first : first + _BLOCK]
        chosen = partner[first : first + _BLOCK]
        y = theirs[:, np.maximum(chosen, 0)] @ sparse.diags_array(
            (chosen != NONE).astype(np.float64)
        )
        columns = (x, y, x.multiply(x), y.multiply(y), x.multiply(y))
        found.append(_pearson(times @ size, *(times @ (into @ one).toarray() for one in columns)))
    r = np.concatenate(found, axis=1)
    return Measured(r[0], r[1:])


def _pearson(n: Floats, x: Floats, y: Floats, xx: Floats, yy: Floats, xy: Floats) -> Floats:
    """(draws, F) of sums over rows (draws, F), n (draws,) rows."""
    n = n[:, None]
    spread = np.maximum(xx / n - (x / n) ** 2, 0), np.maximum(yy / n - (y / n) ** 2, 0)
    scale = np.sqrt(spread[0] * spread[1])
    r = np.divide(xy / n - x * y / n**2, scale, out=np.zeros_like(x), where=scale > 0)
    return np.where(spread[0] > 0, r, np.nan)
