"""Contexts: where in the held-out text a latent fires most, with its activation at every token."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.latents.encoding import Firings
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import PipelineError, SettingError
from residual_saes.data.neutral import neutral
from residual_saes.data.store.kinds import SERVED
from residual_saes.data.store.store import Store
from residual_saes.harvest import hub_model
from residual_saes.harvest.tokens import Tokenizer

BEFORE = 24  # tokens of a context ahead of its peak
AFTER = 8  # and behind it
_MARKS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


class Context(NamedTuple):
    """A stretch of one document piece around a latent's activation."""

    document: int
    peak: float  # the largest activation in it
    tokens: list[int]
    activations: list[float]  # one per token


def choose(fired: NDArray[np.int64], count: int) -> list[int]:
    """`count` latents spread evenly over the ranking by density: none is picked for its looks.

    Args:
        fired: (F,) rows in which each latent fires. Silent latents are not chosen.
    """
    alive = np.flatnonzero(fired)
    ranked = alive[np.argsort(-fired[alive], kind="stable")]
    count = min(count, len(ranked))
    rank = np.linspace(0, len(ranked) - 1, count).round().astype(int)
    return [int(latent) for latent in ranked[rank]]


def firing_counts(subject: Subject, limit: int) -> tuple[NDArray[np.int64], int]:
    """(F,) held-out rows in which each latent fires, and how many there are; none is a BOS."""
    counts = np.zeros(subject.sae.d_sae, np.int64)
    rows = 0
    for firings in subject.firings(limit, SERVED):
        counts += np.bincount(firings.latent, minlength=len(counts))
        rows += len(firings.rows)
    return counts, rows


def top_contexts(
    subject: Subject, latents: Sequence[int], each: int, limit: int
) -> dict[int, list[Context]]:
    """The contexts with the largest activations of each latent, in descending order.

    Args:
        each: contexts of a latent, at most one per document. BOS is never a peak.
        limit: see `Subject.rows`.
    """
    best: dict[int, dict[int, Context]] = {latent: {} for latent in latents}
    for firings in subject.firings(limit, SERVED):
        text = _Text.read(subject.store, firings.unit.number)
        dense = _dense(firings, latents, len(text.tokens))
        for column, latent in enumerate(latents):
            _merge(best[latent], dense[:, column], text, each)
    contexts = {}
    for latent, by_document in best.items():
        ranked = sorted(by_document.values(), key=lambda context: -context.peak)
        contexts[latent] = ranked[:each]
    return contexts


class _Text(NamedTuple):
    """The tokens of one unit, (t,) each, in the order of the text."""

    tokens: NDArray[np.uint32]
    starts: NDArray[np.bool_]  # whether a document's piece starts here, with its BOS
    document: NDArray[np.uint32]

    @classmethod
    def read(cls, store: Store, unit: int) -> _Text:
        return cls(
            tokens=store.tokens(unit).ravel(),
            starts=store.piece_starts(unit).ravel(),
            document=store.document(unit).ravel(),
        )


def _dense(firings: Firings, latents: Sequence[int], tokens: int) -> NDArray[np.float32]:
    """(tokens of the unit, latents) activations in the order of the text."""
    chosen = np.asarray(latents, np.int64)
    sorter = np.argsort(chosen)
    wanted = np.isin(firings.latent, chosen)
    column = sorter[np.searchsorted(chosen, firings.latent[wanted], sorter=sorter)]
    dense = np.zeros((tokens, len(chosen)), np.float32)
    dense[firings.unit.local[firings.row[wanted]], column] = firings.value[wanted]
    return dense


def _merge(
    best: dict[int, Context], activations: NDArray[np.float32], text: _Text, each: int
) -> None:
    """Take the unit's `each` strongest documents into `best`, which is by document."""
    pieces = np.flatnonzero(text.starts)
    ends = np.append(pieces[1:], len(text.tokens))
    peaks = np.maximum.reduceat(activations, pieces)
    seen: set[int] = set()
    for number in np.argsort(-peaks, kind="stable"):
        start = int(pieces[number])
        peak = float(peaks[number])
        document = int(text.document[start])
        if peak <= 0 or len(seen) == each:
            return
        if document in seen or (document in best and best[document].peak >= peak):
            continue
        seen.add(document)
        index = start + int(np.argmax(activations[start : ends[number]]))
        # The context ends with the piece; its BOS is left out.
        span = slice(max(start + 1, index - BEFORE), min(index + 1 + AFTER, int(ends[number])))
        best[document] = Context(
            document, peak, text.tokens[span].tolist(), activations[span].tolist()
        )


def token_names(
    subject: Subject, model_path: str | None, *, raw: bool = False, parted: bool = False
) -> Callable[[int], Any] | None:
    """A function from token id to text; None if the model's tokenizer is not at hand.

    Args:
        model_path: the model as asked for; None: the model that the store's manifest records.
        raw: the text itself, without marks for invisible characters.
        parted: what `parted_text` says of the token.

    Raises:
        SettingError: `model_path` was asked for, and the store was made with another tokenizer.
    """
    recorded: dict[str, Any] = subject.store.manifest["model"]
    path = subject.model_path(model_path)
    try:
        tokenizer = Tokenizer.load(hub_model.described(path, recorded["revision"]))
    except PipelineError:
        if model_path is not None:
            raise
        return None
    if tokenizer.digest != recorded["tokenizer"]:
        if model_path is None:
            return None
        raise SettingError(
            f"the tokenizer of model.path={model_path} is not the one that made "
            f"{subject.store.name}"
        )
    if parted:
        return lambda token: parted_text(tokenizer, token)
    shown = str if raw else visible
    return lambda token: shown(tokenizer.inner.decode([token]))


def parted_text(tokenizer: Tokenizer, token: int) -> str | tuple[int, ...]:
    """A token's visible text with its leading space; its bytes, if they are part of a character.

    Tokenizers of bytes (GPT-2, Llama 3, Qwen) write each byte as a letter of an alphabet of 256;
    those with a byte fallback (Llama 2, Gemma) have tokens such as <0xE2>.
    """
    text: str = tokenizer.inner.decode([token])
    piece = tokenizer.backend.id_to_token(token) or ""
    if "\ufffd" in text:
        if fallback := _BYTE.fullmatch(piece):
            return (int(fallback[1], 16),)
        content = [_LETTERS.get(letter, -1) for letter in piece]
        if content and min(content) >= 0 and not _is_utf8(bytes(content)):
            return tuple(content)
    # Decoders of SentencePiece's kind drop the space in front of the first token.
    if piece.startswith("\u2581") and not text.startswith(" "):
        text = f" {text}"
    return visible(text)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _letters() -> dict[str, int]:
    """The byte of each letter of GPT-2's alphabet: bytes that print are letters, others follow."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


_LETTERS = _letters()
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def visible(text: str) -> str:
    """A token's text: line breaks and tabs as marks, what else is not to be seen as its escape."""
    return neutral(text.translate(_MARKS))
