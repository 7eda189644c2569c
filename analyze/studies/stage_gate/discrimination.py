"""How well scores tell right answers from wrong ones, and how sure that is when a question has
several answers.

Shapes: n answers, S scores, B draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analyze.stats import Floats, figure, percentiles, permutation_p
from data.errors import StopRequest
from data.journal import Progress


class Scored(NamedTuple):
    """Answers with what is to tell the right ones."""

    scores: dict[str, Floats]  # (n,) each
    correct: NDArray[np.bool_]
    length: NDArray[np.int64]
    question: NDArray[np.int64]  # number of each answer's question


def permuted(
    correct: NDArray[np.bool_], question: NDArray[np.int64], draws: int, seed: int
) -> NDArray[np.bool_]:
    """(draws, n) labels, whole questions' given to other questions with as many answers."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(question, kind="stable")
    sizes = np.bincount(question)
    starts = np.cumsum(sizes) - sizes
    found = np.tile(correct, (draws, 1))
    for size in np.unique(sizes[sizes > 0]):
        block = rows[starts[sizes == size][:, None] + np.arange(size)]  # (questions, size)
        for labels in found:
            labels[block] = correct[block[rng.permutation(len(block))]]
    return found


def resampled(question: NDArray[np.int64], draws: int, seed: int) -> list[NDArray[np.int64]]:
    """Answers of questions drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(question, kind="stable")
    parts = np.split(rows, np.cumsum(np.bincount(question))[:-1])
    return [
        np.concatenate([parts[one] for one in rng.integers(0, len(parts), len(parts))])
        for _ in range(draws)
    ]


def measured(
    of: Scored, reference: str, draws: int, seed: int, stop: StopRequest
) -> dict[str, dict[str, Any]]:
    """By score: auroc, rho, rho_given_length and behind as {value, interval}; and one-sided p, of
    rho and so of AUROC.

    `behind` is the AUROC of `reference` less the score's own, over the same resamplings of
    questions.
    """
    labels = permuted(of.correct, of.question, draws, seed)
    names, values, progress = list(of.scores), np.array([*of.scores.values()]), Progress()
    drawn = np.empty((draws, len(names), 3))
    for at, cases in enumerate(resampled(of.question, draws, seed)):
        stop.check()
        correct, length = of.correct[cases], of.length[cases]
        drawn[at] = three(values[:, cases], correct, length)
        progress.show(f"{at + 1}/{draws} resamplings", last=at + 1 == draws)
    whole = three(values, of.correct, of.length)
    first = names.index(reference)
    found: dict[str, dict[str, Any]] = {}
    for at, name in enumerate(names):
        figures = [figure(whole[at, which], percentiles(drawn[:, at, which])) for which in range(3)]
        behind = figure(
            whole[first, 0] - whole[at, 0], percentiles(drawn[:, first, 0] - drawn[:, at, 0])
        )
        # A score without spread tells nothing: it is no larger than any permutation's.
        p = (
            1.0
            if np.isnan(whole[at, 1])
            else permutation_p(whole[at, 1], _correlations(values[at], labels))
        )
        found[name] = {
            **dict(zip(("auroc", "rho", "rho_given_length"), figures, strict=True)),
            "behind": behind,
            "p": p,
        }
    return found


def three(values: Floats, correct: NDArray[np.bool_], length: NDArray[np.int64]) -> Floats:
    """(S, 3) of (S, n) scores: AUROC, rho, and rho given length; NaN where they are not defined.

    `stats.auroc`, `spearman` and `partial_spearman` of each, by one ranking: these would take ten
    times as long.
    """
    ranks = _centred(stats.rankdata(np.vstack([values, length]), axis=1))
    y = _centred(correct[None].astype(np.float64))[0]
    along = ranks @ y
    scale = np.sqrt(np.square(ranks).sum(1))
    right = int(correct.sum())
    with np.errstate(divide="ignore", invalid="ignore"):  # one class, or a score without spread
        auroc = 0.5 + along[:-1] / (right * (len(correct) - right))
        with_length = ranks[:-1] @ ranks[-1] / (scale[:-1] * scale[-1])
        rho = along / (scale * np.sqrt(y @ y))
        of_length = rho[-1]
        rest = (1 - with_length**2) * (1 - of_length**2)
        partial = (rho[:-1] - with_length * of_length) / np.sqrt(
            np.where(rest > 1e-12, rest, np.nan)
        )
    return np.stack([auroc, rho[:-1], partial if scale[-1] else rho[:-1]], axis=1)


def _centred(x: Floats) -> Floats:
    found: Floats = x - x.mean(1, keepdims=True)
    return found


def _correlations(score: Floats, labels: NDArray[np.bool_]) -> Floats:
    """(draws,) rho of a score with each labelling; ranks of yes/no labels are linear in them."""
    rank = _centred(stats.rankdata(score)[None])[0]
    y = _centred(labels.astype(np.float64))
    found: Floats = y @ rank / np.sqrt((rank @ rank) * np.square(y).sum(1))
    return found
