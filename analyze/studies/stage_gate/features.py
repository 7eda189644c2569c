"""The features that make R, and others that could have.

Shapes: n answers, F latents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyze.stats import Floats, auroc
from analyze.studies.contrast.effects import Design, columns
from analyze.studies.stage_gate.within import Groups
from data.errors import StopRequest

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


def random_features(
    features: Any,
    correct: NDArray[np.bool_],
    chosen: Chosen,
    draws: int,
    stop: StopRequest,
    groups: Groups | None = None,
) -> Floats:
    """(draws,) AUROC of as many random features as were chosen, with signs from discovery too.

    Without those signs they would know less than R does, and R would pass for a good choice where
    any features do as well.

    Args:
        features: (n, F) of the validation answers.
        groups: of the same answers in this order, where the AUROC is that within questions.
    """
    rng = np.random.default_rng(_SEED)
    size = len(chosen.helpful) + len(chosen.harmful)
    signs = np.sign(chosen.g[chosen.eligible])
    by_column = features.tocsc()[:, chosen.eligible]
    aurocs = np.empty(draws)
    for draw in range(draws):
        stop.check()
        some = rng.choice(len(chosen.eligible), size, replace=False)
        values = np.asarray(by_column[:, some] @ signs[some], np.float64).ravel()
        aurocs[draw] = groups.auroc(values) if groups else auroc(values, correct)
    return aurocs
