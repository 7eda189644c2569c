"""What a run tells while it works: one progress line, and metrics.jsonl.

metrics.jsonl is part of a run's state. A checkpoint stores the file's length and digest, and a
resumed run cuts the file back to it. So a run that was killed leaves the same file as one that was
not.
"""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from residual_saes.data import stopping, terminal
from residual_saes.data.durable import Written, refusals
from residual_saes.data.errors import StoreError, caused
from residual_saes.data.neutral import neutral
from residual_saes.data.secrets import redacted
from residual_saes.data.spelling import spelled

Record = Mapping[str, Any]


class Metrics:
    """An append-only file of JSON lines. Floats keep all digits; NaN and infinity become null."""

    def __init__(self, path: Path, keep_bytes: int = 0, xxh3_128: str = "") -> None:
        """Open `path`, cut to its first `keep_bytes` bytes; 0 begins the file anew.

        Args:
            xxh3_128: what those bytes must have; "": nobody knows.

        Raises:
            StoreError: they are not there, or not those.
        """
        way_out = "restore it, or delete the run directory to start over"
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise StoreError(
                f"{path} has {size} bytes where the checkpoint saw {keep_bytes}: it was cut by "
                f"hand; {way_out}"
            )
        self._path = path
        with refusals(path):
            # Without a buffer: what is in one when the disk refuses it would be tried again later.
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self._digest = xxhash.xxh3_128(path.read_bytes()[:keep_bytes])
            if xxh3_128 not in ("", self._digest.hexdigest()):
                self._file.close()
                got = f"{path} does not hold the {keep_bytes} bytes that the checkpoint saw"
                raise StoreError(f"{got}; {way_out}")
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)

    @classmethod
    def continued(cls, path: Path) -> Metrics:
        """Open `path` to append behind its last complete line."""
        keep_bytes = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        return cls(path, keep_bytes)

    def write(self, record: Record) -> None:
        """Append one line."""
        line = json.dumps(_finite(record), separators=(",", ":")).encode() + b"\n"
        self._digest.update(line)
        left = memoryview(line)
        with refusals(self._path):
            while left:
                left = left[self._file.write(left) :]

    def sync(self) -> Written:
        """Make every line durable; size and digest of the file as it was written."""
        with refusals(self._path):
            os.fsync(self._file.fileno())
            return Written(self._file.tell(), self._digest.hexdigest())

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()


def _finite(record: Record) -> dict[str, Any]:
    """The record with null for NaN and infinity, at any depth."""
    clean = dict(record)
    for name, value in record.items():
        if isinstance(value, Mapping):
            clean[name] = _finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            clean[name] = None
    return clean


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl; an incomplete last line is left out.

    Raises:
        StoreError: there is no complete line, or one is not JSON.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        got = f"{path} cannot be read: {error.strerror}"
        raise caused(error, got, "restore it") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise StoreError(f"{path} line {number} is not JSON; restore the file") from error
    if not records:
        raise StoreError(f"{path} holds no complete line; restore it")
    return records


def shown(text: str) -> str:
    """A line as people may see it: without secrets, it steers no terminal, commands as in use."""
    return spelled(neutral(redacted(text)))


def put(text: str, end: str = "\n") -> None:
    """Print to standard error. No line is worth the work: where a full disk refuses it, it is lost.

    Raises:
        BrokenPipeError: whoever reads has seen enough.
    """
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


class _Said:
    """What this process said last on standard error, and what it would say next."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.text = ""  # of the work at hand, printed or not
        self.since = 0.0  # when the work's text last changed
        self.printed = -math.inf  # when a line was last printed
        self.open = ""  # the line that is open on a terminal

    def note(self, text: str) -> None:
        if text != self.text:
            self.text = text
            self.since = time.monotonic()

    def print(self, text: str, name: int = 0) -> None:
        """Print a line of its own, in the place of an open one.

        Args:
            name: signs at its beginning that name the rest.
        """
        self.drop_line()
        line = shown(text)
        put(terminal.coloured(line[:name]) + line[name:] if name else terminal.painted(line))
        self.printed = time.monotonic()

    def draw(self, text: str, share: float | None = None) -> None:
        """On a terminal draw the open line again; elsewhere print one."""
        if not terminal.is_one():
            self.print(text)
            return
        self.open = terminal.fitted(shown(text), share)
        put(terminal.ERASE + self.open, end="")
        self.printed = time.monotonic()

    def end_line(self, echo: str = "") -> None:
        """End the line that is open on a terminal, so that others can be printed behind it.

        Args:
            echo: what the terminal has written behind it, such as ^C: it gets a line of its own.
        """
        if self.open:
            put((terminal.ERASE + self.open + "\n" + echo) if echo else "")
            self.open = ""
        elif echo and terminal.is_one():
            put("")

    def drop_line(self) -> None:
        """Take away the line that is open on a terminal."""
        if self.open:
            put(terminal.ERASE, end="")
            self.open = ""


_said = _Said()


def tell(*lines: str) -> None:
    """Print lines to standard error; the last one names the work at hand."""
    with _said.lock:
        for line in lines:
            _said.print(line)
            _said.note(line)


def aligned(rows: Mapping[str, str]) -> list[str]:
    """A line for each name and what it stands for, one under the other."""
    return [f"{name:<{_name_width(rows)}}{value}" for name, value in rows.items()]


def tell_header(rows: Mapping[str, str]) -> None:
    """Print what a command is about to do, as `aligned` has it."""
    width = _name_width(rows)
    room = terminal.columns() - width if terminal.is_one() else 0
    with _said.lock:
        for line in aligned(rows):
            first, *more = textwrap.wrap(line[width:], max(room, 20)) if room else [line[width:]]
            _said.print(line[:width] + first, width)
            for part in more:
                _said.print(" " * width + part)


def _name_width(rows: Mapping[str, str]) -> int:
    return max(map(len, rows)) + 2


def tell_stopped(reason: str) -> None:
    """Tell that a signal ends the command, what is kept, and how to go on; on lines of their own.

    It may be a second thread that tells so, while the main thread is in the middle of a line.
    """
    held = _said.lock.acquire(timeout=0.2)
    try:
        _said.end_line("^C" if reason == "SIGINT" else "")
        for line in stopping.farewell(reason):
            _said.print(line)
    finally:
        if held:
            _said.lock.release()


def show(*lines: str) -> None:
    """Print lines to standard output: what the command was asked for."""
    with _said.lock:
        _said.drop_line()
    for line in lines:
        print(shown(line), flush=True)


def suggest(command: str) -> None:
    """Tell the command that is useful next, from data/command_line.py; "": there is none."""
    if command:
        tell(f"next: {command}")


def note(text: str) -> None:
    """Name the work at hand. It is printed if it takes so long that nothing else is."""
    with _said.lock:
        _said.note(text)


@contextmanager
def heartbeat(text: str, interval_s: float = 4.0) -> Iterator[None]:
    """While open, no stretch is silent: the work at hand is told again every `interval_s` seconds.

    A product of large matrices, a library's load or a sort tells nothing by itself. A thread does.

    Args:
        text: the work at hand, until other work is told.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.5):
            with _said.lock:
                now = time.monotonic()
                if now - _said.printed >= interval_s and not stopping.expected.is_set():
                    _said.draw(f"{_said.text}, {duration(now - _said.since)}")

    with _said.lock:
        _said.note(text)
        _said.printed = time.monotonic()
        if terminal.is_one():  # where somebody waits
            _said.draw(text)
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        with _said.lock:
            _said.drop_line()


class Progress:
    """One line: redrawn on a terminal; elsewhere printed every `interval_s` seconds."""

    def __init__(self, interval_s: float = 4.0, quiet_s: float = 0.0) -> None:
        """Nothing is shown yet.

        Args:
            interval_s: between two lines, off a terminal.
            quiet_s: nothing is shown before so many seconds: short work needs no line.
        """
        self._interval_s = 0.2 if terminal.is_one() else interval_s
        self._shown = False
        self._quiet_until = time.monotonic() + quiet_s

    def show(self, text: str, *, share: float | None = None, last: bool = False) -> None:
        """Show `text` if the interval has passed, or if it is the `last` of its loop.

        Args:
            text: figures that three spaces part; a narrow terminal leaves out the last ones.
            share: of the work that is done; a terminal shows it as a bar.
        """
        now = time.monotonic()
        if now < self._quiet_until:
            return
        with _said.lock:
            _said.note(text)
            if last or not self._shown or now - _said.printed >= self._interval_s:
                _said.draw(text, share)
                self._shown = True
            if last:
                _said.end_line()

    def close(self) -> None:
        """End the line on a terminal, so that others can be printed behind it."""
        with _said.lock:
            _said.end_line()


def duration(seconds: float) -> str:
    """A span of time for people: 48s, 3m07s, 5h02m, 11d14h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 100 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def figure(value: float | None, width: int = 0) -> str:
    """Four significant digits: 0.9382, 12.30, 1.200e-05; `-` for what is no number."""
    is_number = value is not None and math.isfinite(value)
    return (f"{value:#.4g}".rstrip(".") if is_number else "-").rjust(width)


def size(count: float) -> str:
    """Bytes for people, in powers of ten: 999 B, 1.45 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
