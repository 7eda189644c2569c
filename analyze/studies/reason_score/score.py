"""ReasonScore of a vocabulary in a corpus, beside that of random vocabularies.

The formulas stand in study.py.

Shapes: n tokens, F latents, G words, B vocabularies at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.stats import Floats, overlap_p, spearman
from residual_saes.analyze.studies.reason_score.corpus import (
    Corpus,
    Places,
    Word,
    draw_vocabularies,
    look_alikes,
    occurrences,
    sums_over,
    windows,
)
from residual_saes.data import durable
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress

ALPHA = 0.7
WORDS = (
    "alternatively", "hmm", "maybe", "wait", "perhaps", "let me", "therefore", "however", "But",
    "Another",
)  # fmt: skip
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
    capitals: bool  # a word in small letters stands for one with a capital, too
    against: bool  # p- is of the same words' windows in another corpus; else of all other tokens
    words: tuple[str, ...]


FORMULAS = {
    # AIRI-Institute/SAE-Reasoning extraction/compute_score.py
    "published": Formula(1, 2, False, True, True, False, WORDS),
    # caiovicentino/mechreward src/mechreward/features/reasonscore.py
    "mechreward": Formula(2, 3, True, False, False, True, tuple(map(str.lower, WORDS))),
}


# -- the score -------------------------------------------------------------------------------------


class Marked(NamedTuple):
    """A vocabulary in a corpus."""

    of_word: list[Places]  # (G) tokens in each word's windows
    frequency: list[int]  # (G) occurrences
    elsewhere: Places  # tokens in any word's window in the other corpus, if there is one


def mark(
    corpus: Corpus, words: Sequence[Word], formula: Formula, other: Corpus | None = None
) -> Marked:
    """Where the words' windows are."""
    of_word, frequency = _windows_of(corpus, words, formula)
    elsewhere = [np.empty(0, np.int64)]
    if other is not None:
        elsewhere += _windows_of(other, words, formula)[0]
    return Marked(of_word, frequency, np.unique(np.concatenate(elsewhere)))


def _windows_of(
    corpus: Corpus, words: Sequence[Word], formula: Formula
) -> tuple[list[Places], list[int]]:
    """By word the tokens in its windows, and how often it occurs."""
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
    return of_word, frequency


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


class Columns(NamedTuple):
    """Activations of some latents."""

    latents: Any  # their ids, or a slice
    active: Any  # (n, F')
    other: Any  # (n', F') in the other corpus; None without one


class Scorer:
    """Scores of vocabularies in one corpus, or in one against another."""

    def __init__(self, corpus: Corpus, formula: Formula, other: Corpus | None = None) -> None:
        assert (other is not None) == formula.against
        self.corpus = corpus
        self.formula = formula
        self.other = other
        self._of_latent = np.asarray(corpus.active.sum(0, dtype=np.float64)).ravel()  # (F,)
        self._of_row = _sums_of_rows(corpus)
        self._of_other_row = _sums_of_rows(other) if other else self._of_row
        self._count = int(corpus.kept.sum())

    def columns(self, latents: Any = slice(None)) -> Columns:
        """The activations of some latents."""
        other = self.other.active[:, latents] if self.other else None
        return Columns(latents, self.corpus.active[:, latents], other)

    def means(self, places: Sequence[Places]) -> Floats:
        """(len(places), F) mean activations, 0 over no token."""
        counts = np.maximum([len(tokens) for tokens in places], 1)
        means: Floats = sums_over(self.corpus.active, places) / counts[:, None]
        return means

    def scores(
        self,
        unions: Sequence[Places],
        elsewhere: Sequence[Places],
        means: Floats,
        columns: Columns,
    ) -> Floats:
        """(B, F') scores of vocabularies.

        Args:
            unions: (B) tokens in any of a vocabulary's windows.
            elsewhere: (B) those in the other corpus; not looked at without one.
            means: (B, G, F') `means` by word.
        """
        # p+ and p- are shares of means. The divisor of the means, the number of tokens, is the same
        # for all latents: shares of sums are enough.
        inside = sums_over(columns.active, unions)
        totals = _totals(self._of_row, unions)
        plus = np.divide(inside, totals, out=np.zeros_like(inside), where=totals > 0)
        if self.formula.against:
            beside = sums_over(columns.other, elsewhere)
            beside_totals = _totals(self._of_other_row, elsewhere)
            others = beside_totals > 0
        else:
            beside = self._of_latent[columns.latents] - inside
            beside_totals = self._of_latent.sum() - totals
            counts = np.array([len(tokens) for tokens in unions], np.float64)[:, None]
            others = (counts < self._count) & (beside_totals > 0)
        minus = np.divide(beside, beside_totals, out=np.zeros_like(inside), where=others)
        scores: Floats = plus * entropies(means, self.formula.normalised) ** ALPHA - minus
        return scores

    def of(self, marked: Marked) -> Floats:
        """(F,) scores of one vocabulary."""
        union = np.unique(np.concatenate(marked.of_word))
        means = self.means(marked.of_word)[None]
        first: Floats = self.scores([union], [marked.elsewhere], means, self.columns())[0]
        return first


def _sums_of_rows(corpus: Corpus) -> Floats:
    """(n,) the sum of each token's activations."""
    return np.asarray(corpus.active.sum(1, dtype=np.float64)).ravel()


def _totals(of_row: Floats, places: Sequence[Places]) -> Floats:
    """(len(places), 1) sums over tokens."""
    return np.array([of_row[tokens].sum() for tokens in places])[:, None]


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
    stand_ins = [Word(str(token), ((int(token),),)) for token in tokens]
    places, times = _windows_of(corpus, stand_ins, formula)
    elsewhere = _windows_of(scorer.other, stand_ins, formula)[0] if scorer.other else []
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
    columns = scorer.columns(latents)
    means = of_token[:, latents]
    progress = Progress()
    while done < wanted and len(latents):
        stop.check()
        block_size = max(1, _ELEMENTS // (len(words) * len(latents)))
        block = stand_in[done : min(done + block_size, first if done < first else wanted)]
        unions = _unions(corpus, places, block)
        others = _unions(scorer.other, elsewhere, block)
        scores = scorer.scores(unions, others, means[block], columns)
        exceeding[latents] += (scores >= observed[latents]).sum(0)
        compared[latents] += len(block)
        done += len(block)
        if done <= first:
            leading.append(-np.sort(-scores, axis=1)[:, :top])
        if done == first:
            promising = (1 + exceeding <= _PROMISING * (1 + compared)) & (compared > 0)
            latents = np.flatnonzero(promising)
            columns = scorer.columns(latents)
            means = of_token[:, latents]
        progress.show(
            f"{done:,}/{wanted:,} random vocabularies | {len(latents):,} latents",
            last=done == wanted or not len(latents),
        )
    p = np.where(compared > 0, (1 + exceeding) / (1 + compared), 1.0)
    ratio = _frequency_ratio(marked, [*times, 0], stand_in[:first])
    return observed, Null(p, wanted, first, np.concatenate(leading), ratio)


def _frequency_ratio(
    marked: Marked, frequency: Sequence[int], stand_in: NDArray[np.int64]
) -> float:
    """Median frequency of a word's stand-ins, over the word's own, of words that occur."""
    occurring = np.flatnonzero(marked.frequency)
    own = np.array(marked.frequency)[occurring]
    return float(np.median(np.array(frequency)[stand_in][:, occurring] / own))


def _unions(
    corpus: Corpus | None, places: Sequence[Places], vocabularies: NDArray[np.int64]
) -> list[Places]:
    """By vocabulary the tokens in any of its windows; none without a corpus.

    Args:
        places: of tokens.
        vocabularies: (B, G) indices into `places`; those past its end are words without look-alike.
    """
    unions: list[Places] = []
    if corpus is None:
        return unions
    for vocabulary in vocabularies:
        inside = np.zeros(len(corpus.tokens), np.bool_)
        for token in vocabulary[vocabulary < len(places)]:
            inside[places[token]] = True
        unions.append(np.flatnonzero(inside))
    return unions


# -- halves ----------------------------------------------------------------------------------------


def halves(
    corpus: Corpus,
    words: Sequence[Word],
    formula: Formula,
    tested: NDArray[np.int64],
    other: Corpus | None = None,
) -> dict[str, Any]:
    """How far the scores of two halves of the documents agree, over the latents that are tested."""
    scores = []
    for second in (True, False):
        part = _half(corpus, second)
        beside = _half(other, second) if other else None
        marked = mark(part, words, formula, beside)
        if not any(map(len, marked.of_word)):
            return {"spearman": None, "said": "one half of the documents has none of the words"}
        scores.append(Scorer(part, formula, beside).of(marked)[tested])
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


def _half(corpus: Corpus, second: bool) -> Corpus:
    rows = np.flatnonzero(_second_half(corpus.document) == second)
    return Corpus._make(column[rows] for column in corpus)


def _second_half(document: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether the token's document is in the second half, by a digest of its number."""
    numbers, which = np.unique(document, return_inverse=True)
    odd = [int(durable.digest(str(number).encode())[:8], 16) % 2 for number in numbers]
    return np.array(odd, bool)[which]
