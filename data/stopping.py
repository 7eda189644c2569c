"""How a command ends on a signal to stop: within seconds, whatever its main thread is doing.

Python runs a signal's handler in the main thread, between two of its own instructions. A read of
5 GB, a product of large matrices or the wait for another thread keeps it from there. So a thread
hears of each signal too, and ends the process if it has not ended GRACE_S later. That loses
nothing that was committed: what lies on the disk survives a kill at any moment.

A loop that must save before it ends (training), or is about to commit what took long to make
(harvesting), holds the end off with `holding`. The same signal again ends the process at once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from residual_saes.data.errors import ANNOUNCED, exit_code, raise_interrupted

GRACE_S = 0.5  # from a signal to the end, unless it is held off
_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    **dict.fromkeys((signal.SIGTERM, *ANNOUNCED), raise_interrupted),
}
_AGAIN = "the same command again goes on"
_FINISHED = "what was finished is kept"
KEPT = f"{_FINISHED}, and {_AGAIN}"
_LAST_ACTS_S = 1.0  # at most
_POLL_S = 0.1  # between looks whether the end is still held off


@dataclass
class Left:
    """What a command leaves when it is stopped, and who says so."""

    saved: str = _FINISHED
    command: str = ""  # that goes on, as it was typed; "": nobody typed it
    tell: Callable[[str], None] | None = None  # of a signal by its name


left = Left()


def farewell(reason: str) -> list[str]:
    """The last lines of a command that is stopped: for a person, with the command to type."""
    line = f"stopped by {reason}; {left.saved}, and {_AGAIN}"
    by_hand = reason == "SIGINT" and left.command
    return [f"{line}:", f"    {left.command}"] if by_hand else [line]


class _Held:
    """How many callers hold the end off."""

    def __init__(self) -> None:
        self.count = 0
        self.lock = threading.Lock()

    def change(self, by: int) -> None:
        with self.lock:
            self.count += by


_held = _Held()
last_acts: list[Callable[[], None]] = []  # done before a signal ends the process, in a second
told = threading.Event()  # whether the command has said by itself that it was stopped
telling = threading.Lock()  # held while it says so
expected = threading.Event()  # whether Ctrl-C is how the command's work ends


@contextmanager
def holding() -> Iterator[None]:
    """While open, a first signal does not end the process: what runs here is worth the wait."""
    _held.change(1)
    try:
        yield
    finally:
        _held.change(-1)


def answer_early() -> None:
    """Until `answer_signals`, while libraries load, have an announced end take the process."""
    for signum in ANNOUNCED:
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, _end_early)


def _end_early(signum: int, _frame: FrameType | None) -> None:
    _end(signum)


def answer_signals() -> set[int]:
    """Have signals raise in the main thread; those that do, in numbers.

    A signal that is ignored, as in jobs behind `&`, stays so, and another's handler stays.
    """
    answered: set[int] = set()
    for signum, handler in _HANDLERS.items():
        if signal.getsignal(signum) in (signal.SIG_DFL, _end_early):
            signal.signal(signum, handler)
        if signal.getsignal(signum) is handler:
            answered.add(signum)
    return answered


def watch() -> None:
    """From now on until the process ends, end it soon after a signal. For the main thread."""
    answered = answer_signals()
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(ours, answered), name="signals", daemon=True).start()


def leave(end: SystemExit) -> None:
    """After a command that was stopped, and has said so if that is news, end the process.

    It waits while the end is held off.

    Taking the interpreter down takes seconds once torch is loaded, and no thread runs meanwhile.
    """
    if told.is_set() or expected.is_set():
        while _held.count:
            time.sleep(_POLL_S)
        with suppress(OSError):  # nobody may be reading
            sys.stdout.flush()
        os._exit(int(end.code or 0))


def _listen(pipe: int, answered: set[int]) -> None:
    """End the process after signals, of which Python writes a byte each into `pipe`."""
    numbers: list[int] = []  # of the signals so far
    deadline = 0.0
    while True:
        ready, _, _ = select.select([pipe], [], [], _POLL_S if numbers else None)
        if ready:
            signum = os.read(pipe, 1)[0]
            if signum in numbers:
                _end(signum)
            if signum in answered and not (signum == signal.SIGINT and expected.is_set()):
                deadline = deadline or time.monotonic() + GRACE_S
                numbers.append(signum)
        if numbers and not _held.count and time.monotonic() > deadline:
            _end(numbers[0])


def _end(signum: int) -> None:
    telling.acquire(timeout=GRACE_S)  # nobody may be reading what the command says
    if not told.is_set():
        with suppress(OSError):  # nobody may be reading
            (left.tell or _write)(signal.Signals(signum).name)
    acts = threading.Thread(target=_do_last_acts, daemon=True)
    acts.start()
    acts.join(_LAST_ACTS_S)
    os._exit(exit_code(signum))


def _write(reason: str) -> None:
    os.write(2, "\n".join([*farewell(reason), ""]).encode())


def _do_last_acts() -> None:
    for act in list(last_acts):
        act()
