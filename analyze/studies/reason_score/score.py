"""ReasonScore of a vocabulary in a corpus, beside that of random ones; the formula is in
`analyze.reason_score`.

Shapes: n tokens, F latents, G words, B vocabularies at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyze.stats import Floats, overlap_p, spearman
from analyze.studies.reason_score.corpus import (
    Corpus,
    Places,
    Word,
    draw_vocabularies,
    look_alikes,
    occurrences,
    sums_over,
    windows,
)
from data import durable
from data.errors import StopRequest
from data.journal import Progress

ALPHA = 0.7
LEVEL = 0.05  # of the false discovery rate
# vocabularies drawn for every latent; more only for those that may still become significant
_FIRST = 1000
_PROMISING = 0.01  # p value after these up to which more are drawn
_HALF_TOP = 20  # latents whose overlap between halves is counted
_ELEMENTS = 1 << 23  # of a block of vocabularies, by word and latent: 64 MB


class Formula(NamedTuple):
    """What the two codes that are about do differently."""

    before: int  # tokens of a window ahead of a word
    after: int  # and behind it
    head_only: bool  # a phrase is its first token
    normalised: bool  # entropy over ln |R|


FORMULAS = {"published": Formula(1, 2, False, True), "mechreward": Formula(2, 3, True, False)}


# -- the score -------------------------------------------------------------------------------------


class Marked(NamedTuple):
    """A vocabulary in a corpus."""

    of_word: list[Places]  # (G) tokens in each word's windows
    frequency: list[int]  # (G) occurrences


def mark(corpus: Corpus, words: Sequence[Word], formula: Formula) -> Marked:
    """Where the words' windows are."""
    places, frequency = [], []
    for word in words:
        phrases = {phrase[:1] if formula.head_only else phrase for phrase in word.phrases}
        starts = {phrase: occurrences(corpus, phrase) for phrase in phrases}
        around = [
            windows(corpus, at, len(phrase), formula.before, formula.after)
            for phrase, at in starts.items()
        ]
        places.append(np.unique(np.concatenate(around)))
        frequency.append(sum(map(len, starts.values())))
    return Marked(places, frequency)


def entropies(means: Floats, normalised: bool) -> Floats:
    """(..., F) entropy in nats of each latent's (..., G, F) means over words, over ln G if
    normalised; 0 if silent.
    """
    total = means.sum(-2, keepdims=True)
    share = np.divide(means, total, out=np.zeros_like(means), where=total > 0)
    found: Floats = -(share * np.log(share, out=np.zeros_like(share), where=share > 0)).sum(-2)
    return found / np.log(means.shape[-2]) if normalised else found


class Scorer:
    """Scores of vocabularies in one corpus."""

    def __init__(self, corpus: Corpus, formula: Formula) -> None:
        self.corpus, self.formula = corpus, formula
        self._all = np.asarray(corpus.active.sum(0, dtype=np.float64)).ravel()  # (F,)
        self._of_row = np.asarray(corpus.active.sum(1, dtype=np.float64)).ravel()  # (n,)
        self._count = int(corpus.kept.sum())

    def means(self, places: Sequence[Places]) -> Floats:
        """(len(places), F) mean activations, 0 over no token."""
        counts = np.maximum([len(one) for one in places], 1)
        found: Floats = sums_over(self.corpus.active, places) / counts[:, None]
        return found

    def scores(
        self, unions: Sequence[Places], means: Floats, active: Any, latents: Any = slice(None)
    ) -> Floats:
        """(B, F') scores of vocabularies.

        Args:
            unions: (B) tokens in any of a vocabulary's windows.
            means: (B, G, F') `means` by word.
            active: (n, F') the columns of `latents`.
        """
        inside = sums_over(active, unions)
        counts = np.array([len(one) for one in unions], np.float64)[:, None]
        totals = np.array([self._of_row[one].sum() for one in unions])[:, None]  # over all latents
        # Each mean's divisor, the number of tokens, is the same for all latents: shares need the
        # sums alone.
        plus = np.divide(inside, totals, out=np.zeros_like(inside), where=totals > 0)
        rest, rest_totals = self._all[latents] - inside, self._all.sum() - totals
        others = (counts < self._count) & (rest_totals > 0)
        minus = np.divide(rest, rest_totals, out=np.zeros_like(inside), where=others)
        found: Floats = plus * entropies(means, self.formula.normalised) ** ALPHA - minus
        return found

    def of(self, marked: Marked) -> Floats:
        """(F,) scores of one vocabulary."""
        union = np.unique(np.concatenate(marked.of_word))
        found: Floats = self.scores([union], self.means(marked.of_word)[None], self.corpus.active)[
            0
        ]
        return found


# -- the null --------------------------------------------------------------------------------------


class Null(NamedTuple):
    """What random vocabularies of the words' frequencies score."""

    # (F,) share of them that score at least as much, the words counted; 1 where not tested
    p: Floats
    draws: int  # those that a latent is compared with for as long as it may be significant
    first: int  # those that all were compared with
    leading: (
        Floats  # (first, top) the largest scores of each of these among the tested latents, falling
    )
    frequency_ratio: float  # median frequency of what stood for a word, over the word's


def matched(
    scorer: Scorer,
    words: Sequence[Word],
    marked: Marked,
    tested: NDArray[np.int64],
    rng: np.random.Generator,
    *,
    bos: int,
    draws: int,
    top: int,
    stop: StopRequest,
) -> tuple[Floats, Null]:
    """(F,) scores of the words, and what random vocabularies score.

    No more are drawn than one latent needs to be significant alone among all. Latents whose p value
    after the first 1,000 is at most 0.01 are compared with the rest too, which leaves p valid: one
    below 0.01 is as rare as if all latents had been compared with all.

    Args:
        tested: latents, ascending.
        draws: at most so many.
        top: how many of each vocabulary's largest scores are kept.
    """
    corpus = scorer.corpus
    observed = scorer.of(marked)
    own = {token for word in words for phrase in word.phrases for token in phrase}
    alike = look_alikes(corpus, marked.frequency, {*own, bos}, rng)
    tokens = np.unique(np.concatenate(alike))
    starts = [occurrences(corpus, [int(token)]) for token in tokens]
    places = [windows(corpus, at, 1, scorer.formula.before, scorer.formula.after) for at in starts]
    of_token = np.vstack(
        [scorer.means(places), np.zeros(len(observed))]
    )  # the last for words without look-alikes
    wanted = min(draws, round(len(tested) / LEVEL))
    drawn = draw_vocabularies(alike, wanted, rng)
    column = np.where(drawn < 0, len(tokens), np.searchsorted(tokens, np.maximum(drawn, 0)))
    exceeding, compared = np.zeros((2, len(observed)), np.int64)
    leading: list[Floats] = []
    first, at, progress = min(_FIRST, wanted), 0, Progress()
    latents, active, means = tested, corpus.active[:, tested], of_token[:, tested]
    while at < wanted and len(latents):
        stop.check()
        many = max(1, _ELEMENTS // (len(words) * len(latents)))
        block = column[at : min(at + many, first if at < first else wanted)]
        unions = [
            _union(len(corpus.tokens), [places[one] for one in row if one < len(tokens)])
            for row in block
        ]
        found = scorer.scores(unions, means[block], active, latents)
        exceeding[latents] += (found >= observed[latents]).sum(0)
        compared[latents] += len(block)
        at += len(block)
        if at <= first:
            leading.append(-np.sort(-found, axis=1)[:, :top])
        if at == first:
            latents = np.flatnonzero(
                (1 + exceeding <= _PROMISING * (1 + compared)) & (compared > 0)
            )
            active, means = corpus.active[:, latents], of_token[:, latents]
        last = at == wanted or not len(latents)
        progress.show(
            f"{at:,}/{wanted:,} random vocabularies | {len(latents):,} latents", last=last
        )
    stood = np.array([*map(len, starts), 0])[column[:first]]
    ratio = stood[:, np.flatnonzero(marked.frequency)] / np.array(
        [f for f in marked.frequency if f]
    )
    p = np.where(compared > 0, (1 + exceeding) / (1 + compared), 1.0)
    return observed, Null(p, wanted, first, np.concatenate(leading), float(np.median(ratio)))


def _union(n: int, places: Sequence[Places]) -> Places:
    inside = np.zeros(n, bool)
    for one in places:
        inside[one] = True
    return np.flatnonzero(inside)


# -- halves ----------------------------------------------------------------------------------------


def halves(
    corpus: Corpus, words: Sequence[Word], formula: Formula, tested: NDArray[np.int64]
) -> dict[str, Any]:
    """How far the scores of two halves of the documents agree, over the latents that are tested."""
    number, back = np.unique(corpus.document, return_inverse=True)
    second = np.array([int(durable.digest(str(one).encode())[:8], 16) % 2 for one in number], bool)[
        back
    ]
    scores, count = [], min(_HALF_TOP, len(tested))
    for half in (second, ~second):
        rows = np.flatnonzero(half)
        part = Corpus._make(column[rows] for column in corpus)
        marked = mark(part, words, formula)
        if not any(map(len, marked.of_word)):
            return {"spearman": None, "said": "one half of the documents has none of the words"}
        scores.append(Scorer(part, formula).of(marked)[tested])
    tops = [set(np.argsort(-score, kind="stable")[:count].tolist()) for score in scores]
    shared = len(tops[0] & tops[1])
    return {
        "spearman": spearman(*scores),
        "top": count,
        "shared": shared,
        "shared_by_chance": count**2 / len(tested),
        "p": overlap_p(len(tested), count, count, shared),
    }
