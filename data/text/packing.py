"""Packing documents into rows of `context` tokens, from any row on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.text.documents import Content, Document, State


class Cursor(NamedTuple):
    """A place in a source's text."""

    document: int  # number in the source's order
    offset: int  # tokens of that document already placed
    state: State  # of the source before that document


class Row(NamedTuple):
    """One packed row."""

    tokens: NDArray[np.uint32]  # (T,)
    document: NDArray[np.uint32]  # (T,) document number of each token
    end: Cursor  # where the next row starts


def tokenized(
    documents: Iterator[Document],
    encode: Callable[[list[Content]], list[list[int]]],
    batch: int = 64,
) -> Iterator[tuple[list[int], State]]:
    """Token ids of each document, with the state of the source behind it; `encode` gets `batch`
    documents at a time.
    """
    while taken := list(islice(documents, batch)):
        encoded = encode([document.content for document in taken])
        yield from zip(encoded, (document.after for document in taken), strict=True)


def pack(
    documents: Iterator[tuple[list[int], State]], start: Cursor, context: int, bos: int
) -> Iterator[Row]:
    """Fill rows of `context` tokens with documents, end to end, each piece behind a BOS of its own.

    `documents` are token ids, and the state of the source behind them; they begin with document
    number `start.document`. A document that does not fit goes on in the next row, again behind a
    BOS; a row with one place left takes the next document's BOS alone. A last row that is not full
    is not given out. Documents without tokens take no place.
    """
    number, offset, before = start
    tokens, owner, filled = np.empty(context, np.uint32), np.empty(context, np.uint32), 0
    for encoded, after in documents:
        ids = np.array(encoded, np.uint32)
        at, offset = offset, 0
        while at < len(ids):
            taken = min(len(ids) - at, context - filled - 1)
            behind = filled + 1 + taken
            tokens[filled] = bos
            tokens[filled + 1 : behind] = ids[at : at + taken]
            owner[filled:behind] = number
            at, filled = at + taken, behind
            if filled == context:
                end = Cursor(number, at, before) if at < len(ids) else Cursor(number + 1, 0, after)
                yield Row(tokens, owner, end)
                tokens, owner, filled = (
                    np.empty(context, np.uint32),
                    np.empty(context, np.uint32),
                    0,
                )
        number, before = number + 1, after
