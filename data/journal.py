"""What a run tells while it works: one progress line, and metrics.jsonl.

metrics.jsonl is part of a run's state. A checkpoint stores the file's length, and a resumed run
cuts the file back to it. So a run that was killed leaves the same file as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from data.durable import refusals
from data.errors import StoreError, caused

Record = Mapping[str, Any]


class Metrics:
    """An append-only file of JSON lines. Floats keep all digits; NaN and infinity become null."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """Open `path`, cut to its first `keep_bytes` bytes; 0 begins the file anew."""
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise StoreError(
                f"{path} has {size} bytes where the checkpoint saw {keep_bytes}: it was cut by "
                "hand; restore it, or delete the run directory to start over"
            )
        self._path = path
        with refusals(path):
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)

    @classmethod
    def continued(cls, path: Path) -> Metrics:
        """Open `path` to append behind its last complete line."""
        keep_bytes = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        return cls(path, keep_bytes)

    def write(self, record: Record) -> None:
        """Append one line."""
        clean = dict(record)
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                clean[name] = None
        self._file.write(json.dumps(clean, separators=(",", ":")).encode() + b"\n")

    def sync(self) -> int:
        """Make every line durable; returns the file's length in bytes, for the checkpoint."""
        with refusals(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self.sync()
        self._file.close()


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


def tell(*lines: str) -> None:
    """Print lines to standard error."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """One line: redrawn on a terminal; elsewhere printed every `interval_s` seconds."""

    def __init__(
        self, stream: TextIO | None = None, interval_s: float = 5.0, quiet_s: float = 0.0
    ) -> None:
        """Nothing is shown yet.

        Args:
            interval_s: between two lines, off a terminal.
            quiet_s: nothing is shown before so many seconds: short work needs no line.
        """
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._interval_s = 0.2 if self._live else interval_s
        self._last = -math.inf
        self._quiet_until = time.monotonic() + quiet_s
        self._width = 0

    def show(self, text: str, *, last: bool = False) -> None:
        """Show `text` if the interval has passed, or if it is the `last` of its loop."""
        now = time.monotonic()
        if now < self._quiet_until or (not last and now - self._last < self._interval_s):
            return
        self._last = now
        if self._live:
            self._stream.write("\r" + text.ljust(self._width) + ("\n" if last else ""))
            self._width = 0 if last else len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line on a terminal, so that others can be printed behind it."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


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


def size(count: float) -> str:
    """Bytes for people, in powers of ten: 999 B, 1.45 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
