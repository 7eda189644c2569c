"""Packing loses nothing, doubles nothing, and goes on from any row."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from residual_saes.data.text.documents import State
from residual_saes.data.text.packing import Cursor, Row, pack

BOS = 2
START = Cursor(0, 0, None)
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=30), max_size=25)


def stated(documents: list[list[int]], first: int = 0) -> Iterator[tuple[list[int], State]]:
    """Each document from number `first` on with a state that names its number: "behind 3"."""
    yield from ((ids, f"behind {number}") for number, ids in enumerate(documents[first:], first))


def naive(
    documents: list[list[int]], context: int
) -> list[tuple[list[int], list[int], tuple[int, int]]]:
    """(tokens, document, (next document, offset)) of every row, a token at a time."""
    rows, tokens, owner = [], [], []
    for number, ids in enumerate(documents):
        for at, token in enumerate(ids):
            if not tokens or owner[-1] != number:
                tokens.append(BOS)
                owner.append(number)
            if len(tokens) == context:  # one place was left: it took the BOS alone
                rows.append((tokens, owner, (number, at)))
                tokens, owner = [BOS], [number]
            tokens.append(token)
            owner.append(number)
            if len(tokens) == context:
                rows.append(
                    (tokens, owner, (number, at + 1) if at + 1 < len(ids) else (number + 1, 0))
                )
                tokens, owner = [], []
    return rows


def same(one: Row, other: Row) -> bool:
    arrays = np.array_equal(one.tokens, other.tokens) and np.array_equal(
        one.document, other.document
    )
    return arrays and one.end == other.end


@given(DOCUMENTS, st.integers(2, 17))
@example([[3, 4], [], [5], [6, 7, 8, 9]], 4)
@settings(derandomize=True, deadline=None)
def test_rows_are_those_of_a_naive_packer(documents: list[list[int]], context: int) -> None:
    rows = list(pack(stated(documents), START, context, BOS))
    packed = [(row.tokens.tolist(), row.document.tolist(), row.end[:2]) for row in rows]
    assert packed == naive(documents, context)
    for row in rows:
        assert row.tokens.dtype == row.document.dtype == np.uint32
        before = row.end.document - 1
        assert row.end.state == (f"behind {before}" if before >= 0 else None)


@given(DOCUMENTS, st.integers(2, 17))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_packing_goes_on_from_every_row(documents: list[list[int]], context: int) -> None:
    rows = list(pack(stated(documents), START, context, BOS))
    for number, row in enumerate(rows):
        cursor = Cursor(*json.loads(json.dumps(row.end)))
        rest = list(pack(stated(documents, cursor.document), cursor, context, BOS))
        assert len(rest) == len(rows) - number - 1
        assert all(map(same, rest, rows[number + 1 :]))


def test_rows_that_were_given_out_stay_as_they_were() -> None:
    first, second = pack(stated([[5] * 6]), START, 4, BOS)
    assert first.tokens.tolist() == second.tokens.tolist() == [BOS, 5, 5, 5]
    assert first.tokens.base is None and not np.shares_memory(first.tokens, second.tokens)
