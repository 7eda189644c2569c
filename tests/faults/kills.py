"""Kills just before and just after every call that makes something last."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults.child import ask, in_child, outcome

CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")


def armed(at: int, body: Callable[[], object]) -> Callable[[], object]:
    """`body`, killed around one of its calls: 2n just before the n-th, 2n + 1 just after it."""

    def arm() -> None:
        calls = iter(range(10**9))
        for name in CALLS:
            setattr(os, name, _killer(getattr(os, name), calls, at))
        body()

    return arm


def _killer(call: Callable[..., Any], calls: Iterator[int], at: int) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        if 2 * number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args, **kwargs)
        finally:  # also after a call that failed, as unlinking what is not there
            if 2 * number + 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


def moments(body: Callable[[], object]) -> int:
    """At how many moments `armed` can kill `body`."""
    answer = ask(lambda: _counted(body))
    assert not answer.broken and not answer.refused, answer
    return 2 * int(answer.value)


def _counted(body: Callable[[], object]) -> int:
    calls = iter(range(10**9))
    for name in CALLS:
        setattr(os, name, _killer(getattr(os, name), calls, -1))
    body()
    return next(calls)


def killed(
    begin: Callable[[], object], work: Callable[[], object], stride: int = 1, threads: bool = False
) -> Iterator[int]:
    """Do `work` again and again, killed at every `stride`-th moment in turn; the moments.

    It ends once `work` ends undisturbed. An odd stride meets moments before and after calls.

    Args:
        begin: makes the folder what the work begins with, before each kill.
        threads: the work's threads overlap, so that the number of its calls changes from run to
            run. Three runs in a row must end then.
    """
    at = ended = 0
    while ended < (3 if threads else 1):
        begin()
        code = outcome(in_child(armed(at, work)))
        if code == -signal.SIGKILL:
            ended = 0
            yield at
        else:
            assert code == 0, f"the work itself ended with {code}"
            ended += 1
        at += stride


def kill_after(seconds: float, body: Callable[[], object]) -> int:
    """Start `body` in a child, kill it that much later; its outcome."""
    child = in_child(body)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return outcome(child)
