"""Packing documents into rows of `context` tokens, from any row on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.data.text.documents import State


class Cursor(NamedTuple):
    """A position in a source's text."""

    document: int  # number in the source's order
    offset: int  # tokens of that document that are packed already
    state: State  # of the source before that document


class Row(NamedTuple):
    """One packed row."""

    tokens: NDArray[np.uint32]  # (T,)
    document: NDArray[np.uint32]  # (T,) document number of each token
    end: Cursor  # where the next row starts


def pack(
    documents: Iterator[tuple[list[int], State]], start: Cursor, context: int, bos: int
) -> Iterator[Row]:
    """Fill rows of `context` tokens with documents, end to end, each piece behind its own BOS.

    A document that does not fit continues in the next row, again behind a BOS. A row with one
    token left takes the next document's BOS alone. A last row that is not full is dropped.
    Documents without tokens take no room.

    Args:
        documents: token ids, and the state of the source behind them, from document number
            `start.document` on.
        bos: token id.
    """
    number, offset, state = start
    tokens = np.empty(context, np.uint32)
    owner = np.empty(context, np.uint32)
    filled = 0
    for encoded, after in documents:
        ids = np.array(encoded, np.uint32)
        while offset < len(ids):
            # The next piece: a BOS and what fits of the document.
            taken = min(len(ids) - offset, context - filled - 1)
            end = filled + 1 + taken
            tokens[filled] = bos
            tokens[filled + 1 : end] = ids[offset : offset + taken]
            owner[filled:end] = number
            offset += taken
            filled = end

            # A full row: give it out with the position behind it.
            if filled == context:
                if offset < len(ids):
                    cursor = Cursor(number, offset, state)
                else:
                    cursor = Cursor(number + 1, 0, after)
                yield Row(tokens, owner, cursor)
                tokens = np.empty(context, np.uint32)
                owner = np.empty(context, np.uint32)
                filled = 0
        number += 1
        offset = 0
        state = after
