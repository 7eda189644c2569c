"""Waiting for what other processes have in hand, and saying so."""

from __future__ import annotations

import time

from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import tell

QUIET_S = 5.0  # of a wait that is not worth a line
AGAIN_S = 60.0  # between two lines about the same wait


def pause(seconds: float, stop: StopRequest) -> None:
    """Sleep; raise `Interrupted` soon after a signal."""
    end = time.monotonic() + seconds
    stop.check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        stop.check()


class Waiting:
    """One wait at a time, told in a line when it lasts, and again every minute."""

    def __init__(self, quiet_s: float = QUIET_S, again_s: float = AGAIN_S) -> None:
        self._quiet_s = quiet_s
        self._again_s = again_s
        self._what = ""
        self._due = 0.0  # time.monotonic() of the next line

    def on(self, what: str, why: str = "") -> None:
        """Still waiting for `what`; `why` is told behind it, and its changes begin no new wait."""
        now = time.monotonic()
        if what != self._what:
            self._what = what
            self._due = now + self._quiet_s
        elif now > self._due:
            self._due = now + self._again_s
            tell(f"waiting for {what}{why}")

    def over(self) -> None:
        """The wait is over."""
        self._what = ""
