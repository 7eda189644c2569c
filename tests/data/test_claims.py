"""Claims keep living processes apart, and end with their process; without locks they are leases."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from residual_saes.data.durable import Written, digest
from residual_saes.data.errors import StoreError
from residual_saes.data.store.claims import FileClaims, NoLocksError, unit_claim
from residual_saes.data.store.leases import Leases
from residual_saes.data.store.manifest import require_free
from residual_saes.data.store.place import LocalPlace, place_of
from residual_saes.data.store.repair import repair
from residual_saes.data.store.store import Store
from tests.conftest import make_manifest, make_store

SETTINGS = make_manifest(8, tokens=1024, context=64, unit=64, chunk=16)
HOLD = """
import sys, time
from pathlib import Path
from residual_saes.data.store.claims import FileClaims, unit_claim
held = FileClaims(Path(sys.argv[1]) / "commits" / "claims", Path(sys.argv[1]))
print(held.take(unit_claim(3)), flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that has claimed unit 3."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def alone(claims: FileClaims) -> bool:
    with claims.alone() as is_alone:
        return is_alone


def test_a_claim_is_refused_while_its_process_lives_and_free_when_it_is_killed(
    tmp_path: Path,
) -> None:
    with holder(tmp_path) as other:
        ours = FileClaims(tmp_path / "commits" / "claims", tmp_path)
        assert not ours.take(unit_claim(3))
        assert ours.take(unit_claim(4))
        assert not alone(ours)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert ours.take(unit_claim(3))
        assert alone(ours)
        ours.close()


def test_what_a_killed_process_left_half_written_goes_when_nobody_is_there(tmp_path: Path) -> None:
    left = tmp_path / "layer_3" / ".c.0.0.89abcdef.tmp"
    left.parent.mkdir()
    left.touch()
    with holder(tmp_path) as other:
        assert not left.exists()  # it was alone when it came
        left.touch()
        FileClaims(tmp_path / "commits" / "claims", tmp_path).close()
        assert left.exists()  # it may be the other's
        ours = FileClaims(tmp_path / "commits" / "claims", tmp_path)
        other.kill()
        other.wait()
        assert left.exists()
        ours.close()  # the last to go
        assert not left.exists()


def test_repair_is_refused_beside_a_harvest(
    tmp_path: Path, random_bits: NDArray[np.uint16]
) -> None:
    make_store(tmp_path / "s.zarr", random_bits)
    with holder(tmp_path / "s.zarr") as other:
        with pytest.raises(StoreError, match=r"s\.zarr"):
            repair(LocalPlace(tmp_path / "s.zarr"))
        other.kill()
    assert repair(LocalPlace(tmp_path / "s.zarr")) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_has_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(NoLocksError):
        FileClaims(tmp_path / "claims", tmp_path)
    with (
        closing(LocalPlace(tmp_path).claims()) as one,
        closing(LocalPlace(tmp_path).claims()) as other,
    ):
        assert isinstance(one, Leases)
        assert one.take(unit_claim(3)) and not other.take(unit_claim(3))
        one.release(unit_claim(3))
        assert other.take(unit_claim(3))


@pytest.mark.parametrize("name", ["replace", "link"])
def test_a_temporary_that_another_machine_removes_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    removed: list[str] = []
    move = getattr(os, name)

    def sweep_first(source: Path, target: Path) -> None:
        if len(removed) < 3:
            removed.append(str(source))
            os.unlink(source)
        move(source, target)

    monkeypatch.setattr(os, name, sweep_first)
    place = LocalPlace(tmp_path / "s.zarr")
    data = os.urandom(10_000)
    if name == "replace":
        assert place.write("layer_3/c.0.0", [data[:77], data[77:]]) == Written(10_000, digest(data))
        key = "layer_3/c.0.0"
    else:
        key = "commits/spine/00000000.json"
        assert place.create(key, data)
        assert not place.create(key, b"another")
    assert len(set(removed)) == 3
    assert place.read(key) == data
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_a_folder_that_was_removed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_first(source: Path, target: Path) -> None:
        shutil.rmtree(target.parent)
        raise FileNotFoundError(errno.ENOENT, "gone", str(source))

    monkeypatch.setattr(os, "replace", remove_first)
    with pytest.raises(StoreError, match="one"):
        LocalPlace(tmp_path / "s.zarr").write("one", [b"x"])


def begin(path: str, start: int, codes: int) -> None:
    """Begin a store, as a harvest does, once `start` is closed; write an error to `codes`."""
    try:
        os.read(start, 1)
        place = place_of(path)
        require_free(place)
        with closing(place.claims()) as claims:
            Store.open_or_create(place, SETTINGS, claims)
    except BaseException as error:
        os.write(codes, f"{type(error).__name__}: {error}\n".encode()[:500])
    finally:
        os._exit(0)


def race(path: str, processes: int) -> str:
    """What went wrong in processes that begin one store at the same moment."""
    start, starter = os.pipe()
    errors, theirs = os.pipe()
    children = []
    for _ in range(processes):
        pid = os.fork()
        if pid == 0:
            os.close(starter)
            begin(path, start, theirs)
        children.append(pid)
    os.close(starter)
    for pid in children:
        os.waitpid(pid, 0)
    os.close(theirs)
    os.close(start)
    with open(errors) as text:
        return text.read()


def test_processes_that_begin_a_store_together_all_go_on(tmp_path: Path) -> None:
    for number in range(3):
        assert race(str(tmp_path / f"{number}.zarr"), 16) == ""


@pytest.mark.long
def test_sixteen_processes_that_begin_a_store_together_a_hundred_times(tmp_path: Path) -> None:
    for number in range(100):
        assert race(str(tmp_path / f"{number}.zarr"), 16) == ""


def test_the_claims_file_alone_is_no_store(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "s")
    place.claims().close()
    assert place.empty()
    (tmp_path / "s" / "letter.txt").touch()
    assert not place.empty()
    assert os.path.exists(tmp_path / "s" / "commits" / "claims")
