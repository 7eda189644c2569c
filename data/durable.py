"""Files that survive a power cut: written beside their place, synced, renamed, directory synced.

No Zarr library and no tensor library syncs what it writes; a rename without the syncs can survive a crash
that its contents did not. Every lasting file of the pipeline goes through this module.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import xxhash

from data.errors import StoreError

Buffer = bytes | bytearray | memoryview

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


class Written(NamedTuple):
    """What was written, as a commit record names it."""

    bytes: int  # size of the file
    xxh3_128: str  # digest of its contents, hexadecimal


def digest(*parts: Buffer) -> str:
    """xxh3_128 of the parts' bytes in order (4.35 GB/s on one core, against 0.46 for sha256)."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def digest_file(path: Path, block: int = 1 << 22) -> Written:
    """Size and digest of a file, read in blocks of `block` bytes."""
    state, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while data := file.read(block):
            state.update(data)
            size += len(data)
    return Written(size, state.hexdigest())


def sync_directory(path: Path) -> None:
    """Make the directory's own entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_temporary(path: Path, parts: Iterable[Buffer]) -> tuple[Path, Written]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state, size = xxhash.xxh3_128(), 0
    try:
        with temporary.open("wb") as file:
            for part in parts:
                state.update(part)
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary, Written(size, state.hexdigest())


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the disk refuses, said to the user."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror}; what was committed before is intact, "
            "so free space or mend the disk and run the same command again"
        ) from error


def write(path: Path, parts: Iterable[Buffer]) -> Written:
    """Write `parts` as the file `path`, replacing what is there, durably and all at once.

    Raises:
        StoreError: the disk refused; the file that was there before is untouched.
    """
    with refusals(path):
        temporary, written = _write_temporary(path, parts)
        try:
            os.replace(temporary, path)
        except OSError:
            temporary.unlink()
            raise
        sync_directory(path.parent)
    return written


def create(path: Path, data: bytes) -> bool:
    """Like `write`, but never replaces: False if `path` exists already (the first writer wins)."""
    with refusals(path):
        temporary, _ = _write_temporary(path, [data])
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    return True


def make_directory(path: Path) -> None:
    """Create `path` and its parents, durably."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot create the folder {path}: {error.strerror}; choose another place") from error
    for created in reversed(missing):
        sync_directory(created.parent)


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold `folder`, which is made if need be, for this process alone; the lock dies with the process.

    Temporaries that a killed process left in it are removed: under the lock none can be in use.

    Raises:
        StoreError: another process on this machine holds it; `busy` is the message.
    """
    make_directory(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(busy) from error
        for path in folder.rglob(".*.tmp"):
            if is_temporary(path):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def is_temporary(path: Path) -> bool:
    """Whether `path` is the rest of a write that did not come to its end."""
    return _TEMPORARY.fullmatch(path.name) is not None
