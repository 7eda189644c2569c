"""Every source goes on from every document; a mix keeps its shares; bad files are named."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from residual_saes.data.errors import DocumentError, SettingError, StoreError
from residual_saes.data.text.documents import Document, State, TextSource, characters
from residual_saes.data.text.hub import HubText
from residual_saes.data.text.mix import Mix, Part
from residual_saes.data.text.sources import FileText, TinyText, source_name, source_of

CONF = Path(__file__).parent.parent.parent / "conf" / "text"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class Made:
    """A source of documents of the given lengths."""

    chats = False

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name, self.lengths = name, lengths

    def identity(self) -> dict[str, Any]:
        return {"kind": "made", "lengths": self.lengths}

    def documents(self, state: State) -> Any:
        for number in range(state or 0, len(self.lengths)):
            yield Document(self.name * self.lengths[number], number + 1)


def contents(source: TextSource, state: State = None) -> list[Any]:
    """The documents of a source; raises the first `DocumentError` in the place of one."""
    taken: list[Any] = []
    for document in source.documents(state):
        if isinstance(document.content, DocumentError):
            raise document.content
        taken.append(document.content)
    return taken


def require_restarts(source: TextSource, limit: int | None = None) -> list[Document]:
    """The documents of a source, which must go on from every document's state, as JSON."""
    whole = list(islice(source.documents(None), limit))
    for number, document in enumerate(whole, 1):
        stored = json.dumps(document.after)
        assert len(stored) < 300
        rest = list(islice(source.documents(json.loads(stored)), len(whole) - number))
        assert rest == whole[number:]
        if limit is None:
            assert list(source.documents(json.loads(stored))) == whole[number:]
    return whole


def write_files(folder: Path) -> None:
    """A file of each kind: empty lines, several bytes a character, several row groups."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"lïne {i} 😀", "n": i}, ensure_ascii=False) for i in range(7)]
    (folder / "b.jsonl").write_text("\n\n".join(lines) + "\n\n \n")
    (folder / "a.txt").write_text("whole file\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "ignored.md").write_text("no")
    table = pyarrow.table({"n": range(11), "text": [f"p{i}" for i in range(11)]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=4)
    parquet.write_table(table.slice(0, 0), folder / "d.parquet")
    (folder / "z.txt").write_text("last")


def test_files_in_order_from_every_document(tmp_path: Path) -> None:
    write_files(tmp_path)
    documents = require_restarts(FileText(tmp_path))
    expected = [
        "whole file\n",
        *(f"lïne {i} 😀" for i in range(7)),
        *(f"p{i}" for i in range(11)),
        "last",
    ]
    assert [document.content for document in documents] == expected


def test_a_restart_does_not_read_what_came_before(tmp_path: Path) -> None:
    """Bytes before a state may be damaged: they are not read."""
    write_files(tmp_path)
    source = FileText(tmp_path)
    whole = list(source.documents(None))
    fourth = whole[4].after
    lines = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(b"#" * fourth[2] + lines[fourth[2] :])
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert list(source.documents(fourth)) == whole[5:]
    data = bytearray((tmp_path / "c.parquet").read_bytes())
    chunk = parquet.ParquetFile(tmp_path / "c.parquet").metadata.row_group(0).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    (tmp_path / "c.parquet").write_bytes(data)
    assert list(source.documents(whole[8 + 4].after)) == whole[8 + 5 :]
    with pytest.raises(DocumentError, match=r"c.parquet is damaged behind row 0"):
        contents(source, whole[7].after)


def test_row_groups_larger_than_a_batch(tmp_path: Path) -> None:
    texts = [str(i) for i in range(2500)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet", row_group_size=1500)
    source = FileText(tmp_path)
    whole = list(source.documents(None))
    assert [document.content for document in whole] == texts
    for number in (1, 1023, 1024, 1025, 1499, 1500, 1501, 2499, 2500):
        assert list(source.documents(whole[number - 1].after)) == whole[number:]


def test_tiny_text_starts_anywhere() -> None:
    documents = require_restarts(TinyText(), limit=10)
    assert len({document.content for document in documents}) == 10


def test_hub_data_sets_on_disk_go_on_from_every_document(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {i}"}) for i in range(20))
    )
    source = HubText(str(tmp_path))
    assert [document.content for document in require_restarts(source)] == [
        f"row {i}" for i in range(20)
    ]
    before = source.identity()
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    assert HubText(str(tmp_path)).identity() != before
    with pytest.raises(SettingError, match=r"train.jsonl line 2"):
        contents(HubText(str(tmp_path)))
    with pytest.raises(SettingError, match="split=test"):
        contents(HubText(str(tmp_path), split="test"))
    with pytest.raises(SettingError, match="field='body'"):
        contents(HubText(str(tmp_path), field="body"))


# -- mixing ----------------------------------------------------------------------------------------


def test_every_kind_of_source_in_one_mix_goes_on_from_every_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path / "files")
    (tmp_path / "hub").mkdir()
    chats = [{"messages": [*CHAT, {"role": "user", "content": str(i)}]} for i in range(9)]
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(map(json.dumps, chats)))
    hub = HubText(str(tmp_path / "hub"), messages="messages")
    parts = {
        "hub": Part(3, hub),
        "files": Part(1, FileText(tmp_path / "files")),
        "tiny": Part(0.5, TinyText()),
    }
    mix = Mix(parts, seed=5)
    documents = require_restarts(mix, limit=60)
    mixed = [document.content for document in documents]
    for name in ("hub", "files"):
        own = contents(parts[name].source)
        assert [content for content in mixed if content in own] == own
    assert re.search(r"files .* 94 characters.* hub, tiny", capsys.readouterr().err)
    assert mix.chats and not Mix({"tiny": parts["tiny"]}, 0).chats


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(st.floats(0.1, 9), st.lists(st.integers(0, 40), max_size=8)),
        min_size=1,
    ),
    st.integers(0, 2**64),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_a_mix_gives_each_source_whole_and_goes_on_anywhere(
    made: dict[str, tuple[float, list[int]]], seed: int
) -> None:
    mix = Mix(
        {name: Part(weight, Made(name, lengths)) for name, (weight, lengths) in made.items()}, seed
    )
    documents = require_restarts(mix)
    assert len(documents) == sum(len(lengths) for _, lengths in made.values())
    for name, (_, lengths) in made.items():
        own = [characters(d.content) for d in documents if name in d.content]
        assert own == [length for length in lengths if length]
    turned = Mix(dict(reversed(mix.parts.items())), seed)
    assert list(turned.documents(None)) == documents
    assert turned.identity() == mix.identity()


def test_shares_are_of_characters_at_every_length() -> None:
    lengths = {"a": [10] * 30_000, "b": [1000] * 3000, "c": [317, 5, 90, 1] * 3000}
    weights = {"a": 1, "b": 2, "c": 5.0}
    mix = Mix({name: Part(weights[name], Made(name, lengths[name])) for name in lengths}, seed=3)
    served = dict.fromkeys(lengths, 0)
    for number, document in enumerate(mix.documents(None)):
        served[document.content[0]] += len(document.content)
        total = sum(served.values())
        # Two sources are apart by at most a document of the one and a phase, each over its weight.
        for name, weight in weights.items():
            assert abs(served[name] - total * weight / 8) < 2 * (4096 + 1000), (number, served)
        if total > 600_000:
            break
    assert served["a"] / total == pytest.approx(1 / 8, abs=0.01)


def test_the_seed_decides_the_order() -> None:
    def beginning(seed: int) -> str:
        mix = Mix({name: Part(1, Made(name, [100] * 100)) for name in "abc"}, seed)
        return "".join(document.content[0] for document in islice(mix.documents(None), 50))

    assert beginning(1) == beginning(1)
    assert len({beginning(seed) for seed in range(5)}) > 1


# -- settings --------------------------------------------------------------------------------------


def test_settings_name_sources(tmp_path: Path) -> None:
    write_files(tmp_path)
    tiny, hub = {"kind": "tiny", "weight": 2}, {"kind": "hub", "dataset": "a/b", "split": "test"}
    top: dict[str, Any] = {"path": None, "field": "text", "messages": None}
    assert source_of({**top, "sources": {"tiny": tiny}}, 7) == TinyText()
    mixed = source_of({**top, "sources": {"tiny": tiny, "other": hub}}, 7)
    assert mixed == Mix(
        {"tiny": Part(2, TinyText()), "other": Part(1, HubText("a/b", split="test"))}, 7
    )
    assert source_name({**top, "sources": {"tiny": tiny, "other": hub}}) == "other+tiny"
    files = {**top, "path": str(tmp_path), "field": "body", "sources": {"tiny": tiny}}
    assert source_of(files, 7) == FileText(tmp_path, "body")
    assert source_name({**files, "path": "somewhere/books.jsonl"}) == "books"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_named_text_is_a_source_under_its_own_name(path: Path) -> None:
    assert path.read_text().startswith(f"# @package text.sources.{path.stem}\n")
    source = source_of({"sources": {path.stem: yaml.safe_load(path.read_text())}}, 0)
    assert isinstance(source, TinyText if path.stem == "tiny" else HubText)
    assert source.chats == (path.stem in ("ultrachat", "openthoughts"))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "text="),
        ({"sources": {}}, "text="),
        ({"sources": {"a": {"kind": "tiny", "weight": 0}}}, "text.sources.a.weight=0 "),
        ({"sources": {"a": {"kind": "tiny", "weight": -1}}}, "weight=-1 "),
        ({"sources": {"a": {"kind": "tiny", "weight": "much"}}}, "weight=much "),
        ({"sources": {"a": {"kind": "tiny", "weight": float("nan")}}}, "weight=nan "),
        ({"sources": {"a": {"kind": "tiny", "weight": True}}}, "weight=True "),
        ({"sources": {"a": {"kind": "tiny", "split": "x"}}}, r"a.split .*kind=tiny"),
        ({"sources": {"a": {"kind": "web"}}}, r"a.kind=web .* tiny, files, hub"),
        ({"sources": {"a": {"kind": "hub"}}}, r"a.dataset .*kind=hub"),
        ({"sources": {"a": {"kind": "hub", "dataset": "a/b", "split": 3}}}, "a.split=3 "),
        ({"sources": {"a": {"kind": "hub", "dataset": "a/b", "split": None}}}, r"a.split "),
        ({"sources": {"a": 3}}, "text.sources.a=3 "),
        ({"field": "body", "sources": {"a": {"kind": "tiny"}}}, "text.field .*text.path="),
        ({"messages": "m", "sources": {"a": {"kind": "tiny"}}}, "text.messages .*text.path="),
        ({"path": "/no/such/folder"}, "text.path=/no/such/folder"),
    ],
)
def test_bad_settings_are_named_in_one_line(group: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        source_of(group, 0)
    assert "\n" not in str(caught.value)


# -- files -----------------------------------------------------------------------------------------


def test_identity_knows_files_of_one_name_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    before = FileText(tmp_path).identity()
    assert before == json.loads(json.dumps(before))
    (tmp_path / "one" / "x.txt").write_text("changed")
    assert FileText(tmp_path).identity() != before


def test_chats_of_both_forms(tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows = [{"m": CHAT}, {"m": sharegpt}, {"m": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.table({"m": [CHAT, CHAT], "x": [1, 2]}), tmp_path / "b.parquet")
    source = FileText(tmp_path, messages="m")
    assert [document.content for document in require_restarts(source)] == [
        CHAT,
        CHAT,
        [],
        CHAT,
        CHAT,
    ]
    assert source.identity()["messages"] == "m"
    (tmp_path / "c.txt").write_text("no chat")
    with pytest.raises(SettingError, match=r"c.txt.*text.messages="):
        FileText(tmp_path / "c.txt", messages="m")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "line 1: 'm' .* str"),
        (None, "line 1: 'm' .* null"),
        ([{"role": "user"}], "message 0 "),
        ([{"role": "user", "content": None}], "message 0 "),
        ([*CHAT, "x"], "message 2 "),
        ([{"role": "endoftext", "content": ""}], "message 0 .*'endoftext'"),
    ],
)
def test_bad_chats_are_named(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"m": value}))
    with pytest.raises(SettingError, match=message):
        contents(FileText(tmp_path, messages="m"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2 .*JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 .*text.field='text'.* body"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: 'text' .* int"),
        ("a.jsonl", b'{"text": []}\n', "line 1: 'text' .* list.* messages="),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' .* null"),
        ("a.jsonl", b"7\n", "line 1 .*text.field='text'.* int"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 .*UTF-8.* 10"),
        ("a.jsonl", b"[" * 100_000, "line 1 .*JSON"),
        ("a.txt", b"\xff\xfe", "a.txt .*UTF-8"),
        ("a.parquet", b"PAR1 no", "a.parquet .*Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((SettingError, StoreError), match=message):
        contents(FileText(tmp_path / name))


def test_bad_columns_of_parquet_are_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(SettingError, match=r"a.parquet row 2: 'text' "):
        contents(FileText(tmp_path))
    with pytest.raises(SettingError, match=r"text.field='body'.* n, text"):
        contents(FileText(tmp_path, "body"))
    with pytest.raises(SettingError, match=r"row 1: 'n' .* int"):
        contents(FileText(tmp_path, "n"))
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(),
        1,
        [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pyarrow.py_buffer(b"\xff")],
    )
    parquet.write_table(pyarrow.table({"text": not_utf8}), tmp_path / "a.parquet")
    with pytest.raises(SettingError, match=r"a.parquet row 1 .*UTF-8"):
        contents(FileText(tmp_path))


def test_a_path_without_text_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SettingError, match=f"text.path={path} "):
            FileText(path)


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    write_files(tmp_path)
    source = FileText(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(StoreError, match=r"b.jsonl .*No such file"):
        contents(source)
    with pytest.raises(StoreError, match=r"b.jsonl "):
        source.identity()
