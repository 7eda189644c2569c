"""Every operation of some work that a disk would keep, in order.

The work runs in a forked child, in which the calls of `os` and `open` note what they do below one
folder. Its own children and threads are noted too, in one order: each call runs under a lock.

A library that writes by its own system calls is not noted. It leaves files that no noted call
explains, and the trace is refused.
"""

from __future__ import annotations

import builtins
import fcntl
import functools
import io
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import tree
from tests.faults.child import in_child, outcome
from tests.faults.tree import Tree

_WRITING = os.O_WRONLY | os.O_RDWR
_real_open, _real_io = os.open, io.open


class Event(NamedTuple):
    """One operation. Paths are below the root, with /."""

    call: str  # mkdir create write fsync sync rename link unlink rmdir symlink
    path: str
    to: str = ""  # the new name of rename and link, the target of symlink
    data: bytes = b""  # the whole file after a write


class Trace(NamedTuple):
    """What some work did to a folder."""

    root: Path
    before: Tree
    events: list[Event]
    after: Tree
    code: int  # exit code of the work's process, or minus the signal that ended it


class UntracedError(AssertionError):
    """Something was written that no noted call explains."""


def traced(root: Path, work: Callable[[], object]) -> Trace:
    """Do `work` in a child, noting what it does below `root`."""
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    before = tree.read(root)
    log = root.with_name(f".{root.name}.trace")
    log.write_bytes(b"")

    def noted() -> None:
        recorder = _Recorder(str(root), str(log))
        recorder.install()
        try:
            work()
        finally:
            recorder.observe()

    code = outcome(in_child(noted))
    events = list(_events(log))
    log.unlink()
    return Trace(root, before, events, tree.read(root), code)


def _events(log: Path) -> Iterator[Event]:
    with log.open("rb") as file:
        while True:
            try:
                yield Event(*pickle.load(file))
            except EOFError:
                return


class _Watched:
    """A file that is open for writing, and its bytes as they were noted last."""

    def __init__(self, handle: int, opened: Any, seen: bytes) -> None:
        self.handle = handle  # our own, for reading
        self._opened = weakref.ref(opened) if opened is not None else None
        self.seen = seen

    @property
    def closed(self) -> bool:
        """Whether nobody can write to it any more; never told of a bare handle."""
        if self._opened is None:
            return False
        opened = self._opened()
        return opened is None or opened.closed

    def read(self) -> bytes:
        return os.pread(self.handle, os.fstat(self.handle).st_size, 0)


class _Recorder:
    """Notes what this process and its children do below `root`."""

    def __init__(self, root: str, log: str) -> None:
        self._root, self._log = root, log
        self._watched: list[_Watched] = []
        self._forked()
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """A lock of the process's own: a file's lock is shared over a fork."""
        self._lock = threading.RLock()
        self._file = _real_io(self._log, "ab", buffering=0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _note(self, *event: object) -> None:
        self._file.write(pickle.dumps(event))

    def _below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """A path as events have it; None for one elsewhere."""
        if isinstance(path, int):
            whole = os.readlink(f"/proc/self/fd/{path}")
        else:
            folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            name = os.path.join(folder, os.fsdecode(path))
            # The last part may be a link itself.
            parent, last = os.path.split(os.path.normpath(name))
            whole = os.path.join(os.path.realpath(parent), last)
        if whole == self._root:
            return ""
        return whole.removeprefix(f"{self._root}/") if whole.startswith(f"{self._root}/") else None

    def observe(self) -> None:
        """Note what was written since the last call."""
        with self._alone():
            self._observe()

    def _observe(self) -> None:
        for watched in list(self._watched):
            data = watched.read()
            path = self._below(watched.handle)
            if data != watched.seen and path is not None:
                watched.seen = data
                self._note("write", path, "", data)
            if watched.closed:
                os.close(watched.handle)
                self._watched.remove(watched)

    def install(self) -> None:
        """Put the noting calls in the place of this process's own."""
        for name in ("mkdir", "unlink", "rmdir"):
            setattr(os, name, self._of_one(name, getattr(os, name)))
        os.remove = self._of_one("unlink", os.remove)
        for name, call in (("rename", "rename"), ("replace", "rename"), ("link", "link")):
            setattr(os, name, self._of_two(call, getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._syncing(getattr(os, name)))
        os.symlink = self._symlink(os.symlink)
        os.truncate = self._truncate(os.truncate)
        os.open = self._open
        io.open = builtins.open = self._io_open

    def _of_one(self, event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def noted(path: Any, *args: Any, dir_fd: int | None = None, **more: Any) -> Any:
            # shutil.rmtree gives a folder's handle and a name in it.
            at = {} if dir_fd is None else {"dir_fd": dir_fd}
            below = self._below(path, dir_fd)
            if below is None:
                return call(path, *args, **at, **more)
            with self._alone():
                self._observe()
                answer = call(path, *args, **at, **more)
                self._note(event, below)
                return answer

        return noted

    def _of_two(self, event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def noted(source: Any, target: Any, **more: Any) -> Any:
            below, to = self._below(source), self._below(target)
            if below is None and to is None:
                return call(source, target, **more)
            assert below is not None and to is not None, f"{source} to {target}: one is elsewhere"
            with self._alone():
                self._observe()
                answer = call(source, target, **more)
                self._note(event, below, to)
                return answer

        return noted

    def _symlink(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def noted(target: Any, path: Any, *args: Any, **more: Any) -> Any:
            with self._alone():
                self._observe()
                answer = call(target, path, *args, **more)
                if (below := self._below(path)) is not None:
                    self._note("symlink", below, os.fsdecode(target))
                return answer

        return noted

    def _truncate(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def noted(path: Any, length: int) -> Any:
            with self._alone():
                self._observe()
                answer = call(path, length)
                if not isinstance(path, int) and (below := self._below(path)) is not None:
                    self._note("write", below, "", Path(path).read_bytes())
                return answer

        return noted

    def _syncing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def noted(handle: Any) -> Any:
            number = handle if isinstance(handle, int) else handle.fileno()
            below = self._below(number)
            if below is None:
                return call(handle)
            with self._alone():
                self._observe()
                answer = call(handle)
                if not below.endswith(" (deleted)"):
                    is_folder = os.path.isdir(f"/proc/self/fd/{number}")
                    self._note("sync" if is_folder else "fsync", below)
                return answer

        return noted

    @functools.wraps(os.open)
    def _open(self, path: Any, flags: int, *args: Any, dir_fd: int | None = None) -> int:
        at = {} if dir_fd is None else {"dir_fd": dir_fd}
        below = self._below(path, dir_fd) if flags & (_WRITING | os.O_CREAT) else None
        if below is None:
            return _real_open(path, flags, *args, **at)
        return self._opening(below, lambda: _real_open(path, flags, *args, **at), bare=True)

    @functools.wraps(io.open)
    def _io_open(self, file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        writes = set(mode) & set("wax+") and not isinstance(file, int)
        below = self._below(file) if writes else None
        if below is None:
            return _real_io(file, mode, *args, **more)
        return self._opening(below, lambda: _real_io(file, mode, *args, **more), bare=False)

    def _opening(self, below: str, call: Callable[[], Any], bare: bool) -> Any:
        """Open a file for writing, note it if it is new, and watch it."""
        path = f"{self._root}/{below}"
        with self._alone():
            self._observe()
            is_new = not os.path.lexists(path)
            seen = b"" if is_new else _read(path)
            opened = call()
            if is_new:
                self._note("create", below)
            # Of a bare handle ours stays open: closing it would drop the process's POSIX locks.
            handle = _real_open(path, os.O_RDONLY)
            self._watched.append(_Watched(handle, None if bare else opened, seen))
            return opened


def _read(path: str) -> bytes:
    if not os.path.getsize(path):
        return b""  # closing a lock's file would drop the lock
    with _real_io(path, "rb") as file:
        return file.read()
