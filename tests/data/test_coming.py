"""Training that is started before its ring is there: it waits for a harvest, and not for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from residual_saes.data.errors import SettingError
from residual_saes.data.store import coming, default, manifest, ring_state
from residual_saes.data.store.leases import Leases
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.ring_state import RingState
from tests.faults.child import in_child, outcome

Start = Callable[[Callable[[], object]], int]  # its process id


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coming, "PATIENCE_S", 0.3)
    coming.await_ring.cache_clear()


@pytest.fixture
def beside() -> Iterator[Start]:
    """Runs what it is given in a process of its own, which ends with the test."""
    children = []

    def started(body: Callable[[], object]) -> int:
        children.append(in_child(body))
        return children[-1]

    yield started
    for child in children:
        os.kill(child, signal.SIGKILL)
        outcome(child)


def harvest(place: LocalPlace, then: Callable[[], object] = lambda: time.sleep(60)) -> None:
    """What a harvest does of a ring's first minutes."""
    with coming.announced(place):
        then()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_ring_is_announced_until_its_process_ends(tmp_path: Path, beside: Start) -> None:
    place = LocalPlace(tmp_path / "s.zarr")
    assert not coming.is_announced(place)
    ranks = [beside(lambda: harvest(place)) for _ in range(2)]
    wait_until(lambda: coming.is_announced(place))
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # nothing is asked of it
        assert coming.is_announced(place)
        os.kill(rank, signal.SIGKILL)
    wait_until(lambda: not coming.is_announced(place))
    assert place.empty()


def test_training_waits_for_the_ring_that_a_harvest_makes(
    tmp_path: Path,
    beside: Start,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = LocalPlace(tmp_path / "s.zarr")
    # Also one that begins in a store with rows, or that lost its record and was repaired.
    for key in (manifest.KEY, "commits/residuals/00000000.3.json"):
        place.write(key, [b""])

    def make() -> None:
        time.sleep(3 * coming.PATIENCE_S)
        ring_state.write(place, RingState(1, 1, [3], [0], 0))
        time.sleep(60)

    beside(lambda: harvest(place, make))
    wait_until(lambda: coming.is_announced(place))
    coming.await_ring(place.name)
    assert ring_state.read(place)
    assert f"python -m harvest max_bytes=... store={place.name}" in capsys.readouterr().err


def test_nobody_waits_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped store=, in every arm of a sweep: the wait is told once."""
    for _ in range(2):
        coming.await_ring(str(tmp_path / "mistyped"))
    assert capsys.readouterr().err.count("mistyped is not there yet: waiting 0s") == 1


def test_what_no_ring_can_come_to_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.zarr/commits/residuals/00000000.3.json"
    whole.parent.mkdir(parents=True)
    whole.write_bytes(b"")
    (tmp_path / "else").mkdir()
    (tmp_path / "else/notes.txt").write_text("mine")
    for path in (tmp_path / "whole.zarr", tmp_path / "else"):
        coming.await_ring(str(path))
    assert capsys.readouterr().err == ""


def test_a_signal_ends_the_wait_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coming, "PATIENCE_S", 600.0)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        coming.await_ring(str(tmp_path / "s.zarr"))


def test_without_locks_no_ring_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded."""
    monkeypatch.setattr(LocalPlace, "claims", lambda place: Leases(place))
    with pytest.raises(SettingError, match="max_bytes= "), coming.announced(LocalPlace(tmp_path)):
        raise AssertionError("it is announced")


def test_the_default_store_may_be_coming(
    tmp_path: Path,
    beside: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="store= "):
        default.find(lambda store: store.points[:1])
    beside(lambda: harvest(LocalPlace(Path(default.HARVESTED))))
    wait_until(lambda: coming.is_announced(LocalPlace(Path(default.HARVESTED))))
    assert default.find(lambda store: store.points[:1])[0] == default.HARVESTED
