"""Where in the held-out text chosen latents fire most: contexts with an activation for every
token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyze.subject import Firings, Subject
from data.errors import PipelineError, SettingError
from data.store.kinds import SERVED
from harvest import model_folder as checkpoint
from harvest.tokens import Tokenizer

BEFORE, AFTER = 24, 8  # tokens around the peak


class Context(NamedTuple):
    """A stretch of one document piece around a latent's activation."""

    document: int
    peak: float  # the largest activation in it
    tokens: list[int]
    activations: list[float]  # one per token


def choose(fired: NDArray[np.int64], count: int) -> list[int]:
    """`count` latents spread evenly over the ranking by density, so that none is picked for its
    looks.
    """
    alive = np.flatnonzero(fired)
    ranked = alive[np.argsort(-fired[alive], kind="stable")]
    at = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [int(latent) for latent in ranked[at]]


def firing_counts(subject: Subject, limit: int) -> NDArray[np.int64]:
    """(F,) held-out rows, BOS left out, in which each latent fires."""
    counts = np.zeros(subject.sae.d_sae, np.int64)
    for firings in subject.firings(limit, SERVED):
        counts += np.bincount(firings.latent, minlength=len(counts))
    return counts


def top_contexts(
    subject: Subject, latents: Sequence[int], each: int, limit: int
) -> dict[int, list[Context]]:
    """The `each` contexts with the largest activations of each latent, one per document, BOS left
    out.
    """
    best: dict[int, dict[int, Context]] = {latent: {} for latent in latents}
    for firings in subject.firings(limit, SERVED):
        unit = firings.unit.number
        tokens = subject.store.tokens(unit).ravel()
        starts = subject.store.piece_starts(unit).ravel()
        document = subject.store.document(unit).ravel()
        dense = _dense(firings, latents, len(tokens))
        for column, latent in enumerate(latents):
            _merge(best[latent], dense[:, column], tokens, starts, document, each)
    return {
        latent: sorted(found.values(), key=lambda c: -c.peak)[:each]
        for latent, found in best.items()
    }


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
    best: dict[int, Context],
    activations: NDArray[np.float32],
    tokens: NDArray[np.uint32],
    starts: NDArray[np.bool_],
    document: NDArray[np.uint32],
    each: int,
) -> None:
    """Take the strongest places of the unit's `each` strongest documents into `best` (by
    document).
    """
    pieces = np.flatnonzero(starts)
    peaks = np.maximum.reduceat(activations, pieces)
    seen: set[int] = set()
    for number in np.argsort(-peaks, kind="stable"):
        piece, peak = int(pieces[number]), float(peaks[number])
        owner = int(document[piece])
        if peak <= 0 or len(seen) == each:
            return
        if owner in seen or (owner in best and best[owner].peak >= peak):
            continue
        seen.add(owner)
        at = piece + int(
            np.argmax(activations[piece : pieces[number + 1] if number + 1 < len(pieces) else None])
        )
        behind = starts[at + 1 : at + 1 + AFTER]
        end = at + 1 + (int(np.argmax(behind)) if behind.any() else len(behind))
        span = slice(max(piece + 1, at - BEFORE), end)
        best[owner] = Context(owner, peak, tokens[span].tolist(), activations[span].tolist())


def token_names(
    subject: Subject, model_path: str | None, *, raw: bool = False
) -> Callable[[int], str] | None:
    """What each token id says, or None if the model's tokenizer is not at hand.

    Args:
        raw: as it is, and not with marks for what cannot be seen.

    Raises:
        SettingError: `model_path` was asked for and its tokenizer is not the one that the store was
            made with.
    """
    recorded: dict[str, Any] = subject.store.manifest["model"]
    path = subject.model_path(model_path)
    try:
        tokenizer = Tokenizer.load(checkpoint.resolve(path, recorded["revision"]))
    except PipelineError:
        if model_path is not None:
            raise
        return None
    if tokenizer.digest != recorded["tokenizer"]:
        if model_path is None:
            return None
        raise SettingError(
            f"the tokenizer of model.path={model_path} is not the one that made {subject.store.name}"
        )
    shown = str if raw else visible
    return lambda token: shown(tokenizer.inner.decode([token]))


def visible(text: str) -> str:
    """Text in which line breaks, tabs and other control and direction characters show as marks."""
    marks = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(
        marks.get(c, "�" if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") else c)
        for c in text
    )
