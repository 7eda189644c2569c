"""What the machine answers where a call fails: one line, with what was done and a way out.

Any OSError that reaches a boundary is the machine's answer, and no defect of ours: the boundary of
a command, of an arm of a sweep, of a job or of a child process. So are an allocator's refusal and
an errno in the words of a library. Code that knows better what it was doing says so before, by a
PipelineError of its own.

The line names the place in our code. With PYTHONDEVMODE=1 the traceback stands before it.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from residual_saes.data.errors import (
    PipelineError,
    SettingError,
    StoreError,
    TemporaryError,
    errno_of,
    first_line,
    is_passing,
)
from residual_saes.data.stopping import KEPT

_LONGEST = 200  # characters of a library's message
_HERE = Path(__file__).parents[1]  # residual_saes, in whose names Python gives our files

# What mends it, where that is not plain.
_WAYS_OUT = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or have a larger quota",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "stop other programs, or raise fs.file-max",
    errno.EAGAIN: "raise `ulimit -u`, or stop other programs",
    errno.ENOMEM: "stop other programs, or take a machine with more memory",
    errno.ENOENT: "restore it, or choose another place",
}
# What the file system answers to a path that cannot be, or that is not the user's.
_WRONG_NAME = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EFBIG),
)


def answer(error: Exception, smaller: str = "") -> PipelineError | None:
    """The line for `error`; None: it is a defect of ours.

    It holds no traceback, and so none of the memory of the frames in it.

    Args:
        smaller: what to lower where memory is missing, with the present values.
    """
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, BrokenPipeError):
        return None  # whoever reads what is printed has seen enough
    if is_out_of_memory(error):
        reason = _bounded(first_line(error))
        way_out = smaller or "take a device= with more memory"
        found: PipelineError = PipelineError(f"out of memory ({reason}); {way_out}; {KEPT}")
    elif isinstance(error, OSError) or errno_of(error) is not None:
        found = _of_a_call(error)
    elif "initialize cpuinfo" in str(error):
        found = StoreError(
            "torch asks /proc what this processor can do, and it is not mounted; mount it"
        )
    elif (library := _loading(error)) is not None:
        reason = _bounded(f"{type(error).__name__}: {first_line(error)}")
        found = SettingError(
            f"{library} cannot be loaded ({reason}); mend what it names: an "
            "environment variable, the memory (`ulimit -v`), or its installation"
        )
    else:
        return None
    if sys.flags.dev_mode:
        sys.excepthook(type(error), error, error.__traceback__)
    return found


@contextmanager
def answering(smaller: str = "") -> Iterator[None]:
    """Raise the `answer` in the place of what a block raises."""
    try:
        yield
    except Exception as error:
        found = answer(error, smaller)
        if found is None or found is error:
            raise
        raise found from error


def _of_a_call(error: Exception) -> PipelineError:
    """The line for a system call that failed."""
    number = errno_of(error)
    name = error.filename if isinstance(error, OSError) else None
    reason = error.strerror if isinstance(error, OSError) and error.strerror else None
    parts = [str(name)] if name is not None else []
    parts.append(_bounded(reason or f"{type(error).__name__}: {first_line(error)}"))
    line = f"{': '.join(parts)}{_place(error)}"
    way_out = _WAYS_OUT.get(number) if number is not None else None
    if is_passing(error):
        return TemporaryError(f"{line}; {way_out + '; ' if way_out else ''}{KEPT}")
    if number in _WRONG_NAME:
        way_out = "mend its rights, or choose another place"
    elif way_out is None:
        way_out = (
            "where the disk is sound, it is a defect of ours: PYTHONDEVMODE=1 shows its traceback"
        )
    return StoreError(f"{line}; {way_out}; what was finished is kept")


def _loading(error: BaseException) -> str | None:
    """The file of a library that failed while it was loaded, and its line; None: none did."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.name == "<module>" and not frame.filename.startswith((str(_HERE), "<")):
            return f"{frame.filename}:{frame.lineno}"
    return None


def _place(error: BaseException) -> str:
    """Where in our code it failed: file, line and function. Empty if that is not known."""
    frames = traceback.extract_tb(error.__traceback__)
    named = [frame for frame in frames if frame.filename != __file__]
    ours = [frame for frame in named if frame.filename.startswith(str(_HERE))]
    if not ours:
        return ""
    file = os.path.relpath(ours[-1].filename, _HERE)
    return f" (at {file}:{ours[-1].lineno}, {ours[-1].name})"


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused, on any device: Python's, NumPy's, torch's or Rust's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # The CPU's allocator, and cuBLAS for its workspace, have no class of their own.
    text = str(error) if isinstance(error, RuntimeError) else ""
    refusals = ("allocate memory", "out of memory", "enough memory", "STATUS_ALLOC_FAILED")
    return any(refusal in text for refusal in refusals)
