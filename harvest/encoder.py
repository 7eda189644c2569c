"""A source's documents as token ids, and what becomes of those that cannot be stored.

`text.bad` decides. `stop` ends the harvest with the document's file and row. `skip` leaves the
document out, as if it were empty: it takes a document number and no room. So what is stored behind
it does not depend on when it was left out, and a harvest that stopped goes on with `skip` in the
same store.

How many were left out is part of the position in the text, so the count outlives a restart.

`text.max_tokens` cuts each document at so many tokens, the BOS before it included, as a tokenizer
that adds BOS does with truncation=True.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from residual_saes.data.errors import (
    DocumentError,
    PipelineError,
    StoreError,
    TemporaryError,
    first_line,
    is_passing,
)
from residual_saes.data.journal import tell
from residual_saes.data.store.store import Store
from residual_saes.data.text.documents import Document, State, TextSource
from residual_saes.harvest.tokens import Tokenizer

Bad = Literal["stop", "skip"]  # the setting text.bad

_BATCH = 64  # documents that the tokenizer gets at a time
_SKIPPED, _SOURCE = "skipped", "source"  # keys of a state behind documents that were left out


class Encoder:
    """Token ids of a source's documents, one document after the other."""

    def __init__(
        self, tokenizer: Tokenizer, bad: Bad = "stop", max_tokens: int | None = None
    ) -> None:
        """Args:
        max_tokens: of a document, BOS included; the rest is left out. None: all.
        """
        self._tokenizer = tokenizer
        self._bad = bad
        self._own = None if max_tokens is None else max_tokens - 1  # tokens behind the BOS
        self._told: set[str] = set()  # kinds of which a document was named

    def ids(self, source: TextSource, state: State) -> Iterator[tuple[list[int], State]]:
        """Ids of each document behind `state`, with the state behind it.

        Raises:
            DocumentError: a document cannot be stored, and text.bad=stop.
            StoreError: the source failed, or memory.
        """
        skipped = Counter(skipped_before(state))
        for document, ids in self._encoded(source.documents(_of_source(state))):
            if isinstance(ids, DocumentError):
                self._leave_out(ids)
                skipped[ids.kind] += 1
                ids = []
            yield ids[: self._own], _with_skipped(document.after, skipped)

    def _encoded(
        self, documents: Iterator[Document]
    ) -> Iterator[tuple[Document, list[int] | DocumentError]]:
        """Each document with its ids, or with why it has none; `_BATCH` are encoded at a time."""
        where = "its beginning"
        while True:
            block: list[Document] = []
            try:
                for document in islice(documents, _BATCH):
                    block.append(document)
                    where = document.where
                encoded = self._block(block)
            except PipelineError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                passing = isinstance(error, MemoryError) or is_passing(error)
                kind = TemporaryError if passing else StoreError
                raise kind(
                    f"the text cannot be read on behind {where} ({reason}); what was committed is "
                    "intact. If the same command ends there again, begin another store= with a "
                    "text without that document"
                ) from error
            if not block:
                return
            yield from zip(block, encoded, strict=True)

    def _block(self, block: list[Document]) -> list[list[int] | DocumentError]:
        contents = [doc.content for doc in block if not isinstance(doc.content, DocumentError)]
        ids = iter(self._tokenizer.attempt(contents))
        encoded: list[list[int] | DocumentError] = []
        for content, _, where in block:
            if isinstance(content, DocumentError):
                encoded.append(content)
                continue
            own = next(ids)
            if isinstance(own, DocumentError):
                own = DocumentError(own.kind, f"{where}: {own}")
            encoded.append(own)
        return encoded

    def _leave_out(self, error: DocumentError) -> None:
        if self._bad == "stop":
            raise DocumentError(
                error.kind,
                f"{error}; with text.bad=skip the same command leaves such documents out, counts "
                "them, and goes on",
            ) from error
        if error.kind not in self._told:
            self._told.add(error.kind)
            tell(f"left out: {error}; further documents ({error.kind}) are only counted")


# -- positions -------------------------------------------------------------------------------------


def skipped_before(state: State) -> Mapping[str, int]:
    """How many documents were left out before a position in the text, by kind."""
    skipped: dict[str, int] = state[_SKIPPED] if _is_ours(state) else {}
    return skipped


def left_out(store: Store) -> Iterator[str]:
    """The line that counts what was left out before a store's last token; none if nothing was."""
    _, cursor = store.spine_cursor()
    if skipped := skipped_before(cursor.state):
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in skipped.items())
        yield f"documents left out by text.bad=skip: {kinds}"


def _of_source(state: State) -> State:
    return state[_SOURCE] if _is_ours(state) else state


def _with_skipped(state: State, skipped: Mapping[str, int]) -> State:
    """A source's own state, as it is where nothing was left out."""
    return {_SKIPPED: dict(sorted(skipped.items())), _SOURCE: state} if skipped else state


def _is_ours(state: Any) -> bool:
    # A mix of two sources of these names has lists there.
    return isinstance(state, dict) and isinstance(state.get(_SKIPPED), dict)
