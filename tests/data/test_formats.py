"""Files of every kind give the same documents, from any of them on; what is not read is named."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from residual_saes.data.errors import DocumentError, SettingError, StoreError
from residual_saes.data.text import formats
from residual_saes.data.text.chats import Chat
from residual_saes.data.text.documents import characters
from residual_saes.data.text.sources import FileText
from tests.data.test_sources import CHAT, contents, require_restarts

TEXTS = [f"röw {i} 😀" for i in range(5)]
ROWS = [{"n": i, "text": text} for i, text in enumerate(TEXTS)]


def by_arrow(codec: str, data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": partial(by_arrow, "zstd"),
    ".bz2": partial(by_arrow, "bz2"),
}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# -- formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", COMPRESSED)
def test_compressed_files_go_on_from_every_document(tmp_path: Path, ending: str) -> None:
    whole = json.dumps(ROWS, indent=1).encode()
    for name, data in (
        ("a.jsonl", lines(ROWS)),
        ("b.json", lines(ROWS)),
        ("c.json", whole),
        ("d.ndjson", b"\n \n" + lines(ROWS)),
        ("e.txt", b"one\r\rtwo\0"),
        ("f.json", json.dumps(ROWS[0], indent=1).encode()),
        ("g.jsonl", b""),
    ):
        (tmp_path / f"{name}{ending}").write_bytes(COMPRESSED[ending](data))
    documents = require_restarts(FileText(tmp_path))
    expected = [*TEXTS * 4, "one\r\rtwo\0", TEXTS[0]]
    assert [document.content for document in documents] == expected
    assert documents[1].after == [0, 2, len(lines(ROWS[:2]))]  # uncompressed


def test_members_and_frames_behind_each_other_are_one_file(tmp_path: Path) -> None:
    for number, (ending, compress) in enumerate(COMPRESSED.items()):
        parts = compress(lines(ROWS[:2])) + compress(lines(ROWS[2:]))
        (tmp_path / f"{number}.jsonl{ending}").write_bytes(parts)
    assert contents(FileText(tmp_path)) == TEXTS * len(COMPRESSED)


@pytest.mark.parametrize("ending", [".gz", ".zst", pytest.param(".bz2", marks=pytest.mark.long)])
def test_a_damaged_file_gives_its_documents_up_to_there(tmp_path: Path, ending: str) -> None:
    """As many wherever a restart goes on, whether the file was cut or its bytes were changed."""
    rng = np.random.default_rng(3)
    rows = [{"text": rng.bytes(4000).hex()} for _ in range(600)]  # 4.8 MB
    data = bytearray(COMPRESSED[ending](lines(rows)))
    (tmp_path / f"a.jsonl{ending}").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS))
    data[len(data) * 2 // 3 : len(data) * 2 // 3 + 100] = bytes(100)
    (tmp_path / f"c.jsonl{ending}").write_bytes(data)
    (tmp_path / f"d.jsonl{ending}").write_bytes(b"no such thing" * 9)
    documents = list(FileText(tmp_path).documents(None))
    bad = []
    for number, document in enumerate(documents):
        if getattr(document.content, "kind", "") == "damaged":
            bad.append(number)
    first, second, third = bad
    assert 100 < first < 450 and 100 < second - first - len(ROWS) < 450
    assert third == len(documents) - 1 == second + 1
    assert [document.content for document in documents[first + 1 :][: len(ROWS)]] == TEXTS
    for number in bad:
        assert re.search(rf"jsonl{ending} is damaged behind row", str(documents[number].content))
    for number in (*bad, *range(0, first, 61), first - 1, *range(first + 9, second, 61)):
        rest = list(FileText(tmp_path).documents(documents[number].after))
        assert [d.where for d in rest] == [d.where for d in documents[number + 1 :]]


def test_errors_of_the_system_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a document would be left out because a disk failed once."""
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    source = FileText(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(formats, "read", fail)
    with pytest.raises(StoreError, match=r"a.jsonl cannot be read: Input/output error"):
        contents(source)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = codecs.BOM_UTF8
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    (tmp_path / "b.jsonl").write_bytes(mark + lines(ROWS) + mark + lines(ROWS) + mark)
    (tmp_path / "c.json").write_bytes(mark + json.dumps(ROWS).encode())
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(mark))
    assert contents(FileText(tmp_path)) == ["one", *TEXTS * 3, ""]


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "not UTF-8", "line 1 .*UTF-16"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8", "a.txt .*UTF-16"),
        ("a.txt", "Zoë".encode("latin-1"), "not UTF-8", r"a.txt .*byte 2.*LATIN1"),
        ("a.json", b'[{"text": "x"},', "not JSON", r"a.json .*JSON"),
        ("a.json", b'[{"text": "x"}, {"body": 1}]', "no such column", "row 2 .*body"),
        ("a.json", b'["x"]', "no such column", "row 1 .*str"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "not text", "line 1"),
        ("a.jsonl", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deep", "line 1"),
        ("a.jsonl", b"{" + b'"k": 1, "l": 2,' * 900 + b'"m\\n": 1}', "no such column", "line 1"),
    ],
)
def test_documents_that_cannot_be_read_have_a_kind_and_a_place(
    tmp_path: Path, name: str, content: bytes, kind: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=message) as caught:
        contents(FileText(tmp_path / name))
    assert caught.value.kind == kind
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_the_rows_behind_a_bad_one_are_read(tmp_path: Path) -> None:
    rows = [b'{"n": ' + b"7" * 5000 + b', "text": "a"}', b"{", b'{"text": "b"}', b"\xff"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    cells = pyarrow.array(["a", "b", None, "d"])
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "b.parquet")
    offsets = pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]))
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"\xffx")]
    )
    parquet.write_table(pyarrow.table({"text": not_utf8}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "f.txt").write_text("end")
    documents = list(FileText(tmp_path).documents(None))
    kinds = [getattr(document.content, "kind", document.content) for document in documents]
    assert kinds == [
        *("a", "not JSON", "b", "not UTF-8"),
        *("a", "b", "null", "d"),
        *("not UTF-8", "x"),
        *("no such column", "damaged", "end"),
    ]
    for number, document in enumerate(documents, 1):
        rest = list(FileText(tmp_path).documents(document.after))
        assert [d.where for d in rest] == [d.where for d in documents[number:]]


# -- folders ---------------------------------------------------------------------------------------


def test_nothing_in_a_folder_is_left_out_without_a_word_or_read_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, outside = tmp_path / "corpus", tmp_path / "outside"
    for place in (folder / "sub", folder / ".ipynb_checkpoints", outside / ".cache"):
        place.mkdir(parents=True)
    texts = {
        **{"B.TXT": "B", "a.txt": "a", "sub/c.Txt": "c", ".ipynb_checkpoints/a.txt": "a"},
        **{".hidden.txt": "h", "../outside/d.txt": "d", "../outside/.cache/e.txt": "e"},
        **{"README.md": "", "x.csv": "", "y.pdf": "", "z.txt.bak": "", "data.gz": ""},
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "info.json").write_text('{"version": 1}')
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    (folder / "rows.json").write_text('[{"text": "r"}]')
    for name, target in {
        **{"link.txt": "a.txt", "far.txt": "../outside/d.txt", "gone.txt": "nowhere"},
        **{"loop": ".", "beside": "sub", "out": "../outside"},
    }.items():
        (folder / name).symlink_to(target)

    source = FileText(folder)
    names = list(source.identity()["files"])
    assert names == ["B.TXT", "a.txt", "far.txt", "rows.json", "sub/c.Txt"]
    assert contents(source) == ["B", "a", "d", "r", "c"]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line and ".hidden.txt (hidden)" in line and "README.md" in line
    others = "\n".join(source._folder.others)
    for name in (
        *(".hidden.txt (hidden)", ".ipynb_checkpoints/ (hidden)", "README.md", "x.csv", "y.pdf"),
        *("z.txt.bak", "data.gz", "info.json (no text.field=text)", "link.txt (read already)"),
        *("gone.txt (no regular file)", "loop/ (read already)", "beside/ (read already)"),
        *("a.txt.gz (read uncompressed)", "out/.cache/ (hidden)", "out/d.txt (read already)"),
    ):
        assert name in others, name
    assert f"{len(source._folder.others)} not read" in line


def test_identities_of_old_are_as_they_were(tmp_path: Path) -> None:
    """Also of folders that hold other things: stores that were begun go on."""
    from residual_saes.data.durable import digest_file

    for name in ("b/x.jsonl", "a.txt", "b.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dataset_info.json").write_text('{"features": {"text": "string"}}')
    files = {name: tmp_path / name for name in ("a.txt", "b/x.jsonl", "b.parquet")}
    digests = {name: digest_file(path).xxh3_128 for name, path in files.items()}
    assert FileText(tmp_path).identity() == {"kind": "files", "field": "text", "files": digests}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    source = FileText(tmp_path)
    assert contents(source) == ["one"]
    assert json.dumps(source.identity()["files"], ensure_ascii=False).encode()


@pytest.mark.parametrize("name", ["notes", "notes.pdf", "corpus.gz", "table.parquet.gz"])
def test_files_of_no_known_kind_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(SettingError, match=rf"text.path={path} .*{name}.*\.jsonl"):
            FileText(path)


# -- chats -----------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"default": None}}}


def chats(path: Path, rows: list[Any]) -> list[Any]:
    path.write_bytes(lines(rows))
    return contents(FileText(path, messages="m"))


def test_chats_keep_every_field(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "How warm?", "name": "Ann", "unknown": None}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "content": "19", "tool_call_id": "1"}
    thought = {"role": None, "from": "gpt", "value": "19", "reasoning_content": "hm"}
    (chat,) = chats(tmp_path / "a.jsonl", [{"m": [asked, called, told, thought]}])
    assert chat == [
        {"role": "user", "content": "How warm?", "name": "Ann"},
        {"role": "assistant", "tool_calls": [CALL]},
        told,
        {"role": "assistant", "content": "19", "reasoning_content": "hm"},
    ]
    assert characters(chat) > characters([asked | {"unknown": ""}])
    long = [{"role": "tool", "content": None, "tool_responses": [{"response": "9" * 5000}]}]
    data = lines([{"m": long}]).replace(b'"' + b"9" * 5000 + b'"', b"9" * 5000)
    (tmp_path / "b.jsonl").write_bytes(data)
    assert contents(FileText(tmp_path / "b.jsonl", messages="m")) == [
        [{"role": "tool", "tool_responses": [{"response": "9" * 5000}]}]
    ]


def test_parts_of_a_content(tmp_path: Path) -> None:
    parts = ["a", {"type": "text", "text": "b"}, {"type": None, "text": "c"}]
    rows = [{"m": [{"role": "user", "content": content}]} for content in (parts, [])]
    first, second = chats(tmp_path / "a.jsonl", rows)
    assert first[0]["content"] == [{"type": "text", "text": letter} for letter in "abc"]
    assert characters(first) >= 3 and second[0]["content"] == []


def test_a_row_gives_tools_documents_and_variables(tmp_path: Path) -> None:
    documents = [{"title": "t", "text": "x"}]
    given = {"enable_thinking": True}
    rows = [
        {"m": CHAT, "tools": [TOOL], "documents": documents, "chat_template_kwargs": given},
        {"m": CHAT, "tools": json.dumps([TOOL]), "chat_template_kwargs": json.dumps(given)},
        {"m": CHAT, "tools": [], "documents": ["a column of its own"], "other": 1},
        {"m": json.dumps(CHAT), "tools": "", "chat_template_kwargs": None},
    ]
    whole, text, *plain = chats(tmp_path / "a.jsonl", rows)
    assert whole == Chat(CHAT, {**given, "tools": [TOOL], "documents": documents})
    assert text == Chat(CHAT, {**given, "tools": [TOOL]})
    assert plain == [CHAT, CHAT]
    assert characters(whole) > characters(text) > characters(CHAT)
    # In Parquet every row has the fields of all rows: what is null there was never said.
    table = pyarrow.table(
        {
            "m": [[{**CHAT[0], "name": None}, {**CHAT[1], "name": "x"}], CHAT],
            "tools": [[{"function": {"name": "f", "more": None}}], None],
            "n": [1, 2],
        }
    )
    parquet.write_table(table, tmp_path / "b.parquet")
    assert contents(FileText(tmp_path / "b.parquet", messages="m")) == [
        Chat([CHAT[0], {**CHAT[1], "name": "x"}], {"tools": [{"function": {"name": "f"}}]}),
        CHAT,
    ]


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else "x"


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"m": [{"role": "user", "content": None, "tool_calls": [CALL]}]}, "not a chat", "message"),
        ({"m": [{"role": "assistant", "content": None}]}, "not a chat", "message 0"),
        (
            {"m": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "not a chat",
            "image",
        ),
        ({"m": [{"role": "user", "content": [3]}]}, "not a chat", "message 0"),
        ({"m": [{"role": "im_end", "content": "x"}]}, "not a chat", "'im_end'"),
        ({"m": [{**CHAT[0], "x": deep(90)}]}, "nested too deep", "message 0"),
        ({"m": CHAT, "tools": "hammer"}, "not a chat", "line 1: tools"),
        ({"m": CHAT, "tools": [3]}, "not a chat", "line 1: tools"),
        ({"m": CHAT, "chat_template_kwargs": [1]}, "not a chat", "chat_template_kwargs"),
        ({"m": CHAT, "chat_template_kwargs": {"a": deep(90)}}, "nested too deep", "line 1"),
        ({"m": None}, "null", "line 1: 'm'"),
    ],
)
def test_what_is_no_chat_is_named(tmp_path: Path, row: Any, kind: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        chats(tmp_path / "a.jsonl", [row])
    assert caught.value.kind == kind


def test_roles_of_tools(tmp_path: Path) -> None:
    roles = ("tool", "function", "ipython", "observation", "environment", "developer")
    said = [{"role": role, "content": "x"} for role in roles]
    assert chats(tmp_path / "a.jsonl", [{"m": said}]) == [said]


@pytest.mark.parametrize("ending", [".txt.gz", ".jsonl.gz", ".json.gz"])
def test_a_small_file_that_holds_a_large_document_is_damaged(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"bomb{ending}"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"[\n")
        for _ in range(160):
            file.write(b" " * (1 << 20))
    *_, document = FileText(path=str(path)).documents(None)
    assert isinstance(document.content, DocumentError)
    assert document.content.kind == "damaged"
