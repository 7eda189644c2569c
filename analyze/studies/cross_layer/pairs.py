"""Of each latent the few of another dictionary that predict it, and how well.

Partners are chosen by the correlation of activations on half of the documents. All that is said of
them is from the other half:

    r          correlation of the activations, zeros included; r^2 is what one partner explains
    explained  R^2 of the regression on all partners, its coefficients from the choosing half
    q          of the exact test of rotation.py, on rows in which both are strong, adjusted over all
               pairs (Benjamini and Hochberg, 1995)

Shapes: n rows; F latents that predict, G that are predicted, T partners of each; of the moments
index 0 of T + 1 is the predicted latent itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.latents.codes import Codes, Ints
from residual_saes.analyze.latents.matching import BLOCK, NONE, best_few
from residual_saes.analyze.stats import Floats, benjamini_hochberg
from residual_saes.analyze.studies.cross_layer.rotation import Runs, coincidences
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress, note

TOP = 5  # partners of a latent
LEVEL = 0.05  # of q, up to which a pair predicts
# A latent is strong in the rows of its largest activations, in this share of all rows at most. Of
# latents that fire everywhere, only that says anything.
STRONG = 0.05


class Found(NamedTuple):
    """Pairs and their figures on the measuring half; NaN where there is no partner."""

    partner: Ints  # (G, T) latents that predict, the best first; NONE
    judged: NDArray[np.bool_]  # (G,) whether it fires often enough on either half
    able: NDArray[np.bool_]  # (F,) the same of those that predict
    fires: Ints  # (G,) rows in which each fires
    rows: NDArray[np.int64]  # (), of the measuring half
    partner_fires: Floats  # (G, T)
    together: Floats  # (G, T) rows in which both fire
    r: Floats  # (G, T)
    slope: Floats  # (G, T) of the regression on this partner alone
    explained: Floats  # (G,)
    strong: Floats  # (G, T) rows in which both are strong
    expected: Floats  # (G, T) what the null expects of them
    q: Floats  # (G, T)

    @property
    def given_partner(self) -> Floats:
        """(G, T) P(the latent fires | the partner fires)."""
        return self.together / self.partner_fires

    @property
    def given_latent(self) -> Floats:
        """(G, T) P(the partner fires | the latent fires)."""
        return self.together / self.fires[:, None]

    @property
    def lift(self) -> Floats:
        """(G, T) rows in which both fire over what independence gives."""
        return self.given_partner / self.fires[:, None] * self.rows

    @property
    def jaccard(self) -> Floats:
        """(G, T) rows in which both fire over those in which either does."""
        return self.together / (self.fires[:, None] + self.partner_fires - self.together)

    @property
    def phi(self) -> Floats:
        """(G, T) correlation of firing."""
        a = self.fires[:, None] / self.rows
        b = self.partner_fires / self.rows
        return (self.together / self.rows - a * b) / np.sqrt(a * (1 - a) * b * (1 - b))


def find(
    theirs: Codes,
    ours: Codes,
    document: Ints,
    half: NDArray[np.bool_],
    min_firing: int,
    stop: StopRequest,
) -> Found:
    """Which of `ours` (n, F) predict which of `theirs` (n, G).

    Args:
        document: (n,) of each row.
        half: (n,) rows of the documents that choose.
        min_firing: rows of either half in which a latent fires, for it to be judged.
    """
    choose = np.flatnonzero(half)
    rest = np.flatnonzero(~half)
    x, y = ours[choose], theirs[choose]
    x_rest, y_rest = sparse.csc_array(ours[rest]), sparse.csc_array(theirs[rest])
    able = _often(x, x_rest, min_firing)
    judged = _often(y, y_rest, min_firing)
    partner, _ = best_few(y, x, TOP, able, stop)
    partner[~judged] = NONE
    mean, second = _moments(sparse.csc_array(y), sparse.csc_array(x), partner, stop)
    fitted = _fitted(mean, second)
    mean, second = _moments(y_rest, x_rest, partner, stop)
    lacks = partner == NONE
    own_variance, variance, covariance = _variances(mean, second)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = covariance / np.sqrt(own_variance[:, None] * variance)
        slope = covariance / variance
        explained = 1 - _squared_error(*fitted, mean, second) / own_variance
    fires = np.diff(y_rest.indptr).astype(np.int64)
    partner_fires = np.diff(x_rest.indptr)[partner].astype(np.float64)
    together = _together(y_rest, x_rest, partner, stop)
    strong, expected, q = _tested(y_rest, x_rest, partner, Runs.of(document[rest]), stop)
    explained[~judged] = np.nan
    for figures in (r, slope, partner_fires, together):
        figures[lacks] = np.nan
    return Found(
        partner=partner,
        judged=judged,
        able=able,
        fires=fires,
        rows=np.array(len(rest)),
        partner_fires=partner_fires,
        together=together,
        r=r,
        slope=slope,
        explained=explained,
        strong=strong,
        expected=expected,
        q=q,
    )


def _often(chosen: Codes, rest: Codes, least: int) -> NDArray[np.bool_]:
    counts = [np.bincount(part.nonzero()[1], minlength=part.shape[1]) for part in (chosen, rest)]
    return np.minimum(*counts) >= least


def _moments(y: Codes, x: Codes, partner: Ints, stop: StopRequest) -> tuple[Floats, Floats]:
    """Means (G, T + 1), and means of products (G, T + 1, T + 1); 0 without a partner.

    Args:
        y: (n, G) by column.
        x: (n, F) by column.
    """
    size = partner.shape[1] + 1
    mean = np.zeros((len(partner), size))
    second = np.zeros((len(partner), size, size))
    for first in range(0, len(partner), BLOCK):
        stop.check()
        note(f"moments of {first:,} of {len(partner):,} latents")
        part = slice(first, first + BLOCK)
        columns = [y[:, part].astype(np.float64), *_partners(x, partner[part])]
        for i, one in enumerate(columns):
            mean[part, i] = np.asarray(one.sum(0)).ravel() / y.shape[0]
            for j, other in enumerate(columns[i:], i):
                product = np.asarray(one.multiply(other).sum(0)).ravel() / y.shape[0]
                second[part, i, j] = second[part, j, i] = product
    return mean, second


def _partners(x: Codes, partner: Ints) -> list[Codes]:
    """T times (n, g) the partners' activations, 0 where there is none."""
    parts = []
    for column in partner.T:
        there = sparse.diags_array((column != NONE).astype(np.float64))
        parts.append(sparse.csc_array(x[:, np.maximum(column, 0)] @ there))
    return parts


def _together(y: Codes, x: Codes, partner: Ints, stop: StopRequest) -> Floats:
    """(G, T) rows in which both fire."""
    counts = np.zeros(partner.shape)
    for first in range(0, len(partner), BLOCK):
        stop.check()
        part = slice(first, first + BLOCK)
        fires = y[:, part].astype(bool)
        for rank, other in enumerate(_partners(x, partner[part])):
            counts[part, rank] = np.asarray(fires.multiply(other.astype(bool)).sum(0)).ravel()
    return counts


def _variances(mean: Floats, second: Floats) -> tuple[Floats, Floats, Floats]:
    """The latents' variance (G,), their partners' (G, T), and the covariances (G, T)."""
    centred = second - mean[:, :, None] * mean[:, None, :]
    diagonal = np.maximum(np.einsum("gtt->gt", centred), 0)
    return diagonal[:, 0], diagonal[:, 1:], centred[:, 0, 1:]


def _fitted(mean: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Intercept (G,) and coefficients (G, T) of the least squares on all partners."""
    centred = second - mean[:, :, None] * mean[:, None, :]
    inverse = np.linalg.pinv(centred[:, 1:, 1:], rcond=1e-9, hermitian=True)
    weights = (inverse @ centred[:, 1:, :1])[..., 0]
    return mean[:, 0] - (weights * mean[:, 1:]).sum(1), weights


def _squared_error(intercept: Floats, weights: Floats, mean: Floats, second: Floats) -> Floats:
    """(G,) mean squared error of a regression on rows with these moments."""
    signs = np.concatenate([np.ones((len(weights), 1)), -weights], axis=1)
    squares = np.einsum("gi,gij,gj->g", signs, second, signs)
    return np.asarray(squares + intercept * (intercept - 2 * (signs * mean).sum(1)), np.float64)


def _tested(
    y: Codes, x: Codes, partner: Ints, runs: Runs, stop: StopRequest
) -> tuple[Floats, Floats, Floats]:
    """Rows in which both are strong, what the null expects, and q; (G, T) each."""
    together, expected, p = (np.full(partner.shape, np.nan) for _ in range(3))
    most = max(1, int(STRONG * y.shape[0]))
    progress = Progress()
    pairs = np.argwhere(partner != NONE)
    for number, (latent, rank) in enumerate(pairs.tolist()):
        stop.check()
        progress.show(f"{number:,} of {len(pairs):,} pairs tested")
        ours = _strong(x, partner[latent, rank], most)
        found = coincidences(ours, _strong(y, latent, most), runs)
        together[latent, rank], expected[latent, rank], p[latent, rank] = found
    q = np.full(partner.shape, np.nan)
    q[partner != NONE] = benjamini_hochberg(p[partner != NONE])
    return together, expected, q


def _strong(codes: Codes, latent: int, most: int) -> Ints:
    """The rows of a latent's largest activations, ascending."""
    span = slice(*codes.indptr[latent : latent + 2])
    rows, values = codes.indices[span], codes.data[span]
    if len(rows) > most:
        rows = rows[values >= np.partition(values, -most)[-most]]
    return np.sort(rows).astype(np.int64)
