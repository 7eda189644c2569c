"""Locks on folders, on file systems with and without them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from residual_saes.data import locks
from residual_saes.data.errors import TemporaryError
from tests.conftest import Call
from tests.train.test_command import SMALL, make_store

NONE = ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP", "EINVAL"]


def refuses(name: str) -> Callable[..., None]:
    def call(*_: int) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    return call


def test_a_lock_is_one_processes_and_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    left = tmp_path / ".c.0.1234abcd.tmp"
    in_use = tmp_path / "arm" / left.name  # an arm of a multirun has a lock of its own
    in_use.parent.mkdir()
    for path in (left, in_use):
        path.touch()
    with locks.locked(tmp_path, "held"):
        assert in_use.exists() and not left.exists()
        with pytest.raises(TemporaryError, match="held"), locks.locked(tmp_path, "held"):
            raise AssertionError("two hold it")
    with locks.locked(tmp_path, "held"):
        pass
    assert not (tmp_path / locks.FILE).exists()


@pytest.mark.parametrize("name", NONE)
def test_a_folder_without_flock_is_locked_by_a_file_in_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses(name))
    with locks.locked(tmp_path, "held"):
        child = os.fork()
        if not child:  # POSIX locks are between processes
            try:
                with locks.locked(tmp_path, "held"):
                    os._exit(0)
            except TemporaryError:
                os._exit(75)
            finally:
                os._exit(99)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 75
    with locks.locked(tmp_path, "held"):
        pass


@pytest.mark.parametrize(("name", "lockf"), [*((name, True) for name in NONE), (NONE[0], False)])
def test_training_goes_on_without_flock(
    name: str, lockf: bool, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without any locks: one line says so. Twice: the lock's file is no foreign one."""
    make_store(tmp_path / "s.zarr", units=2, layers=(3,))
    monkeypatch.setattr(fcntl, "flock", refuses(name))
    if not lockf:
        monkeypatch.setattr(fcntl, "lockf", refuses(name))
    for _ in range(2):
        line = (
            "train",
            "residual_saes.train.command",
            "store=s.zarr",
            "run=r",
            *SMALL,
            "tokens=64",
        )
        code, err = call(*line)
        assert code == 0, err
        assert err.count("file system without locks") == (0 if lockf else 1)


def test_another_refusal_is_no_lack_of_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuses("EIO"))
    with (
        pytest.raises(TemporaryError, match=f"{tmp_path} cannot be locked: "),
        locks.locked(tmp_path, "held"),
    ):
        raise AssertionError("nobody holds it")
