"""The n-th system call of a kind fails in a forked command.

`open` becomes Python's own `_pyio`, whose files do all by `os.open`, `os.read` and `os.write`. So
the functions of `os` are the one place where calls are counted and fail.
"""

from __future__ import annotations

import _pyio
import builtins
import errno
import fcntl
import io
import itertools
import json
import mmap
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

from tests.forked import run_forked

_DISK = ("EIO", "ESTALE", "ETIMEDOUT", "ENODEV")
_PATH = ("EACCES", "EPERM", "ENOENT", "ENOTDIR", "ELOOP", "ENAMETOOLONG")
_ROOM = ("ENOSPC", "EDQUOT", "EROFS")

# Where each kind of call is, and what a kernel may answer to it.
CALLS: dict[str, tuple[tuple[Any, str], tuple[str, ...]]] = {
    "open": (
        (os, "open"),
        (*_DISK, *_PATH, *_ROOM, "EMFILE", "ENFILE", "ENOMEM", "EISDIR", "EBUSY", "EOVERFLOW"),
    ),
    "read": ((os, "read"), (*_DISK, "EISDIR", "EINVAL", "ENOMEM", "EBADF")),
    "pread": ((os, "pread"), (*_DISK, "EINVAL")),
    "write": ((os, "write"), (*_DISK, "ENOSPC", "EDQUOT", "EFBIG", "EINVAL", "EPERM")),
    "fsync": ((os, "fsync"), (*_DISK, "ENOSPC", "EDQUOT", "EINVAL", "EROFS")),
    "close": ((os, "close"), ("EIO", "ENOSPC", "EDQUOT", "EBADF")),
    "replace": ((os, "replace"), (*_DISK, *_PATH, *_ROOM, "EBUSY", "EISDIR", "ENOTEMPTY", "EXDEV")),
    "rename": ((os, "rename"), (*_DISK, *_PATH, *_ROOM, "EBUSY", "EISDIR", "ENOTEMPTY", "EXDEV")),
    "link": ((os, "link"), (*_DISK, *_PATH, *_ROOM, "EMLINK", "ENOSYS", "ENOTSUP")),
    "unlink": ((os, "unlink"), (*_DISK, "EACCES", "EPERM", "EBUSY", "EROFS", "EISDIR")),
    "mkdir": ((os, "mkdir"), (*_DISK, *_PATH, *_ROOM, "EMLINK")),
    "rmdir": ((os, "rmdir"), (*_DISK, "EACCES", "EBUSY", "ENOTEMPTY", "EROFS")),
    "stat": ((os, "stat"), (*_DISK, "EACCES", "ELOOP", "ENAMETOOLONG", "EOVERFLOW", "ENOMEM")),
    "fstat": ((os, "fstat"), (*_DISK, "EBADF", "EOVERFLOW")),
    "listdir": ((os, "listdir"), (*_DISK, "EACCES", "EMFILE", "ENOMEM", "ENOTDIR")),
    "scandir": ((os, "scandir"), (*_DISK, "EACCES", "EMFILE", "ENOMEM", "ENOTDIR")),
    "statvfs": ((os, "statvfs"), (*_DISK, "EACCES", "ENOSYS", "EOVERFLOW")),
    "flock": ((fcntl, "flock"), ("EIO", "ENOLCK", "EBADF", "EINTR", "EINVAL", "ESTALE")),
    "lockf": ((fcntl, "lockf"), ("EIO", "ENOLCK", "EDEADLK", "EINTR", "EINVAL", "ESTALE")),
    "mmap": ((mmap, "mmap"), ("ENOMEM", "ENODEV", "EACCES", "EAGAIN")),
    "spawn": ((subprocess, "Popen"), ("EAGAIN", "ENOMEM", "ENOENT", "EACCES", "EMFILE")),
    "pipe": ((os, "pipe"), ("EMFILE", "ENFILE")),
    "getcwd": ((os, "getcwd"), ("ENOENT", "EACCES")),
}


class Fault(NamedTuple):
    """The `number`-th call of a kind from the command's beginning on fails with `error`."""

    call: str
    number: int
    error: str


class Result(NamedTuple):
    """How a command ended."""

    code: int
    err: str
    calls: dict[str, int]  # by kind, as many as it made

    @property
    def is_refusal(self) -> bool:
        """Whether it is one line with a reason, and a code for it."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        return self.code in (2, 75) and len(lines) == 1 and not self.has_traceback

    @property
    def has_traceback(self) -> bool:
        return "Traceback" in self.err or "Exception ignored" in self.err


def run(folder: Path, command: tuple[str, ...], fault: Fault | None) -> Result:
    """Run `python -m COMMAND` in `folder` with a fault; None: count its calls."""
    count = folder.parent / f"{folder.name}.calls"
    asked = json.dumps([list(fault) if fault else None, str(count.absolute())])
    code = "from tests.faults import calls; calls.begin()"
    done: CompletedProcess[str] = run_forked("-c", code, asked, *command, cwd=folder)
    calls = json.loads(count.read_text()) if count.exists() else {}
    count.unlink(missing_ok=True)
    return Result(done.returncode, done.stdout + done.stderr, calls)


def begin() -> None:
    """In the child: count or break its calls, and run the command."""
    asked, module, *arguments = sys.argv[1:]
    fault, count = json.loads(asked)
    signal.alarm(120)  # a hang is a result, too
    sys.argv = [module, *arguments]
    counted = break_(Fault(*fault) if fault else None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if fault is None:
            Path(count).write_text(json.dumps(counted()))


def break_(fault: Fault | None) -> Callable[[], dict[str, int]]:
    """Make the call that `fault` names fail in this process; a function that counts the calls."""
    builtins.open = io.open = _pyio.open  # type: ignore[assignment]
    seen: dict[str, int] = {}
    for name, ((module, attribute), _) in CALLS.items():
        call = getattr(module, attribute)
        setattr(module, attribute, _counted(name, call, seen, fault))
    return lambda: dict(seen)


def _counted(
    name: str, call: Callable[..., Any], seen: dict[str, int], fault: Fault | None
) -> Callable[..., Any]:
    numbers = itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen[name] = number = next(numbers)
        if fault and (name, number) == fault[:2]:
            code = getattr(errno, fault.error)
            path = next((str(arg) for arg in args if isinstance(arg, str | os.PathLike)), None)
            if name == "close":
                call(*args)  # as Linux does: it is closed all the same
            raise OSError(code, os.strerror(code), path)
        return call(*args, **kwargs)

    return counted
