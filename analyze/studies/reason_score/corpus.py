"""Stored text as a corpus: where words stand, the windows around them, and their look-alikes.

Shapes: n tokens of the corpus in the order of the text, F latents, G words of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress
from residual_saes.harvest.tokens import Tokenizer

Places = NDArray[np.int64]  # positions in a corpus, ascending, without repetition
_NEAR = np.log(2)  # look-alikes are up to twice as frequent as a word, or half,
_FEWEST = 10  # but at least so many of the nearest
_MOST = 50  # and at most so many
_REDRAWS = 100  # of a vocabulary in which one token stands for two words


class Corpus(NamedTuple):
    """Text with its activations."""

    tokens: NDArray[np.int64]  # (n,)
    piece: NDArray[np.int64]  # (n,) number of the document's piece; no window crosses its end
    document: NDArray[np.int64]  # (n,)
    kept: NDArray[np.bool_]  # (n,) False for BOS and what else is left out: these never count
    active: Any  # (n, F) scipy CSR float32 activations, empty where not kept


def read_corpus(
    subject: Subject, limit: int, stop: StopRequest, kinds: Sequence[int] | None = None
) -> Corpus:
    """The subject's text, encoded: 8 bytes per active latent, 0.5 GB at 5e5 rows of k = 128.

    Args:
        limit: see `Subject.rows`.
        kinds: see `Subject.firings`.
    """
    parts: list[Corpus] = []
    rows = 0
    pieces = 0
    progress = Progress()
    for firings in subject.firings(limit, kinds):
        stop.check()
        unit = firings.unit
        tokens = subject.store.tokens(unit.number).ravel().astype(np.int64)
        document = subject.store.document(unit.number).ravel().astype(np.int64)
        piece = np.cumsum(subject.store.piece_starts(unit.number).ravel()) + pieces
        pieces = int(piece[-1])
        kept = np.zeros(len(tokens), bool)
        kept[unit.local[firings.rows]] = True
        coordinates = (unit.local[firings.row], firings.latent)
        shape = (len(tokens), subject.sae.d_sae)
        active = sparse.csr_matrix((firings.value, coordinates), shape, np.float32)
        parts.append(Corpus(tokens, piece, document, kept, active))
        rows += len(tokens)
        progress.show(f"{rows:,} tokens encoded")
    return Corpus(
        tokens=np.concatenate([part.tokens for part in parts]),
        piece=np.concatenate([part.piece for part in parts]),
        document=np.concatenate([part.document for part in parts]),
        kept=np.concatenate([part.kept for part in parts]),
        active=sparse.vstack([part.active for part in parts], "csr"),
    )


class Word(NamedTuple):
    """A word or phrase with every way to write it."""

    name: str
    phrases: tuple[tuple[int, ...], ...]  # token ids


def words_of(tokenizer: Tokenizer, names: Sequence[str], *, capitals: bool = True) -> list[Word]:
    """Words by name.

    A name in small letters stands for four spellings: with and without a capital, with and
    without a space before it. A name with a capital, or with a space before it, stands for itself
    alone.

    Args:
        capitals: False: every name stands for itself, with and without a space before it.
    """
    words = []
    for name in names:
        spellings = [name]
        if not capitals:
            spellings = list(dict.fromkeys([name, f" {name.lstrip()}"]))
        elif name == name.lower() and not name[:1].isspace():
            capital = name.capitalize()
            spellings = [name, capital, f" {name}", f" {capital}"]
        phrases = [tuple(ids) for ids in tokenizer.encode(list(spellings)) if ids]
        words.append(Word(name, tuple(dict.fromkeys(phrases))))
    return words


def occurrences(corpus: Corpus, phrase: Sequence[int]) -> Places:
    """Where the phrase begins; all of it stands in one piece."""
    count = len(corpus.tokens) - len(phrase) + 1
    if count < 1:
        return np.empty(0, np.int64)
    matches = np.ones(count, bool)
    for offset, token in enumerate(phrase):
        matches &= corpus.tokens[offset : count + offset] == token
    matches &= corpus.piece[:count] == corpus.piece[len(phrase) - 1 :]
    return np.flatnonzero(matches)


def windows(corpus: Corpus, starts: Places, length: int, before: int, after: int) -> Places:
    """The kept tokens around phrases, in the same piece.

    Args:
        starts: where the phrases begin.
        length: tokens of a phrase.
        before: tokens of a window ahead of a phrase.
        after: and behind it.
    """
    around = starts[:, None] + np.arange(-before, length + after)
    inside = (around >= 0) & (around < len(corpus.tokens))
    around = np.where(inside, around, starts[:, None])
    inside &= (corpus.piece[around] == corpus.piece[starts, None]) & corpus.kept[around]
    return np.unique(around[inside])


def look_alikes(
    corpus: Corpus, frequencies: Sequence[int], excluded: set[int], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """For each frequency the tokens nearest to it in log frequency, ties by chance.

    Those within a factor of 2, at most 50 of them, at least the 10 nearest. A frequency of 0 has
    none.

    Args:
        excluded: tokens that are no look-alikes.

    Raises:
        SettingError: the corpus has fewer than 10 other tokens.
    """
    ids, counts = np.unique(corpus.tokens[corpus.kept], return_counts=True)
    allowed = ~np.isin(ids, list(excluded))
    ids = ids[allowed]
    counts = counts[allowed]
    if len(ids) < _FEWEST:
        raise SettingError(
            f"the corpus has {len(ids)} tokens beside study.words, and {_FEWEST} are needed to "
            "draw others as frequent; give fewer words, or more study.rows"
        )
    alike = []
    for frequency in frequencies:
        if not frequency:
            alike.append(np.empty(0, np.int64))
            continue
        distance = np.abs(np.log(counts) - np.log(frequency))
        order = np.lexsort((rng.random(len(ids)), distance))
        near = int((distance <= _NEAR).sum())
        alike.append(ids[order[: min(max(near, _FEWEST), _MOST)]])
    return alike


def draw_vocabularies(
    alike: Sequence[NDArray[np.int64]], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(count, G) vocabularies: for each word one of its look-alikes, -1 where it has none.

    No token stands for two words, unless 100 draws in a row repeat one because look-alikes are few.
    """
    drawn = np.full((count, len(alike)), -1)
    occurring = [word for word, tokens in enumerate(alike) if len(tokens)]
    again = np.arange(count)
    for _ in range(_REDRAWS):
        for word in occurring:
            drawn[again, word] = rng.choice(alike[word], len(again))
        ordered = np.sort(drawn[again][:, occurring], axis=1)
        again = again[(ordered[:, 1:] == ordered[:, :-1]).any(1)]
        if not len(again):
            break
    return drawn


def sums_over(active: Any, chosen: Sequence[Places]) -> NDArray[np.float64]:
    """(len(chosen), F) sums of activations, each over its own tokens."""
    starts = np.cumsum([0, *map(len, chosen)])
    indices = np.concatenate([np.empty(0, np.int64), *chosen])
    ones = np.ones(len(indices), active.dtype)
    chooser = sparse.csr_matrix((ones, indices, starts), (len(chosen), active.shape[0]))
    return np.asarray((chooser @ active).toarray(), np.float64)
