"""Intermediate results that several studies use: RUN/studies/kept/NAME-DIGEST, a folder each.

DIGEST is of everything that the files follow from, with the version of the code that makes them.
The folder's digests.json, written last, says that it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_saes.analyze.results import FOLDER, digest_of, seal
from residual_saes.data import digests, locks, sealed
from residual_saes.data.digests import Digests
from residual_saes.data.durable import Written
from residual_saes.data.errors import StoreError
from residual_saes.data.journal import tell

_KEPT = "kept"  # beside the studies' folders
_AGAIN = "its files are made again"


def folder_of(run: Path, name: str, key: Mapping[str, Any]) -> Path:
    """RUN/studies/kept/NAME-DIGEST, of intermediate results that follow from `key`."""
    return run / FOLDER / _KEPT / f"{name}-{digest_of(key)}"


def filled(folder: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder, whose files are whole; filled once.

    Args:
        make: fills the folder. After a stop it finds there what it had written, and goes on.

    Raises:
        TemporaryError: another process fills it.
    """
    if _is_as_recorded(folder):  # then several processes may read it at a time
        return folder
    with locks.locked(folder, f"{folder} is being made by another process; wait, or stop it"):
        if not _is_whole(folder):
            (folder / digests.FILE).unlink(missing_ok=True)
            make(folder)
            seal(folder, {"key": key})
    return folder


def _is_as_recorded(folder: Path) -> bool:
    """Whether the folder is recorded and every file whole; nothing is told or removed."""
    try:
        recorded = digests.read(folder, _AGAIN)
    except StoreError:
        return False
    if recorded is None:
        return False
    return not any(map(recorded.fault, recorded.files))


def _is_whole(folder: Path) -> bool:
    """Whether the folder is recorded and every file whole; what is damaged is told and removed."""
    recorded = digests.sound(folder, _AGAIN)
    if recorded is None:
        return False
    whole = True
    for name in recorded.files:
        if wrong := recorded.fault(name):
            tell(f"{folder / name} {wrong}; it is made again")
            (folder / name).unlink(missing_ok=True)
            whole = False
    return whole


@dataclass
class Growing:
    """A folder to which whole files are added; each counts once it is recorded."""

    recorded: Digests

    @classmethod
    def open(cls, folder: Path) -> Growing:
        """The folder with the files that its record names; none if it is missing or damaged."""
        return cls(digests.sound(folder, _AGAIN) or Digests(folder, {}, {}))

    def has(self, name: str) -> bool:
        """Whether a file is there; a line says if it is damaged."""
        if name not in self.recorded.files:
            return False
        if wrong := self.recorded.fault(name):
            tell(f"{self.recorded.folder / name} {wrong}; it is made again")
            return False
        return True

    def add(self, name: str, written: Written) -> None:
        """Record a file that is on the disk, durably."""
        files = {**self.recorded.files, name: written}
        self.recorded = digests.put(self.recorded.folder, files, self.recorded.about)


# -- files of lines --------------------------------------------------------------------------------


def grow(
    path: Path, total: int, step: int, make: Callable[[slice], Sequence[Mapping[str, Any]]]
) -> None:
    """Bring a file of JSON lines to `total` lines, `step` at a time, from wherever it stands.

    Args:
        make: the lines in a slice; the file is durable after each call.
    """
    lines = _lines(sealed.read(path) or b"")
    for start in range(len(lines), total, step):
        lines += make(slice(start, start + step))
        sealed.write(path, ["".join(json.dumps(line) + "\n" for line in lines).encode()])


def read_lines(path: Path) -> list[Any]:
    """The values in a file of JSON lines.

    Raises:
        StoreError: it is damaged, or there is none.
    """
    content = sealed.read(path)
    if content is None:
        raise StoreError(f"{path} is not whole; the same command makes it again")
    return _lines(content)


def _lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]
