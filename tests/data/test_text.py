"""Packing loses nothing, doubles nothing, and goes on from any row."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import SettingError, StoreError
from data.store import Cursor
from data.text import FileText, HubText, Row, TinyText, pack, tokenized

BOS = 2
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=30), max_size=25)


def unpack(rows: list[Row]) -> dict[int, list[int]]:
    """The documents' ids again, BOS left out."""
    found: dict[int, list[int]] = {}
    for row in rows:
        for token, document in zip(row.tokens.tolist(), row.document.tolist(), strict=True):
            found.setdefault(document, [])
            if token != BOS:
                found[document].append(token)
    return found


@given(DOCUMENTS, st.integers(2, 17))
@settings(derandomize=True, deadline=None)
def test_rows_hold_every_token_once_and_each_piece_starts_with_one_bos(
    documents: list[list[int]], context: int
) -> None:
    rows = list(pack(iter(documents), Cursor(0, 0), context, BOS))
    placed = unpack(rows)
    flat = [token for number in sorted(placed) for token in placed[number]]
    whole = [token for ids in documents for token in ids]
    assert flat == whole[: len(flat)]
    assert len(whole) - len(flat) < context
    for row in rows:
        assert row.tokens.shape == row.document.shape == (context,)
        starts = np.flatnonzero(np.diff(row.document, prepend=-1))
        np.testing.assert_array_equal(np.flatnonzero(row.tokens == BOS), starts)


@given(DOCUMENTS, st.integers(2, 17))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_packing_goes_on_from_every_row(documents: list[list[int]], context: int) -> None:
    rows = list(pack(iter(documents), Cursor(0, 0), context, BOS))
    for number, row in enumerate(rows):
        rest = list(pack(iter(documents[row.end.document :]), row.end, context, BOS))
        assert len(rest) == len(rows) - number - 1
        for again, first in zip(rest, rows[number + 1 :], strict=True):
            np.testing.assert_array_equal(again.tokens, first.tokens)
            np.testing.assert_array_equal(again.document, first.document)
            assert again.end == first.end


def test_tokenizing_keeps_the_order_of_documents() -> None:
    texts = [str(i) for i in range(200)]
    assert list(tokenized(iter(texts), lambda batch: [[int(t)] for t in batch], batch=7)) == [[i] for i in range(200)]


def test_tiny_text_starts_anywhere() -> None:
    first = list(islice(TinyText().documents(0), 10))
    assert list(islice(TinyText().documents(4), 6)) == first[4:]
    assert len(set(first)) == 10


def test_files_in_order_from_any_document(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"line {i}"}) for i in range(3)) + "\n\n")
    (tmp_path / "a.txt").write_text("whole file\n")
    (tmp_path / "ignored.md").write_text("no")
    parquet.write_table(pyarrow.table({"text": ["p0", "p1"], "n": [0, 1]}), tmp_path / "c.parquet")
    source = FileText(tmp_path)
    expected = ["whole file\n", "line 0", "line 1", "line 2", "p0", "p1"]
    for start in range(7):
        assert list(source.documents(start)) == expected[start:]
    before = source.identity()
    (tmp_path / "a.txt").write_text("another file")
    assert source.identity() != before


def test_identity_knows_files_of_one_name_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    before = FileText(tmp_path).identity()
    (tmp_path / "one" / "x.txt").write_text("changed")
    assert FileText(tmp_path).identity() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "no text.field='text'; it has body"),
        ("a.jsonl", b'{"text": 3}\n', "holds int, not text"),
        ("a.jsonl", b"7\n", "no text.field"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((SettingError, StoreError), match=message):
        list(FileText(tmp_path / name).documents(0))


def test_a_path_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="does not exist"):
        FileText(tmp_path / "none")
    with pytest.raises(SettingError, match="holds no text"):
        FileText(tmp_path)


def test_hub_data_sets_stream_from_any_document(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(20)))
    source = HubText(str(tmp_path))
    assert list(source.documents(17)) == ["row 17", "row 18", "row 19"]
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(SettingError, match=r"document 1 of .* has no text"):
        list(source.documents(0))
    with pytest.raises(StoreError, match="text=tiny, which needs no network"):
        list(HubText("nobody/nothing").documents(0))
