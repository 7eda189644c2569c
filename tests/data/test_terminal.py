"""What a person sees in a terminal of some width: on the screen of a terminal's model."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

import pytest

from residual_saes.data import stopping
from residual_saes.data.journal import (
    Progress,
    heartbeat,
    suggest,
    tell,
    tell_header,
    tell_stopped,
)

pyte = pytest.importorskip("pyte")
LINE = "step 12/20   variance explained 0.9312   3m07s left   12,345 tokens/s   loss 0.1877   層 21"


def resize(handle: int, columns: int) -> None:
    fcntl.ioctl(handle, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))


def on_screen(
    work: Callable[[], None], columns: int, keys: bytes = b"", **environment: str
) -> tuple[list[str], bytes]:
    """The lines on the screen of a terminal in which `work` was done, and all that it got."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads
        child, handle = pty.fork()
    if not child:
        try:
            resize(0, columns)
            os.environ.pop("NO_COLOR", None)
            os.environ.update({"TERM": "xterm", **environment})
            sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
            work()
        finally:
            os._exit(0)
    got = b""
    with suppress(OSError):  # Linux says so when the other end has gone
        while data := os.read(handle, 65_536):
            got += data
            if keys and b"12/20" in got:
                os.write(handle, keys)
                keys = b""
    os.waitpid(child, 0)
    os.close(handle)
    screen = pyte.Screen(columns, 30)
    pyte.ByteStream(screen).feed(got)
    return [line.rstrip() for line in screen.display if line.strip()], got


def working() -> None:
    with heartbeat("train: loading libraries"):
        pass
    tell_header({"model": "tiny", "run": "runs/a"})
    progress = Progress()
    progress.show(LINE, share=0.6)
    tell("warning: the rate is far from the rule")
    progress.show(LINE, share=0.6, last=True)
    suggest("")


@pytest.mark.parametrize("columns", [1, 30, 60, 80, 120])
def test_the_open_line_never_wraps_and_no_other_line_stays_behind_it(columns: int) -> None:
    *lines, open_line = on_screen(working, columns)[0]
    assert columns < 60 or lines[:2] == ["model  tiny", "run    runs/a"]
    assert columns < 60 or (lines[2].startswith("warning: ") and len(lines) == 3)
    assert columns < 30 or figures(open_line) >= {30: 0, 60: 2, 80: 3, 120: 6}[columns]


def figures(line: str) -> int:
    """How many of the figures of LINE are shown; each is whole, or the first alone is cut."""
    shown = re.sub(r"^ ?\d+%\|.*?\| |^ ?\d+%\| ", "", line)
    whole = shown.removesuffix("…").replace("層  ", "層 ").split("   ")
    if whole != LINE.split("   ")[: len(whole)]:
        assert shown.endswith("…") and LINE.startswith(shown[:-1])
        return 0
    assert (len(whole) < 6) == shown.endswith("…")
    return len(whole)


def test_a_window_that_is_made_narrower_gets_a_shorter_line() -> None:
    def resized() -> None:
        progress = Progress(interval_s=0.0)
        progress.show(LINE, share=0.5)
        resize(0, 50)
        progress.show(LINE, share=0.6, last=True)

    _, got = on_screen(resized, 120)
    last = got.decode().rsplit("\x1b[K", 1)[1].strip()
    assert len(last) <= 47 and figures(last) == 1


def test_ctrl_c_stands_on_a_line_of_its_own() -> None:
    def interrupted() -> None:
        stopping.left = stopping.Left("step 12 of 20 is saved", "python -m train run=a")
        ended = threading.Event()
        signal.signal(signal.SIGINT, lambda *_: ended.set())
        Progress().show(LINE, share=0.6)
        assert ended.wait(30)  # for the key
        tell_stopped("SIGINT")

    lines, _ = on_screen(interrupted, 80, keys=b"\x03")
    assert lines[0].startswith(" 60%|") and lines[1] == "^C"
    assert lines[2].startswith("stopped by SIGINT; step 12 of 20 is saved")
    assert lines[-1] == "    python -m train run=a"


@pytest.mark.parametrize(
    ("environment", "colours", "redraws"),
    [({}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
)
def test_colours_and_escapes_come_where_they_are_wanted(
    environment: dict[str, str], colours: bool, redraws: bool
) -> None:
    lines, got = on_screen(working, 80, **environment)
    assert (b"\x1b[33m" in got, b"\x1b[1m" in got) == (colours, colours)
    assert (b"\x1b[K" in got) == redraws
    assert "warning: the rate is far from the rule" in lines


def test_a_pipe_gets_whole_lines_alone(capfd: pytest.CaptureFixture[str]) -> None:
    tell("warning: x")
    Progress().show(LINE, share=0.5)
    assert capfd.readouterr().err == f"warning: x\n{LINE}\n"
