"""ReasonScore of a vocabulary in a corpus, beside that of random vocabularies.

The formula stands in study.py.

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
# Vocabularies that every latent is compared with. Only latents that may still become significant
# are compared with more.
FIRST = 1000
_PROMISING = 0.01  # largest p value after the first vocabularies with which a latent gets more
_HALF_TOP = 20  # latents whose overlap between halves is counted
_ELEMENTS = 1 << 23  # of a block of vocabularies, by word and latent: 64 MB


class Formula(NamedTuple):
    """Where the paper's code and its port, mechreward, differ."""

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
    of_word = []
    frequency = []
    for word in words:
        phrases = {phrase[:1] if formula.head_only else phrase for phrase in word.phrases}
        places = []
        times = 0
        for phrase in phrases:
            starts = occurrences(corpus, phrase)
            places.append(windows(corpus, starts, len(phrase), formula.before, formula.after))
            times += len(starts)
        of_word.append(np.unique(np.concatenate(places)))
        frequency.append(times)
    return Marked(of_word, frequency)


def entropies(means: Floats, normalised: bool) -> Floats:
    """(..., F) entropy in nats of each latent's (..., G, F) means by word; 0 if it is silent.

    Args:
        normalised: divide by ln G.
    """
    total = means.sum(-2, keepdims=True)
    share = np.divide(means, total, out=np.zeros_like(means), where=total > 0)
    log_share = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy: Floats = -(share * log_share).sum(-2)
    return entropy / np.log(means.shape[-2]) if normalised else entropy


class Scorer:
    """Scores of vocabularies in one corpus."""

    def __init__(self, corpus: Corpus, formula: Formula) -> None:
        self.corpus = corpus
        self.formula = formula
        self._of_latent = np.asarray(corpus.active.sum(0, dtype=np.float64)).ravel()  # (F,)
        self._of_row = np.asarray(corpus.active.sum(1, dtype=np.float64)).ravel()  # (n,)
        self._count = int(corpus.kept.sum())

    def means(self, places: Sequence[Places]) -> Floats:
        """(len(places), F) mean activations, 0 over no token."""
        counts = np.maximum([len(tokens) for tokens in places], 1)
        means: Floats = sums_over(self.corpus.active, places) / counts[:, None]
        return means

    def scores(
        self, unions: Sequence[Places], means: Floats, active: Any, latents: Any = slice(None)
    ) -> Floats:
        """(B, F') scores of vocabularies.

        Args:
            unions: (B) tokens in any of a vocabulary's windows.
            means: (B, G, F') `means` by word.
            active: (n, F') the columns of `latents`.
        """
        counts = np.array([len(tokens) for tokens in unions], np.float64)[:, None]
        totals = np.array([self._of_row[tokens].sum() for tokens in unions])[:, None]
        inside = sums_over(active, unions)
        outside = self._of_latent[latents] - inside
        outside_totals = self._of_latent.sum() - totals
        # p+ and p- are shares of means. The divisor of the means, the number of tokens, is the same
        # for all latents: shares of sums are enough.
        plus = np.divide(inside, totals, out=np.zeros_like(inside), where=totals > 0)
        others = (counts < self._count) & (outside_totals > 0)
        minus = np.divide(outside, outside_totals, out=np.zeros_like(inside), where=others)
        scores: Floats = plus * entropies(means, self.formula.normalised) ** ALPHA - minus
        return scores

    def of(self, marked: Marked) -> Floats:
        """(F,) scores of one vocabulary."""
        union = np.unique(np.concatenate(marked.of_word))
        means = self.means(marked.of_word)[None]
        first: Floats = self.scores([union], means, self.corpus.active)[0]
        return first


# -- the null --------------------------------------------------------------------------------------


class Null(NamedTuple):
    """What random vocabularies of the words' frequencies score."""

    # (F,) share of vocabularies that score at least as much, the words counted; 1 where not tested
    p: Floats
    draws: int  # vocabularies that a latent is compared with while it may become significant
    first: int  # vocabularies that all latents are compared with
    # (first, top) the largest scores of each of these among the tested latents, falling
    leading: Floats
    frequency_ratio: float  # median frequency of a word's stand-ins, over the word's


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
    first: int = FIRST,
) -> tuple[Floats, Null]:
    """(F,) scores of the words, and what random vocabularies score.

    As many are drawn as one latent needs to be significant alone among all tested. Latents whose p
    value after the first 1,000 is at most 0.01 are compared with the rest too. That leaves p valid:
    a p below 0.01 is as rare as if all latents had been compared with all vocabularies.

    Args:
        tested: latents, ascending.
        draws: vocabularies at most.
        top: largest scores of each vocabulary that are kept.
        first: vocabularies that all latents are compared with.
    """
    corpus = scorer.corpus
    formula = scorer.formula
    observed = scorer.of(marked)

    # What may stand for a word: each token with its windows, and the means over them.
    own = {token for word in words for phrase in word.phrases for token in phrase}
    alike = look_alikes(corpus, marked.frequency, {*own, bos}, rng)
    tokens = np.unique(np.concatenate(alike))
    starts = [occurrences(corpus, [int(token)]) for token in tokens]
    places = [windows(corpus, at, 1, formula.before, formula.after) for at in starts]
    # The last row is of words that have no look-alike.
    of_token = np.vstack([scorer.means(places), np.zeros(len(observed))])

    # The vocabularies, as rows of `of_token`.
    wanted = min(draws, round(len(tested) / LEVEL))
    first = min(first, wanted)
    drawn = draw_vocabularies(alike, wanted, rng)
    stand_in = np.where(drawn < 0, len(tokens), np.searchsorted(tokens, np.maximum(drawn, 0)))

    # Score them block by block: first for all tested latents, then for the promising ones.
    exceeding = np.zeros(len(observed), np.int64)
    compared = np.zeros(len(observed), np.int64)
    leading: list[Floats] = []
    done = 0
    latents = tested
    active = corpus.active[:, latents]
    means = of_token[:, latents]
    progress = Progress()
    while done < wanted and len(latents):
        stop.check()
        block_size = max(1, _ELEMENTS // (len(words) * len(latents)))
        block = stand_in[done : min(done + block_size, first if done < first else wanted)]
        unions = [_union(len(corpus.tokens), places, row) for row in block]
        scores = scorer.scores(unions, means[block], active, latents)
        exceeding[latents] += (scores >= observed[latents]).sum(0)
        compared[latents] += len(block)
        done += len(block)
        if done <= first:
            leading.append(-np.sort(-scores, axis=1)[:, :top])
        if done == first:
            promising = (1 + exceeding <= _PROMISING * (1 + compared)) & (compared > 0)
            latents = np.flatnonzero(promising)
            active = corpus.active[:, latents]
            means = of_token[:, latents]
        progress.show(
            f"{done:,}/{wanted:,} random vocabularies | {len(latents):,} latents",
            last=done == wanted or not len(latents),
        )
    p = np.where(compared > 0, (1 + exceeding) / (1 + compared), 1.0)
    ratio = _frequency_ratio(marked, [*map(len, starts), 0], stand_in[:first])
    return observed, Null(p, wanted, first, np.concatenate(leading), ratio)


def _frequency_ratio(
    marked: Marked, frequency: Sequence[int], stand_in: NDArray[np.int64]
) -> float:
    """Median frequency of a word's stand-ins, over the word's own, of words that occur."""
    occurring = np.flatnonzero(marked.frequency)
    own = np.array(marked.frequency)[occurring]
    return float(np.median(np.array(frequency)[stand_in][:, occurring] / own))


def _union(n: int, places: Sequence[Places], vocabulary: NDArray[np.int64]) -> Places:
    """The tokens in any window of a vocabulary, whose words are indices into `places`.

    Args:
        n: tokens of the corpus.
    """
    inside = np.zeros(n, bool)
    for token in vocabulary:
        if token < len(places):  # else the word has no look-alike
            inside[places[token]] = True
    return np.flatnonzero(inside)


# -- halves ----------------------------------------------------------------------------------------


def halves(
    corpus: Corpus, words: Sequence[Word], formula: Formula, tested: NDArray[np.int64]
) -> dict[str, Any]:
    """How far the scores of two halves of the documents agree, over the latents that are tested."""
    scores = []
    second = _second_half(corpus.document)
    for half in (second, ~second):
        rows = np.flatnonzero(half)
        part = Corpus._make(column[rows] for column in corpus)
        marked = mark(part, words, formula)
        if not any(map(len, marked.of_word)):
            return {"spearman": None, "said": "one half of the documents has none of the words"}
        scores.append(Scorer(part, formula).of(marked)[tested])
    count = min(_HALF_TOP, len(tested))
    tops = [set(np.argsort(-score, kind="stable")[:count].tolist()) for score in scores]
    shared = len(tops[0] & tops[1])
    return {
        "spearman": spearman(*scores),
        "top": count,
        "shared": shared,
        "shared_by_chance": count**2 / len(tested),
        "p": overlap_p(len(tested), count, count, shared),
    }


def _second_half(document: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether the token's document is in the second half, by a digest of its number."""
    numbers, which = np.unique(document, return_inverse=True)
    odd = [int(durable.digest(str(number).encode())[:8], 16) % 2 for number in numbers]
    return np.array(odd, bool)[which]
