"""The features that make R, and others that could have.

Shapes: n answers, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.latents.matched import random_latents
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.contrast.effects import Design, columns
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress

EACH = 10  # helpful features, and harmful ones
_SEED = 0
_WIDTH = 4096  # features held dense at a time


class Chosen(NamedTuple):
    """Features by their effect on the discovery answers, the largest first."""

    helpful: NDArray[np.int64]
    harmful: NDArray[np.int64]
    g: Floats  # (F,) Hedges', right minus wrong; 0 where a feature was not eligible
    eligible: NDArray[np.int64]  # those that fire in enough discovery answers

    def weights(self) -> Floats:
        """(F,) 1, -1 or 0."""
        weights = np.zeros(len(self.g))
        weights[self.helpful] = 1
        weights[self.harmful] = -1
        return weights


def choose(
    features: Any,
    correct: NDArray[np.bool_],
    min_firing: int,
    question: NDArray[np.str_] | None = None,
) -> Chosen:
    """The features that differ most between right and wrong answers, at most EACH either way.

    Args:
        features: (n, F) scipy CSR of the discovery answers' means.
        min_firing: answers in which a feature must fire.
        question: (n,) of answers that are compared within their question, which has both right and
            wrong ones.
    """
    by_column = features.tocsc()
    eligible = np.flatnonzero(np.diff(by_column.indptr) >= min_firing)
    g = np.zeros(features.shape[1])
    if len(eligible):
        paired = question is not None
        names = np.arange(len(correct)) if question is None else question
        nothing = np.empty((len(correct), 0))
        effect = Design.of(correct, names, nothing, paired=paired, shuffles=0, seed=0).raw
        parts = columns(by_column[:, eligible], _WIDTH)
        g[eligible] = np.hstack([effect.d(part)[0] for part in parts])
    order = eligible[np.argsort(-g[eligible], kind="stable")]
    helpful = order[:EACH]
    harmful = order[::-1][:EACH]
    return Chosen(helpful[g[helpful] > 0], harmful[g[harmful] < 0], g, eligible)


def density(means: Means, rows: NDArray[np.int64]) -> Floats:
    """(F,) share of the tokens of these answers on which each latent fires."""
    assert means.firings is not None
    tokens = int(means.length[rows].sum())
    return np.asarray(means.firings[rows].sum(axis=0), np.float64).ravel() / max(tokens, 1)


def random_scores(
    features: Any, densities: Floats, chosen: Chosen, draws: int, stop: StopRequest
) -> Iterator[Floats] | None:
    """`draws` scores (n,) of as many random latents as were chosen, of nearly equal density.

    They have the signs that they have on discovery. Without those they would know less than R does,
    and R would pass for a good choice where any features do as well.

    Args:
        features: (n, F) of all answers.
        densities: (F,) on the discovery answers.

    Returns:
        None where no feature was chosen, or too few are eligible beside the chosen ones.
    """
    picked = [*chosen.helpful, *chosen.harmful]
    if not picked or len(chosen.eligible) < 2 * len(picked):
        return None
    among = np.zeros(len(densities))
    among[chosen.eligible] = densities[chosen.eligible]
    return _random_scores(features.tocsc(), among, chosen, draws, stop)


def _random_scores(
    by_column: Any, among: Floats, chosen: Chosen, draws: int, stop: StopRequest
) -> Iterator[Floats]:
    picked = [*chosen.helpful, *chosen.harmful]
    rng = np.random.default_rng(_SEED)
    progress = Progress()
    for draw in range(draws):
        stop.check()
        some = random_latents(among, picked, rng)
        yield np.asarray(by_column[:, some] @ np.sign(chosen.g[some]), np.float64).ravel()
        progress.show(f"{draw + 1}/{draws} sets of random latents", last=draw + 1 == draws)
