"""Documents that cannot be stored: named and stopped at, or left out by count, with equal bytes."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from residual_saes.data.errors import (
    DocumentError,
    SettingError,
    StoreError,
    TemporaryError,
    is_passing,
)
from residual_saes.data.store.place import place_of
from residual_saes.data.store.store import Store
from residual_saes.data.text import retry
from residual_saes.data.text.documents import Document, State
from residual_saes.data.text.hub import HubText
from residual_saes.data.text.mix import Mix, Part
from residual_saes.data.text.sources import FileText, TinyText
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest import spine_writer
from residual_saes.harvest.config import Faults, HarvestConfig
from residual_saes.harvest.encoder import Encoder, skipped_before
from residual_saes.harvest.spine import begun, tell_end
from residual_saes.harvest.spine_thread import SpineThread, is_small
from residual_saes.harvest.spine_writer import SpineProcess, work, write_spine
from residual_saes.harvest.status import status
from residual_saes.harvest.tokens import Tokenizer
from tests.conftest import make_manifest

TINY = Tokenizer.load(MODEL_DIR)
HALF = r'{"text": "cut \ud83d in two"}'
BAD = [HALF, "{", '{"text": null}', '{"body": 1}', HALF]


def write_text(path: Path, rows: int = 90, every: int = 3) -> FileText:
    """Lines of text, a bad one behind each `every`-th."""
    lines: list[str] = []
    for number in range(rows):
        lines.append(json.dumps({"text": f"number {number} of many" * (number % 5)}))
        if every and number % every == every - 1:
            lines.append(BAD[number // every % len(BAD)])
    path.write_text("\n".join(lines))
    return FileText(path)


def make(path: Path, tokens: int = 640) -> Store:
    return Store.open_or_create(
        path, make_manifest(8, tokens=tokens, context=16, unit=64, chunk=16)
    )


def tree(path: Path) -> dict[str, bytes]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


class StopAfter:
    """Ends the writing before a unit."""

    def __init__(self, units: int) -> None:
        self.units = units

    def check(self) -> None:
        self.units -= 1
        if self.units < 0:
            raise KeyboardInterrupt


def test_what_is_left_out_is_as_if_it_were_empty(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    empty = ['{"text": ""}' if line in BAD else line for line in lines]
    (tmp_path / "b.jsonl").write_text("\n".join(empty))
    encoded = list(Encoder(TINY, "skip").ids(source, None))
    plain = list(Encoder(TINY).ids(FileText(tmp_path / "b.jsonl"), None))
    assert [ids for ids, _ in encoded] == [ids for ids, _ in plain]
    for number, (_, state) in enumerate(encoded, 1):
        rest = Encoder(TINY, "skip").ids(source, json.loads(json.dumps(state)))
        assert list(rest) == encoded[number:]


def test_documents_are_cut_behind_their_bos(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.jsonl", every=0)
    whole = list(Encoder(TINY).ids(source, None))
    cut = list(Encoder(TINY, max_tokens=8).ids(source, None))
    assert max(len(ids) for ids, _ in whole) > 7
    assert cut == [(ids[:7], state) for ids, state in whole]


def test_states_are_the_sources_own_where_nothing_is_left_out(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.jsonl", every=0)
    states = [document.after for document in source.documents(None)]
    assert [state for _, state in Encoder(TINY, "skip").ids(source, None)] == states
    mix = Mix({"skipped": Part(1, source), "source": Part(1, source)}, 0)
    for _, state in Encoder(TINY, "skip").ids(mix, None):
        assert skipped_before(json.loads(json.dumps(state))) == {}


def test_a_store_that_stopped_goes_on_with_skip_and_ends_in_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_text(tmp_path / "a.jsonl")
    whole = make(tmp_path / "whole.zarr")
    write_spine(whole, source, TINY, bad="skip")
    first = capsys.readouterr().err
    assert [kind in first for kind in ("Unicode", "JSON", "null", "column")] == [True] * 4
    assert first.count("a.jsonl line 4") == 1 and len(first.splitlines()) == 4
    tell_end(whole)
    counted = capsys.readouterr().err.splitlines()[0]

    # Stopped at the first bad document, which no further start gets past.
    store = make(tmp_path / "s.zarr")
    for _ in range(2):
        with pytest.raises(DocumentError, match=r"a.jsonl line 4: .*text.bad=skip"):
            write_spine(store, source, TINY)
        store = Store.open(tmp_path / "s.zarr")

    # Ended before each unit.
    while not store.spine_complete:
        try:
            write_spine(store, source, TINY, StopAfter(1), "skip")
        except KeyboardInterrupt:
            store = Store.open(tmp_path / "s.zarr")
    assert tree(tmp_path / "s.zarr") == tree(tmp_path / "whole.zarr")
    tell_end(store)
    assert counted in capsys.readouterr().err
    assert counted in list(status(store.place))
    numbers = [int(number) for number in re.findall(r"(\d+) (?:no|null)", counted)]
    assert len(numbers) == 4 and 6 < sum(numbers) < 30


def test_a_text_of_nothing_else_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(BAD))
    with pytest.raises(StoreError, match="context=16"):
        write_spine(make(tmp_path / "s.zarr"), FileText(tmp_path / "a.jsonl"), TINY, bad="skip")


def test_the_setting_is_checked() -> None:
    with pytest.raises(SettingError, match=r"text.bad=ignore .*stop or skip"):
        Faults(bad="ignore")  # type: ignore[arg-type]


# -- the process that reads ------------------------------------------------------------------------


class Breaking(FileText):
    """A source with a defect."""

    def documents(self, state: State) -> Iterator[Document]:
        for number, document in enumerate(super().documents(state)):
            if number == 3:
                raise RuntimeError("a defect\nof two lines")
            yield document


def answer(tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch, **bad: Any) -> str | None:
    """What the child tells its parent."""
    monkeypatch.setattr(retry, "sleep", retry.sleep)  # the child sets its own
    make(tmp_path / "s.zarr")
    ours, theirs = Pipe()
    with ours, theirs:
        work(theirs, str(tmp_path / "s.zarr"), source, TINY, **bad)
        failure: Exception | None = ours.recv()
    return None if failure is None else str(failure)


def test_the_parent_is_told_which_document_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_text(tmp_path / "a.jsonl")
    told = answer(tmp_path, source, monkeypatch)
    assert told and "a.jsonl line 4" in told and "text.bad=skip" in told
    assert answer(tmp_path, source, monkeypatch, bad="skip") is None
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_of_a_source_is_one_line_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "a.jsonl")
    told = answer(tmp_path, Breaking(tmp_path / "a.jsonl"), monkeypatch)
    assert told and re.search(r"behind .*a.jsonl line 3 \(RuntimeError: a defect\); ", told)
    assert "\n" not in told and "Traceback" not in capsys.readouterr().err


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[SpineProcess]:
    process = SpineProcess(make(tmp_path / "s.zarr", tokens=10**6), TinyText(), TINY)
    yield process
    process.stop()


def kill(process: SpineProcess) -> None:
    os.kill(process._child.pid, signal.SIGKILL)
    process._child.wait()


def test_a_reader_that_is_killed_is_started_again(
    reading: SpineProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice at once, and again after each commit."""
    for _ in range(2):
        kill(reading)
        assert not reading.finished()
    store = Store.open(tmp_path / "s.zarr")
    for deaths in range(3, 6):
        before = np.count_nonzero(store.ledger.spine_rows)
        while np.count_nonzero(store.ledger.spine_rows) == before:
            assert not reading.finished()
            time.sleep(0.01)
            store.refresh()
        kill(reading)
        assert not reading.finished()
        assert capsys.readouterr().err.count("started again") == (3 if deaths == 3 else 1)


def test_a_reader_that_is_begun_ahead_does_the_work_or_ends_without(tmp_path: Path) -> None:
    place = place_of(tmp_path / "s.zarr")
    text = TinyText()
    with begun(HarvestConfig(place.name, (1,), tokens=10**5), text) as ahead:
        assert ahead
        reading = SpineProcess(make(tmp_path / "s.zarr"), TinyText(), TINY, begun=ahead)
        while not reading.finished():
            time.sleep(0.01)
        assert reading._child is ahead.child
    assert ahead.child.returncode == 0
    assert Store.open(place).spine_complete
    # Several ranks, a store that has its text already, perhaps, and a small one: nothing is begun.
    large = HarvestConfig(tmp_path / "t.zarr", (1,), tokens=10**5)
    for config in (replace(large, world=2), replace(large, store=place.name)):
        with begun(config, text) as nothing:
            assert nothing is None
    with begun(replace(large, tokens=10**4), text) as nothing:
        assert nothing is None
    with pytest.raises(ZeroDivisionError), begun(large, text) as unused:
        raise ZeroDivisionError
    assert unused and unused.child.returncode == 0


def test_a_thread_writes_what_a_process_writes(tmp_path: Path, reading: SpineProcess) -> None:
    thread = SpineThread(make(tmp_path / "t.zarr"), TinyText(), TINY, "stop")
    while not thread.finished():
        time.sleep(0.01)
    write_spine(make(tmp_path / "u.zarr"), TinyText(), TINY)
    assert tree(tmp_path / "t.zarr") == tree(tmp_path / "u.zarr")

    # It ends behind a unit when it is stopped, and says what failed as a process does.
    endless = SpineThread(make(tmp_path / "v.zarr", tokens=10**6), TinyText(), TINY, "stop")
    endless.stop()
    assert not Store.open(tmp_path / "v.zarr").spine_complete
    for source, kind in (("a", DocumentError), ("b", StoreError)):
        text = (write_text if source == "a" else Breaking)(tmp_path / "a.jsonl")
        failing = SpineThread(make(tmp_path / f"{source}.zarr"), text, TINY, "stop")
        failing._thread.join()
        with pytest.raises(kind, match=r"a\.jsonl line"):
            failing.finished()


def test_small_is_a_text_of_plain_files_on_this_machine(tmp_path: Path) -> None:
    here, bucket = place_of(tmp_path / "s.zarr"), Mock()
    text = write_text(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    compressed, hub = FileText(tmp_path / "b.jsonl.gz"), HubText("owner/name")
    for small in (text, TinyText(), Mix({"a": Part(1, text), "b": Part(2, TinyText())}, 0)):
        assert is_small(small, 8192, here)
        assert not is_small(small, 10**6, here)
        assert not is_small(small, 8192, bucket)
    for large in (compressed, hub, Mix({"a": Part(1, text), "b": Part(2, hub)}, 0)):
        assert not is_small(large, 8192, here)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.truncate(2**27)  # a hole: it takes no room
    assert not is_small(text, 8192, here)


def test_a_reader_that_is_killed_again_and_again_is_given_up(reading: SpineProcess) -> None:
    for _ in range(2):
        kill(reading)
        assert not reading.finished()
    kill(reading)
    with pytest.raises(TemporaryError, match=r"SIGKILL.*document 0.*store=") as caught:
        reading.finished()
    assert "\n" not in str(caught.value)


def test_no_signal_but_sigkill_ends_the_reader(tmp_path: Path) -> None:
    """From its first instruction on. The parent has the signals as before."""
    reading = SpineProcess(make(tmp_path / "s.zarr", tokens=6_000), TinyText(), TINY)
    child = reading._child.pid
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    while not reading.finished():
        for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2"):
            if reading._child.poll() is None:
                os.kill(child, getattr(signal, f"SIG{name}"))
        time.sleep(0.01)
    assert reading._child.pid == child
    reading.stop()
    assert reading._child.returncode == 0
    assert Store.open(tmp_path / "s.zarr").spine_complete


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (SettingError("x"), SettingError),
        (DocumentError("long", "x"), DocumentError),
        (TemporaryError("x"), TemporaryError),
        (StoreError("x"), StoreError),
        (ConnectionResetError(104, "x", "s3://b"), TemporaryError),
        (ZeroDivisionError("x"), RuntimeError),
    ],
    ids=repr,
)
def test_what_the_reader_raises_is_raised_by_its_rank(
    failure: Exception, kind: type[Exception], reading: SpineProcess
) -> None:
    kill(reading)
    reading._line.close()
    reading._line, theirs = Pipe()
    with pytest.MonkeyPatch.context() as patch, theirs:
        patch.setattr(retry, "sleep", retry.sleep)
        patch.setattr(spine_writer, "write_spine", Mock(side_effect=failure))
        work(theirs, reading._store.name, TinyText(), TINY)
        with pytest.raises(kind, match="x") as caught:
            reading.finished()
    assert isinstance(caught.value, TemporaryError) == (
        is_passing(failure) or isinstance(failure, TemporaryError)
    )
