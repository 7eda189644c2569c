"""The harness itself finds the faults of wrong writers, and none of a right one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from residual_saes.data import durable
from residual_saes.data.errors import StoreError
from tests.faults import flips, kills, tree
from tests.faults.child import Answer, ask
from tests.faults.power import images
from tests.faults.report import Outcome, Tally, judged, summed
from tests.faults.trace import UntracedError, traced

DATA = bytes(range(1, 101))


def right(folder: Path) -> None:
    """Data, then the record that counts it."""
    durable.make_directory(folder / "a")
    durable.write(folder / "a" / "data", [DATA])
    durable.write(folder / "record", [durable.digest(DATA).encode()])


def without_fsync(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "data.tmp").write_bytes(DATA)
    os.replace(folder / "a" / "data.tmp", folder / "a" / "data")
    durable.sync_directory(folder / "a")
    durable.sync_directory(folder)
    durable.write(folder / "record", [durable.digest(DATA).encode()])


def without_the_folders_fsync(folder: Path) -> None:
    durable.make_directory(folder / "a")
    with open(folder / "a" / "data.tmp", "wb") as file:
        file.write(DATA)
        file.flush()
        os.fsync(file.fileno())
    os.rename(folder / "a" / "data.tmp", folder / "a" / "data")
    durable.write(folder / "record", [durable.digest(DATA).encode()])


def record_first(folder: Path) -> None:
    durable.write(folder / "record", [durable.digest(DATA).encode()])
    durable.make_directory(folder / "a")
    durable.write(folder / "a" / "data", [DATA])


def holds_what_it_records(folder: Path) -> bool:
    """The promise: what is recorded is there, whole."""
    if not (folder / "record").exists():
        return True
    data = folder / "a" / "data"
    return data.exists() and data.read_bytes() == DATA


def broken_images(root: Path, writer: Callable[[Path], None]) -> list[str]:
    """The images in which a writer's promise does not hold."""
    found = []
    trace = traced(root, lambda: writer(root))
    assert trace.code == 0
    for image in images(trace):
        image.put()
        if not holds_what_it_records(root):
            found.append(str(image))
    return found


def test_a_right_writer_survives_every_image(tmp_path: Path) -> None:
    assert not broken_images(tmp_path / "w", right)


@pytest.mark.parametrize("writer", [without_fsync, without_the_folders_fsync, record_first])
def test_the_images_find_a_wrong_writer(tmp_path: Path, writer: Callable[[Path], None]) -> None:
    assert broken_images(tmp_path / "w", writer)


def after_power_loss(root: Path, work: Callable[[], object]) -> set[tuple[tuple[str, object], ...]]:
    """All that may be in `root`."""
    trace = traced(root, work)
    assert trace.code == 0
    return {tuple(image.tree.items()) for image in images(trace)}


def test_a_removed_file_comes_back_until_its_folder_is_synced(tmp_path: Path) -> None:
    root = tmp_path / "w"
    root.mkdir()
    (root / "old").write_bytes(b"o")

    def removing() -> None:
        (root / "old").unlink()
        durable.write(root / "new", [b"n"])

    found = after_power_loss(root, removing)
    assert (("old", b"o"),) in found and (("new", b"n"),) in found and () in found
    assert (("new", b"n"), ("old", b"o")) in found  # both at once


def test_bytes_that_were_not_synced_are_old_half_zeros_or_new(tmp_path: Path) -> None:
    root = tmp_path / "w"
    root.mkdir()
    (root / "log").write_bytes(b"ab")

    def appending() -> None:
        with (root / "log").open("r+b") as file:
            file.seek(2)
            file.write(b"cd")

    found = {tree[0][1] for tree in after_power_loss(root, appending)}
    assert found == {b"ab", b"abc", b"ab\0\0", b"abcd"}


def test_a_moved_folder_is_in_one_of_its_places(tmp_path: Path) -> None:
    root = tmp_path / "w"
    tree.put(root, {"from": None, "to": None, "from/x": None, "from/x/file": b"1"})

    def moving() -> None:
        (root / "from" / "x").rename(root / "to" / "x")
        shutil.rmtree(root / "from")

    found = [dict(items) for items in after_power_loss(root, moving)]
    assert len(found) == 3  # before, moved, and without the folder that is empty then
    for names in map(set, found):
        assert ("from/x/file" in names) != ("to/x/file" in names)


def test_children_and_threads_are_traced_and_other_writers_refused(tmp_path: Path) -> None:
    root = tmp_path / "w"

    def forking() -> None:
        if child := os.fork():
            os.waitpid(child, 0)
        else:
            durable.write(root / "child", [b"c"])
            os._exit(0)
        durable.write(root / "parent", [b"p"])

    trace = traced(root, forking)
    names = [event.to for event in trace.events if event.call == "rename"]
    assert names == ["child", "parent"]
    assert trace.after == {"child": b"c", "parent": b"p"}
    other = traced(tmp_path / "o", lambda: os.system(f"echo > {tmp_path / 'o' / 'unseen'}"))
    with pytest.raises(UntracedError, match="unseen"):
        list(images(other))


def test_a_kill_at_every_call_until_none_is_left(tmp_path: Path) -> None:
    root = tmp_path / "w"

    def held(writer: Callable[[Path], None]) -> list[bool]:
        begin = lambda: tree.put(root, {})  # noqa: E731
        return [holds_what_it_records(root) for _ in kills.killed(begin, lambda: writer(root))]

    assert held(right) == [True] * 2 * 8  # mkdir and sync; fsync, replace and sync, twice
    assert not all(held(record_first))


def careful(root: Path) -> str:
    """Reads a file with its digest."""
    data = (root / "data").read_bytes()
    if durable.digest(data) != json.loads((root / "digest").read_text()):
        raise StoreError("data is damaged")
    return data.decode(errors="replace")


def careless(root: Path) -> int:
    """Reads numbers, whatever they are."""
    return sum((root / "data").read_bytes())


def test_flips_tell_a_careful_reader_from_a_careless_one(tmp_path: Path) -> None:
    root = tmp_path / "w"
    tree.put(root, {"data": DATA, "digest": json.dumps(durable.digest(DATA)).encode()})
    counted = Tally()
    flips.tried(counted, root, ["data"], lambda: careless(root), count=3)
    found = summed(counted.rows())
    assert found["flip: data"]["SILENT"] >= 3 and found["gone: data"]["BROKEN"] == 1
    assert tree.files(root)["data"] == DATA
    counted = Tally()
    flips.tried(counted, root, ["data"], lambda: careful(root), count=3)
    assert summed(counted.rows())["flip: data"]["refused"] == counted.cases(Outcome.REFUSED) - 5
    counted = Tally()
    mend = lambda: (root / "data").write_bytes(DATA)  # noqa: E731
    flips.tried(counted, root, ["data"], lambda: careful(root), count=1, repair=mend)
    assert counted.cases(Outcome.REPAIRED) == counted.cases() - 1  # a file that is gone: traceback


def test_answers_are_judged() -> None:
    assert judged(ask(lambda: 3), 3) is Outcome.SAME
    assert judged(ask(lambda: 4), 3) is Outcome.SILENT
    assert judged(ask(lambda: 1 // 0), 3) is Outcome.BROKEN
    assert judged(ask(lambda: os.kill(os.getpid(), signal.SIGKILL)), 3) is Outcome.BROKEN

    def refused() -> None:
        raise StoreError("no")

    assert judged(ask(refused), 3) is Outcome.REFUSED
    assert isinstance(ask(lambda: print("said")), Answer) and ask(lambda: print("said")).said
