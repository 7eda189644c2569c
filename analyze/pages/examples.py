"""Latents as the report shows them: where they fire most, and which tokens they raise.

They come from the run's catalogue. Without one they come from passes over held-out rows, and then
no logits are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from residual_saes.analyze.latents import contexts
from residual_saes.analyze.subject import Subject

Name = Callable[[int], str | tuple[int, ...]]  # a token's text; bytes, of a part of a character
EVEN = 20  # latents spread evenly over the ranking by frequency
READABLE = 6  # latents of the first page
EACH = 5  # contexts of a latent
_CANDIDATES = 160  # latents among which the readable ones are looked for
_TOKENS = 8  # tokens raised, and as many lowered
_LENGTH = 60  # characters of a token's text
_LEAST = 8  # rows in which a readable latent fires at least
_MOST = 0.05  # share of rows in which it fires at most: what is on everywhere says little


class Context(NamedTuple):
    """A stretch of text around an activation."""

    document: int
    peak: float  # the largest activation
    tokens: list[tuple[str, float]]  # with the latent's activation


class Example(NamedTuple):
    """One latent."""

    latent: int
    rows: int  # in which it fires
    density: float
    contexts: list[Context]
    raised: list[str]  # tokens whose logits it adds most to
    lowered: list[str]


class Examples(NamedTuple):
    """The latents that a report shows."""

    readable: list[Example]  # chosen for their contexts
    even: list[Example]  # chosen for nothing but their frequency
    as_ids: bool  # the model's tokenizer is not at hand


def of(
    subject: Subject,
    catalogue: Path | None,
    limit: int,
    model_path: str | None,
    interest: Sequence[float | None] | None = None,
) -> Examples:
    """The latents to show.

    Args:
        catalogue: features.parquet of the run's catalogue, if it has one.
        limit: held-out rows to read without a catalogue.
        model_path: see `contexts.token_names`.
        interest: of each latent, see pages/browser/interest.py; None: not known.
    """
    if catalogue:
        figures = pq.read_table(catalogue, columns=["count", "density"])
        fired, density = (column.to_numpy() for column in figures.columns)
    else:
        fired, rows_read = contexts.firing_counts(subject, limit)
        density = fired / max(rows_read, 1)
    even = contexts.choose(fired, EVEN)
    enough = np.where(fired >= _LEAST, fired, 0)
    few = np.where(density <= _MOST, enough, 0)
    # All fire on many tokens where k is a large part of few latents.
    candidates = contexts.choose(few if few.any() else enough, _CANDIDATES)
    if interest is not None:
        known = np.array(interest, np.float64)  # NaN is the last in order
        order = np.lexsort((np.arange(len(known)), -known))
        candidates = [int(latent) for latent in order if known[latent] > 0][:_CANDIDATES]
    wanted = sorted({*even, *candidates})
    name_of = contexts.token_names(subject, model_path, parted=True)
    if catalogue:
        every = _of_catalogue(catalogue, wanted, name_of)
    else:
        found = contexts.top_contexts(subject, wanted, EACH, limit)
        every = {}
        for latent in wanted:
            lines = [context_of(line, name_of) for line in found[latent]]
            rows = int(fired[latent])
            every[latent] = Example(latent, rows, float(density[latent]), lines, [], [])
    ranked = [every[latent] for latent in candidates]
    best = readable(ranked) if interest is None else distinct(ranked)
    return Examples(best, [every[latent] for latent in even], name_of is None)


def _of_catalogue(path: Path, wanted: Sequence[int], name_of: Name | None) -> dict[int, Example]:
    columns = ["feature", "count", "density", "top", "raised", "lowered"]
    table = pq.read_table(path, columns=columns, filters=[("feature", "in", wanted or [0])])
    every = {}
    for row in table.to_pylist():
        lines = []
        for line in row["top"][:EACH]:
            found = contexts.Context(
                line["document"], line["value"], line["tokens"], line["activations"]
            )
            lines.append(context_of(found, name_of))
        both = []
        for name in ("raised", "lowered"):
            ids = [logit["token"] for logit in (row[name] or [])[:_TOKENS]]
            both.append([_shown(name_of(token)) if name_of else str(token) for token in ids])
        every[row["feature"]] = Example(row["feature"], row["count"], row["density"], lines, *both)
    return every


def context_of(found: contexts.Context, name_of: Name | None) -> Context:
    """The context in text. Tokens whose bytes make up characters together become one."""
    tokens: list[tuple[str, float]] = []
    held: list[tuple[int, ...]] = []  # bytes that are no whole character yet
    for token, value in zip(found.tokens, found.activations, strict=True):
        part = name_of(token) if name_of else f"{token} "
        if isinstance(part, str):
            held = []
            tokens.append((_shortened(part), value))
            continue
        held.append(part)
        tokens.append((_shown(part), value))
        try:
            text = bytes(byte for each in held for byte in each).decode()
        except UnicodeDecodeError:
            continue
        largest = max(value for _, value in tokens[-len(held) :])
        tokens[-len(held) :] = [(contexts.visible(text), largest)]
        held = []
    return Context(found.document, found.peak, tokens)


def _shown(part: str | tuple[int, ...]) -> str:
    """A token alone: the bytes of one that is part of a character, a mark for a space."""
    if not isinstance(part, str):
        return "".join(f"<0x{byte:02X}>" for byte in part)
    return _shortened(part) if part.strip() else "␣" * len(part)


def _shortened(text: str) -> str:
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}… ({len(text):,} characters)"


def readable(candidates: Sequence[Example]) -> list[Example]:
    """The latents whose strongest contexts agree most, evenly over the ranking by frequency.

    They agree by the share of contexts whose peak is on the same word. Of those that are on one
    word, the one that fires most often stays.
    """
    best: dict[str, tuple[int, Example]] = {}
    for example in sorted(candidates, key=lambda one: -one.rows):
        peaks = Counter(_word(line) for line in example.contexts)
        word, count = max(peaks.items(), key=lambda peak: peak[1], default=("", 0))
        if count > best.get(word, (1, example))[0] and any(map(str.isalnum, word)):
            best[word] = (count, example)
    agree = sorted(best.values(), key=lambda one: (-one[0], -one[1].rows))
    as_good = [example for count, example in agree if count == agree[0][0]]
    if len(as_good) < READABLE:
        return [example for _, example in agree[:READABLE]]
    rank = np.linspace(0, len(as_good) - 1, READABLE).round().astype(int)
    return [as_good[index] for index in rank]


def distinct(ranked: Sequence[Example]) -> list[Example]:
    """The first latents whose strongest contexts peak on a word that no earlier one's peak on."""
    best: dict[str, Example] = {}
    for example in ranked:
        best.setdefault(_word(example.contexts[0]) if example.contexts else "", example)
    return list(best.values())[:READABLE]


def _word(line: Context) -> str:
    """What a context's peak is on, whatever its case and the space before it."""
    return max(line.tokens, key=lambda token: token[1])[0].strip().casefold()
