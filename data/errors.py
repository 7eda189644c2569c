"""The exceptions of the pipeline, and how a command ends with each of them.

    PipelineError           one line on stderr with a way out, exit code 2
    ├── SettingError        a setting that cannot be right (also a ValueError)
    │   └── DocumentError   one document that cannot be stored; text.bad=skip leaves it out
    ├── StoreError          a store or run directory that is not what it must be
    │   ├── MismatchError   recorded settings differ from the ones asked for; names both values
    │   └── TemporaryError  nothing that was given is wrong: a disk, a server or another process is
    │                       in the way; exit code 75, the same command goes on later
    └── NonFiniteError      NaN or infinity where numbers must be
    Interrupted             a signal at a safe boundary: SIGINT 130, SIGTERM 143; SIGUSR1 and
                            SIGUSR2, by which engines announce the end, 75

The line of a PipelineError says what was got, what is allowed, and the way out.

What the machine answers to a failing call becomes one of them at the boundary of a command
(data/machine.py). Any other exception is a defect of ours: it keeps its traceback, and the exit
code is 1.
"""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from residual_saes.data.secrets import redacted
from residual_saes.data.spelling import spelled

# EX_TEMPFAIL of sysexits.h: engines that restart by exit code take it for "again".
AGAIN = 75
ANNOUNCED = (signal.SIGUSR1, signal.SIGUSR2)  # by which engines announce the end

# What a disk, a mount or a network answers while something is wrong with it that may pass.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ENOSPC", "EDQUOT", "ESTALE", "EREMOTEIO", "ENODEV", "ENXIO", "ENOMEDIUM"),
        *("EAGAIN", "EBUSY", "EINTR", "EMFILE", "ENFILE", "ENOMEM", "ENOLCK", "ENOBUFS"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "ENOTCONN", "ESHUTDOWN", "ETIMEDOUT"),
        *("ENETDOWN", "ENETRESET", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ECOMM"),
    )
    if hasattr(errno, name)  # macOS lacks some
)

# How libraries that raise classes of their own name an errno: Rust, Python's OSError and PyTorch.
_ERRNO = re.compile(r"\(os error (\d+)\)|\[[Ee]rrno (\d+)\]|: [A-Z][\w /]+ \((\d+)\)")
# And how they say, without any, that the disk took less than it was given: PyTorch, NumPy.
_CUT_SHORT = re.compile(
    r"file write failed|unexpected pos \d|iostream error|\d requested and \d+ written"
)


class PipelineError(Exception):
    """An error that the user can mend; its text is the whole message."""

    exit_code = 2

    def __str__(self) -> str:
        return spelled(super().__str__())


class SettingError(PipelineError, ValueError):
    """A setting that cannot be right, whatever is on the disk."""


class DocumentError(SettingError):
    """One document of a text cannot be stored."""

    def __init__(self, kind: str, message: str) -> None:
        """Take the kind, by which such documents are counted, and what is wrong, on any lines."""
        super().__init__(" ".join(message.splitlines()))
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, as `MismatchError` has it."""
        return type(self), (self.kind, str(self))


class StoreError(PipelineError):
    """A store or a run directory is missing, damaged, or of another kind."""


class TemporaryError(StoreError):
    """What is in the way may pass: the same command goes on later."""

    exit_code = AGAIN


class NonFiniteError(PipelineError):
    """NaN or infinity where numbers must be."""


def _value(value: Any) -> str:
    """A setting's value, or that it has none: a file of a text that one side lacks."""
    return "absent" if value is None else repr(value)


class MismatchError(StoreError):
    """Recorded settings differ from the ones asked for."""

    def __init__(
        self, where: str, differences: Mapping[str, tuple[Any, Any]], way_out: str
    ) -> None:
        lines = "; ".join(
            f"{key} is {_value(old)} there and {_value(new)} here"
            for key, (old, new) in differences.items()
        )
        super().__init__(f"{where} was made with other settings: {lines}. {way_out}")
        self.differences = dict(differences)
        self._arguments = (where, self.differences, way_out)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, by which a launcher's job returns it. By default only the message would."""
        return type(self), self._arguments


class Interrupted(BaseException):
    """The process was asked to stop, and reached a boundary where nothing is lost.

    A BaseException, so that no sweep goes on after it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = exit_code(signum)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, as `MismatchError` has it."""
        return type(self), (self.signum,)


def exit_code(signum: int) -> int:
    """How a command ends that a signal has stopped."""
    return AGAIN if signum in ANNOUNCED else 128 + signum


def raise_interrupted(signum: int, _frame: FrameType | None) -> None:
    """A signal handler; Python's own one for SIGINT raises KeyboardInterrupt."""
    raise Interrupted(signum)


class StopRequest:
    """Turns signals to stop into a flag that loops check between units or steps.

    A context manager; the former handlers come back on exit. A second signal of the same kind acts
    at once. In a command, data/stopping.py ends the process if no check comes within a second.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGINT, signal.SIGTERM, *ANNOUNCED):
            # A launcher's own handler stays: submitit ignores SIGTERM, which Slurm sends before it
            # requeues a job, and requeues it at SIGUSR2.
            replaced = (signal.SIG_DFL, signal.default_int_handler, raise_interrupted)
            if signal.getsignal(signum) in replaced:
                self._former[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, self._former[signum])

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived since the last check."""
        if self.signum is not None:
            raise Interrupted(self.signum)


def errno_of(error: BaseException) -> int | None:
    """The errno of the failed call that `error` tells of, in the words of whichever library."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        text = str(cause)
        if match := _ERRNO.search(text):
            return int(next(filter(None, match.groups())))
        if _CUT_SHORT.search(text):
            return errno.EIO
        cause = cause.__cause__
    return None


def is_passing(error: BaseException) -> bool:
    """Whether a disk or a network failed, and not a name or a right that was given."""
    return isinstance(error, ConnectionError | TimeoutError) or errno_of(error) in _PASSING


def caused(
    error: BaseException,
    got: str,
    way_out: str,
    kind: type[PipelineError] = StoreError,
) -> PipelineError:
    """The error for `got`: a TemporaryError if `error` may pass by itself, else a `kind`."""
    if is_passing(error):
        return TemporaryError(f"{got}; the same command goes on once that is mended")
    return kind(f"{got}; {way_out}")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text; the name of its class if the text is empty.

    A library may quote an address or a header: secrets are left out.
    """
    return redacted(next(iter(str(error).strip().splitlines()), type(error).__name__))


def differences(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two nested mappings, with (recorded, wanted)."""
    unequal: dict[str, tuple[Any, Any]] = {}
    for key in sorted(recorded.keys() | wanted.keys()):
        old = recorded.get(key)
        new = wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for inner, pair in differences(old, new).items():
                unequal[f"{key}.{inner}"] = pair
        elif old != new:
            unequal[key] = (old, new)
    return unequal
