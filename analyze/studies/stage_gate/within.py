"""How well scores order right and wrong answers to the same question.

This is all of a reward that GRPO sees: it takes the mean of a question's answers from each, and
divides by their spread. What the answers to a question have in common is lost, and every question
counts once, however many answers it has and however many are right. So it does here.

    AUROC   mean over questions of the share of right-wrong pairs that a score orders, ties half
    rho     correlation of ranks within the question with being right
    given   that correlation at equal length, equally finished, by the same writer, and of answers
            that all give a number, or none

Intervals resample questions. p is of labels permuted inside questions. The permuted figure is
AUROC - 1/2 over its standard error between questions, which makes it right also where wrong answers
spread more than right ones (Chung and Romano, 2013).

Shapes: n answers to Q questions that have both right and wrong ones, S scores, B draws, k
covariates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from residual_saes.analyze.stats import Floats, figure, percentiles, permutation_p
from residual_saes.analyze.studies.contrast.effects import shuffled
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.data.errors import StopRequest

_CHUNK = 100  # permutations at a time: 80 MB for 100,000 answers
_NOTHING = 1e-9  # share of a sum of squares that rounding leaves
_LENGTHS = 3  # powers of the length's rank


def has_both(question: NDArray[Any], correct: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(n,) whether an answer's question has both right and wrong answers."""
    _, number = np.unique(question, return_inverse=True)
    right = np.bincount(number, correct)
    return np.asarray(((right > 0) & (right < np.bincount(number)))[number])


def centred(x: Floats, question: NDArray[Any]) -> Floats:
    """(n, d) less its question's mean; exactly 0 where only rounding is left of it."""
    _, number = np.unique(question, return_inverse=True)
    means = np.zeros((number.max() + 1, x.shape[1]))
    np.add.at(means, number, x)
    rest = x - (means / np.bincount(number)[:, None])[number]
    return np.where(np.abs(rest) > _NOTHING * np.abs(x).max(0), rest, 0.0)


@dataclass(frozen=True)
class Groups:
    """Answers to questions that have both right and wrong ones, question by question."""

    rows: NDArray[np.int64]  # (n,) of all answers, those that take part
    question: NDArray[np.int64]  # (n,) 0 to Q - 1, ascending
    correct: NDArray[np.bool_]  # (n,)
    covariates: Floats  # (n, k) centred within questions
    names: list[str]  # what the covariates are of

    @classmethod
    def of(cls, means: Means, rows: NDArray[np.int64]) -> Groups:
        """The groups among `rows` of the answers."""
        rows = rows[has_both(means.question[rows], means.correct[rows])]
        _, question = np.unique(means.question[rows], return_inverse=True)
        order = np.argsort(question, kind="stable")
        rows = rows[order]
        covariates, names = _covariates(means, rows)
        return cls(rows, question[order], means.correct[rows], covariates, names)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.question)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def right(self) -> NDArray[np.int64]:
        """(Q,) right answers."""
        return np.bincount(self.question, self.correct).astype(np.int64)

    @cached_property
    def weights(self) -> Floats:
        """(n,) by which every question's labels have a sum of squares of 1."""
        return np.asarray((self.sizes / (self.right * (self.sizes - self.right)))[self.question])

    def ranks(self, values: Floats) -> Floats:
        """(n,) ranks of values (n,) within their question, centred, by its number of answers."""
        # Sums of the same numbers may differ in the last digit.
        largest = np.abs(values).max(initial=0)
        coarse = np.round(values / largest, 9) if largest else values
        order = np.lexsort((coarse, self.question))
        new = np.ones(len(order), bool)
        new[1:] = np.diff(coarse[order]) != 0
        new[1:] |= np.diff(self.question) != 0
        run = np.cumsum(new) - 1
        means = np.bincount(run, np.arange(len(order))) / np.bincount(run)
        ranks = np.empty(len(order))
        ranks[order] = means[run] - (self.starts + (self.sizes - 1) / 2)[self.question]
        return np.asarray(ranks / self.sizes[self.question], np.float64)

    def sums(self, values: Floats) -> Floats:
        """(..., Q) sums over each question's answers of (..., n)."""
        return np.asarray(np.add.reduceat(values, self.starts, axis=-1), np.float64)

    def auroc(self, values: Floats) -> float:
        """Of values (n,)."""
        share = self.sums(self.weights * self.ranks(values) * self.correct)
        return float(0.5 + share.mean())


def _covariates(means: Means, rows: NDArray[np.int64]) -> tuple[Floats, list[str]]:
    """(n, k) columns of what GRPO's reward must not read alone, and their names.

    Three powers of the length's rank, and its rank within the question, take the place of any
    smooth function of length.
    """
    question = means.question[rows]
    length = means.length[rows].astype(np.float64)
    rank = 2 * stats.rankdata(length) / max(len(rows), 1) - 1
    within = np.zeros(len(rows))
    for name in np.unique(question):
        own = question == name
        within[own] = stats.rankdata(length[own]) / own.sum()
    columns = {"length": [*(rank**power for power in range(1, _LENGTHS + 1)), within]}
    columns["whether it is finished"] = [means.finished[rows].astype(np.float64)]
    if means.source is not None:
        writers = means.source[rows]
        columns["who wrote it"] = [1.0 * (writers == name) for name in np.unique(writers)[1:]]
    if means.number is not None:  # without one it is wrong, whatever it says
        columns["whether it gives a number"] = [1.0 * (means.number[rows] != "")]
    kept = []
    names = []
    for name, values in columns.items():
        if not len(rows) or not values:
            continue
        rest = centred(np.array(values).T, question)
        sizes = np.linalg.norm(rest, axis=0)
        if sizes.any():
            kept.append(rest[:, sizes > 0] / sizes[sizes > 0])
            names.append(name)
    return (np.hstack(kept) if kept else np.empty((len(rows), 0))), names


# -- figures ---------------------------------------------------------------------------------------


def measured(
    groups: Groups,
    scores: Mapping[str, Floats],
    reference: str,
    draws: int,
    seed: int,
    stop: StopRequest,
) -> dict[str, dict[str, Any]]:
    """Figures by score of all answers: auroc, rho, rho_given_length and behind; cap, p, questions.

    The first four are {value, interval}. `behind` is the AUROC of `reference` less the score's own.
    `questions` counts those within which the score differs, and `least_p` is what p could be at
    least. p is one-sided; None where the score is the same within every question.
    """
    questions = len(groups.sizes)
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(questions, np.full(questions, 1 / questions), size=draws)
    times = np.vstack([np.ones(questions), resampled])
    labels = groups.correct[shuffled(groups.question, draws, rng)]
    drawn = {}
    found: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        stop.check()
        ranks = groups.ranks(values[groups.rows])
        drawn[name] = _three(groups, ranks, times)
        own: dict[str, Any] = {}
        for key, column in zip(("auroc", "rho", "rho_given_length"), drawn[name].T, strict=True):
            own[key] = figure(column[0], percentiles(column[1:]))
        differs = groups.sums(np.square(ranks)) > 0
        own["cap"] = _cap(groups, ranks)
        own["questions"] = int(differs.sum())
        own["least_p"] = _least_p(groups, differs)
        own["p"] = _p(groups, ranks, labels) if differs.any() else None
        found[name] = own
    for name, own in found.items():
        behind = drawn[reference][:, 0] - drawn[name][:, 0]
        own["behind"] = figure(behind[0], percentiles(behind[1:]))
    return found


def _three(groups: Groups, ranks: Floats, times: Floats) -> Floats:
    """(B, 3) AUROC, rho and rho at equal covariates, with questions taken `times` (B, Q)."""
    label = groups.correct - (groups.right / groups.sizes)[groups.question]
    columns = np.column_stack([ranks, label, groups.covariates]) * np.sqrt(groups.weights)[:, None]
    products = columns[:, :, None] * columns[:, None, :]
    by_question = np.add.reduceat(products, groups.starts, axis=0)
    gram = np.tensordot(times, by_question, axes=1)  # (B, 2 + k, 2 + k)
    with np.errstate(divide="ignore", invalid="ignore"):  # a score without spread
        auroc = 0.5 + gram[:, 0, 1] / gram[:, 1, 1]
        rho = gram[:, 0, 1] / np.sqrt(gram[:, 0, 0] * gram[:, 1, 1])
        among = np.linalg.pinv(gram[:, 2:, 2:], rcond=_NOTHING, hermitian=True)
        rest = gram[:, :2, :2] - gram[:, :2, 2:] @ among @ gram[:, 2:, :2]
        spread = np.sqrt(rest[:, 0, 0] * rest[:, 1, 1])
        real = (rest[:, 0, 0] > _NOTHING * gram[:, 0, 0]) & (rest[:, 1, 1] > _NOTHING)
        given = np.where(real, rest[:, 0, 1] / spread, np.nan)
    return np.column_stack([auroc, rho, given])


def _cap(groups: Groups, ranks: Floats) -> float:
    """The largest rho of these ranks with any labels of which as many are right by question."""
    order = np.lexsort((-ranks, groups.question))
    place = np.arange(len(order)) - groups.starts[groups.question]
    best = place < groups.right[groups.question]
    total = float((groups.weights * ranks[order]) @ best)
    scale = float(groups.weights @ np.square(ranks)) * len(groups.sizes)
    return total / math.sqrt(scale) if scale else math.nan


def _least_p(groups: Groups, differs: NDArray[np.bool_]) -> float:
    """One over the number of ways to give the labels out, inside questions that tell them apart."""
    ways = 0.0
    pairs = zip(groups.sizes[differs], groups.right[differs], strict=True)
    for size, right in pairs:
        ways += math.log(math.comb(int(size), int(right)))
    return math.exp(-min(ways, 700.0))


def _p(groups: Groups, ranks: Floats, labels: NDArray[np.bool_]) -> float:
    """One-sided p of AUROC - 1/2 over its standard error, among labels (B, n)."""
    weighted = groups.weights * ranks

    def studentised(some: NDArray[np.bool_]) -> Floats:
        share = groups.sums(weighted * some)  # (..., Q) AUROC of each question, less 1/2
        # Questions of which every share is 1/2 to the last digit.
        scale = np.sqrt(np.square(share).sum(-1) + 1e-24)
        return np.asarray(share.sum(-1) / scale, np.float64)

    parts = [studentised(labels[at : at + _CHUNK]) for at in range(0, len(labels), _CHUNK)]
    observed = float(studentised(groups.correct[None])[0])
    return permutation_p(observed - _NOTHING, np.concatenate(parts))
