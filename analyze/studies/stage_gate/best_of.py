"""Best of n: how often the answer is right that a reward picks among n answers to a question.

A question has N answers, and every n of them are as likely to be drawn. So each figure is a mean
over all subsets of n, which is unbiased for n new answers. An answer's share of the picks is

    (C(below + ties, n) - C(below, n)) / (ties C(N, n))

with `below` answers of a lower score, and `ties` of its own score, itself among them. Of equal
scores one is taken at random. The oracle is right if any of the n is: 1 - C(wrong, n) / C(N, n)
(Chen et al., arXiv 2107.03374, eq. 1). The majority vote takes an answer with the number that most
of the n have; answers without a number do not vote.

Intervals resample questions. Two pickers are compared question by question. p flips the signs of
these differences at random, two-sided: where few questions differ, resampling them would give
intervals that are too narrow.

Shapes: Q questions, N answers to each, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from residual_saes.analyze.stats import Floats, figure, percentiles, permutation_p
from residual_saes.analyze.studies.contrast.means import Means

RANDOM = "random pick"
MAJORITY = "majority vote"
ORACLE = "any right"
_SUBSETS = 500  # of n answers that vote; of more, so many are drawn
_CHUNK = 50  # questions that vote at a time: 26 MB where 32 answers vote
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Pool:
    """Questions with as many answers each."""

    rows: NDArray[np.int64]  # (Q, N) of all answers
    correct: NDArray[np.bool_]  # (Q, N)
    number: NDArray[np.int64] | None  # (Q, N) equal for equal numbers, -1 for none
    left_out: int  # questions with fewer answers

    @classmethod
    def of(cls, means: Means, rows: NDArray[np.int64]) -> Pool:
        """The questions of these answers; N is the number of answers that most of them have.

        Of a question with more the first N are taken.
        """
        _, question = np.unique(means.question[rows], return_inverse=True)
        counts = np.bincount(question)
        usual = np.bincount(counts)
        n = int(len(usual) - 1 - np.argmax(usual[::-1]))
        starts = (np.cumsum(counts) - counts)[counts >= n]
        taken = rows[np.argsort(question, kind="stable")[starts[:, None] + np.arange(n)]]
        number = None
        if means.number is not None:
            _, codes = np.unique(means.number, return_inverse=True)
            number = np.where(means.number == "", -1, codes)[taken]
        return cls(taken, means.correct[taken], number, int((counts < n).sum()))

    @property
    def sizes(self) -> list[int]:
        """The values of n: powers of two up to N, and N."""
        n = self.rows.shape[1]
        return sorted({*(2**power for power in range(n.bit_length())), n})

    def picked(self, scores: Floats) -> Floats:
        """(Q, sizes) share of subsets of which the answer of the highest score is right.

        Args:
            scores: of all answers.
        """
        own = scores[self.rows]
        largest = np.abs(own).max(initial=0)
        if largest:  # sums of the same numbers may differ in the last digit
            own = np.round(own / largest, 9)
        below = (own[:, None] < own[:, :, None]).sum(2)
        ties = (own[:, None] == own[:, :, None]).sum(2)
        accuracies = []
        for size in self.sizes:
            ways = special.comb(np.arange(own.shape[1] + 1), size)
            share = (ways[below + ties] - ways[below]) / (ties * ways[-1])
            accuracies.append((share * self.correct).sum(1))
        return np.stack(accuracies, axis=1)

    def at_random(self) -> Floats:
        """(Q, sizes) the same of an answer that is taken at random."""
        return np.repeat(self.correct.mean(1)[:, None], len(self.sizes), axis=1)

    def any_right(self) -> Floats:
        """(Q, sizes) share of subsets with a right answer in them: no picker can do better."""
        wrong = (~self.correct).sum(1)
        n = np.array(self.sizes)
        missed = special.comb(wrong[:, None], n) / special.comb(self.rows.shape[1], n)
        return np.asarray(1 - missed, np.float64)

    def voted(self) -> Floats | None:
        """(Q, sizes) share of subsets whose majority vote is right; None if no number is known."""
        if self.number is None:
            return None
        rng = np.random.default_rng(0)
        accuracies = []
        for size in self.sizes:
            subsets = _subsets(self.rows.shape[1], size, rng)
            parts = []
            for start in range(0, len(self.rows), _CHUNK):
                part = slice(start, start + _CHUNK)
                parts.append(_votes(self.number[part][:, subsets], self.correct[part][:, subsets]))
            accuracies.append(np.concatenate(parts))
        return np.stack(accuracies, axis=1)


def _subsets(total: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(subsets, size) all subsets of `total` answers, or _SUBSETS random ones of them."""
    if comb(total, size) <= _SUBSETS:
        return np.array([*combinations(range(total), size)])
    return rng.permuted(np.tile(np.arange(total), (_SUBSETS, 1)), axis=1)[:, :size]


def _votes(number: NDArray[np.int64], correct: NDArray[np.bool_]) -> Floats:
    """(q,) share of (q, subsets, n) subsets of which the majority vote is right, ties at random."""
    votes = (number[..., None] == number[..., None, :]).sum(3)
    votes = np.where(number < 0, 0, votes)
    wins = votes == votes.max(2, keepdims=True)
    return np.asarray(((wins * correct).sum(2) / wins.sum(2)).mean(1), np.float64)


# -- figures ---------------------------------------------------------------------------------------


def measured(
    pool: Pool, pickers: Mapping[str, Floats], beside: Sequence[str], draws: int, seed: int
) -> dict[str, Any]:
    """Accuracy of every picker at every n, and how far each is ahead of those named `beside`.

    Args:
        pickers: by name (Q, sizes).
    """
    questions = len(pool.rows)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(questions, np.full(questions, 1 / questions), size=draws) / questions
    signs = rng.choice(np.array([-1.0, 1.0]), size=(draws, questions))

    def figures(values: Floats) -> list[dict[str, Any]]:
        points = []
        for column in values.T:
            interval = percentiles(times @ column) if questions > 1 else None
            points.append(figure(column.mean(), interval))
        return points

    accuracy = {}
    ahead: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, values in pickers.items():
        accuracy[name] = figures(values)
        ahead[name] = {}
        for other in beside:
            if other not in pickers or other == name:
                continue
            difference = values - pickers[other]
            ahead[name][other] = figures(difference)
            for own, column in zip(ahead[name][other], difference.T, strict=True):
                own["p"] = _p(column, signs)
    return {
        "n": pool.sizes,
        "questions": questions,
        "left_out": pool.left_out,
        "accuracy": accuracy,
        "ahead": ahead,
    }


def _p(difference: Floats, signs: Floats) -> float:
    """Two-sided p of the mean of differences (Q,) among flips of the questions' signs (B, Q)."""
    observed = abs(difference.sum()) - _ROUNDING * len(difference)
    return permutation_p(observed, np.abs(signs @ difference))
