"""Words in a store's text: where they stand, the windows around them, and other tokens that are as
frequent.

Shapes: n tokens of the corpus in the order of the text, F latents, G words (or what stands for them
    in a vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from analyze.subject import Subject
from data.errors import SettingError, StopRequest
from data.journal import Progress
from harvest.tokens import Tokenizer

Places = NDArray[np.int64]  # positions in a corpus, ascending, without repetition
_NEAR = np.log(2)  # tokens up to twice as frequent, or half, may stand for a word,
_FEWEST, _MOST = 10, 50  # but at least and at most so many of the nearest


class Corpus(NamedTuple):
    """Held-out text with its activations."""

    tokens: NDArray[np.int64]  # (n,)
    piece: NDArray[np.int64]  # (n,) number of the document's piece; no window reaches into another
    document: NDArray[np.int64]  # (n,)
    kept: NDArray[np.bool_]  # (n,) neither BOS nor dropped by the run's policy: only these count
    active: Any  # (n, F) scipy CSR float32, empty where not kept


def read_corpus(subject: Subject, limit: int, stop: StopRequest) -> Corpus:
    """Held-out units until at least `limit` rows, encoded: 8 bytes per active latent, 0.5 GB at 5e5
    rows of k = 128.
    """
    parts: list[Corpus] = []
    progress, rows, pieces = Progress(), 0, 0
    for firings in subject.firings(limit):
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
    tokens, piece, document, kept = (
        np.concatenate(column) for column in list(zip(*parts, strict=True))[:4]
    )
    return Corpus(
        tokens, piece, document, kept, sparse.vstack([part.active for part in parts], "csr")
    )


class Word(NamedTuple):
    """A word or phrase with every way to write it."""

    name: str
    phrases: tuple[tuple[int, ...], ...]  # token ids


def words_of(tokenizer: Tokenizer, names: Sequence[str]) -> list[Word]:
    """Words by name. One all in small letters is meant with and without a capital, with and without
    a space before it; one that begins with a capital or a space is meant just as it stands.
    """
    found = []
    for name in names:
        as_it_stands = name[:1].isspace() or name != name.lower()
        spellings = (
            [name]
            if as_it_stands
            else [s + n for s in ("", " ") for n in (name, name.capitalize())]
        )
        phrases = dict.fromkeys(tuple(ids) for ids in tokenizer.encode(list(spellings)) if ids)
        found.append(Word(name, tuple(phrases)))
    return found


def occurrences(corpus: Corpus, phrase: Sequence[int]) -> Places:
    """Where the phrase begins; all of it stands in one piece."""
    last = len(corpus.tokens) - len(phrase) + 1
    if last < 1:
        return np.empty(0, np.int64)
    found = np.ones(last, bool)
    for at, token in enumerate(phrase):
        found &= corpus.tokens[at : last + at] == token
    found &= corpus.piece[:last] == corpus.piece[len(phrase) - 1 :]
    return np.flatnonzero(found)


def windows(corpus: Corpus, starts: Places, length: int, before: int, after: int) -> Places:
    """The kept tokens from `before` ahead of phrases of `length` tokens to `after` behind them, in
    the same piece.
    """
    around = starts[:, None] + np.arange(-before, length + after)
    inside = (around >= 0) & (around < len(corpus.tokens))
    around = np.where(inside, around, starts[:, None])
    inside &= (corpus.piece[around] == corpus.piece[starts, None]) & corpus.kept[around]
    return np.unique(around[inside])


def look_alikes(
    corpus: Corpus, frequencies: Sequence[int], excluded: set[int], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """For each frequency the tokens that are nearest to it in log frequency, ties by chance.

    Those within a factor of 2, at most 50 of them, at least the 10 nearest. A frequency of 0 has
    none.

    Raises:
        SettingError: the corpus has fewer than 10 other tokens.
    """
    ids, counts = np.unique(corpus.tokens[corpus.kept], return_counts=True)
    allowed = ~np.isin(ids, list(excluded))
    ids, counts = ids[allowed], counts[allowed]
    if len(ids) < _FEWEST:
        raise SettingError(
            f"the corpus has {len(ids)} tokens beside study.words, and {_FEWEST} are needed to draw others as "
            "frequent; give fewer words, or more study.rows"
        )
    found = []
    for frequency in frequencies:
        if not frequency:
            found.append(np.empty(0, np.int64))
            continue
        distance = np.abs(np.log(counts) - np.log(frequency))
        order = np.lexsort((rng.random(len(ids)), distance))
        near = int((distance <= _NEAR).sum())
        found.append(ids[order[: min(max(near, _FEWEST), _MOST)]])
    return found


def draw_vocabularies(
    alike: Sequence[NDArray[np.int64]], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(count, G) vocabularies: for each word one of its look-alikes, -1 where it has none.

    No token stands for two words, unless the look-alikes are so few that chance does not find
    another in 100 times.
    """
    drawn = np.full((count, len(alike)), -1)
    occurring = [word for word, tokens in enumerate(alike) if len(tokens)]
    again = np.arange(count)
    for _ in range(100):
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
