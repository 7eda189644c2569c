"""How well scores tell right answers from wrong ones across questions, as the reference has it.

Permutations and resamplings move whole questions, so that answers to one question need not be
independent.

Shapes: n answers, S scores, B draws.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from residual_saes.analyze.stats import Floats, figure, percentiles, permutation_p
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress

FIGURES = ("auroc", "rho", "rho_given_length")  # the columns of `three`


class Scored(NamedTuple):
    """Answers with what is to tell the right ones."""

    scores: dict[str, Floats]  # (n,) each
    correct: NDArray[np.bool_]  # (n,)
    length: NDArray[np.int64]  # (n,)
    question: NDArray[np.int64]  # (n,) number of each answer's question


def permuted(
    correct: NDArray[np.bool_], question: NDArray[np.int64], draws: int, seed: int
) -> NDArray[np.bool_]:
    """(draws, n) labels; a question's are given to another question with as many answers."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(question, kind="stable")
    sizes = np.bincount(question)
    starts = np.cumsum(sizes) - sizes
    labels = np.tile(correct, (draws, 1))
    for size in np.unique(sizes[sizes > 0]):
        block = rows[starts[sizes == size][:, None] + np.arange(size)]  # (questions, size)
        for draw in labels:
            draw[block] = correct[block[rng.permutation(len(block))]]
    return labels


def resampled(question: NDArray[np.int64], draws: int, seed: int) -> list[NDArray[np.int64]]:
    """Of each draw the answers of questions drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(question, kind="stable")
    answers_of = np.split(rows, np.cumsum(np.bincount(question))[:-1])
    questions = len(answers_of)
    cases = []
    for _ in range(draws):
        drawn = rng.integers(0, questions, questions)
        cases.append(np.concatenate([answers_of[number] for number in drawn]))
    return cases


def measured(
    scored: Scored, reference: str, draws: int, seed: int, stop: StopRequest
) -> dict[str, dict[str, Any]]:
    """Figures by score: auroc, rho, rho_given_length and behind as {value, interval}; and p.

    `behind` is the AUROC of `reference` less the score's own, over the same resamplings of
    questions. p is one-sided, of rho and so of AUROC; None where there is none.
    """
    names = list(scored.scores)
    values = np.array([*scored.scores.values()])
    labels = permuted(scored.correct, scored.question, draws, seed)

    # Every figure on the answers, and on resampled questions.
    whole = three(values, scored.correct, scored.length)
    drawn = np.empty((draws, len(names), len(FIGURES)))
    progress = Progress()
    for draw, cases in enumerate(resampled(scored.question, draws, seed)):
        stop.check()
        drawn[draw] = three(values[:, cases], scored.correct[cases], scored.length[cases])
        progress.show(f"{draw + 1}/{draws} resamplings", last=draw + 1 == draws)

    first = names.index(reference)
    figures: dict[str, dict[str, Any]] = {}
    for score, name in enumerate(names):
        own: dict[str, Any] = {}
        for column, key in enumerate(FIGURES):
            own[key] = figure(whole[score, column], percentiles(drawn[:, score, column]))
        behind = whole[first, 0] - whole[score, 0]
        own["behind"] = figure(behind, percentiles(drawn[:, first, 0] - drawn[:, score, 0]))
        own["p"] = _p(whole[score, 1], values[score], labels)
        figures[name] = own
    return figures


def _p(rho: float, score: Floats, labels: NDArray[np.bool_]) -> float | None:
    """One-sided p of rho among permuted labels (draws, n).

    Returns:
        None of a score without spread, or if no two questions can exchange their labels.
    """
    if np.isnan(rho) or (labels == labels[0]).all():
        return None
    return permutation_p(rho, _correlations(score, labels))


def three(values: Floats, correct: NDArray[np.bool_], length: NDArray[np.int64]) -> Floats:
    """(S, 3) of (S, n) scores: AUROC, rho, and rho given length; NaN where they are not defined.

    rho is the rank correlation with `correct`; given length, the ranks of `length` are regressed
    out of both. One ranking serves all: `stats.auroc` and `spearman` would take ten times as long.
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
        rest = np.where(rest > 1e-12, rest, np.nan)
        partial = (rho[:-1] - with_length * of_length) / np.sqrt(rest)
    given_length = partial if scale[-1] else rho[:-1]  # without spread, length explains nothing
    return np.stack([auroc, rho[:-1], given_length], axis=1)


def _correlations(score: Floats, labels: NDArray[np.bool_]) -> Floats:
    """(draws,) rho of a score with each labelling; ranks of yes/no labels are linear in them."""
    rank = _centred(stats.rankdata(score)[None])[0]
    y = _centred(labels.astype(np.float64))
    rho: Floats = y @ rank / np.sqrt((rank @ rank) * np.square(y).sum(1))
    return rho


def _centred(x: Floats) -> Floats:
    """(k, n) rows less their means."""
    centred: Floats = x - x.mean(1, keepdims=True)
    return centred
