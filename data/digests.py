"""digests.json: the size and xxh3_128 of every file in a folder, so that no damage goes unnoticed.

It is a self-checksummed record (data/store/records.py), written durably after the files that it
names:

    {"checksum": ..., "about": {...}, "files": {"sae_final.pt": [bytes, xxh3_128], ...}}

An export's or a release's is written before them (train/export/bundle.py says why).

A file counts as finished only once it is named there. So what was killed between two files is not
taken for whole, and a bit that flips later is found by whoever reads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.data import durable
from residual_saes.data.durable import Written
from residual_saes.data.errors import StoreError, TemporaryError, caused
from residual_saes.data.foreign import reading
from residual_saes.data.journal import tell
from residual_saes.data.store import records

FILE = "digests.json"


class Digests(NamedTuple):
    """What the files of a folder must hold."""

    folder: Path
    files: dict[str, Written]  # by path in the folder, with /
    about: dict[str, Any]  # what the files follow from, as their writer said it

    def path(self, name: str) -> Path:
        """Where a file is; records in a hidden folder name files beside that folder with `..`."""
        folder = self.folder
        while name.startswith("../"):  # by name, so that a linked folder leads to the link's place
            folder, name = folder.parent, name[3:]
        return folder / name

    def fault(self, name: str, progress: Callable[[int], None] | None = None) -> str | None:
        """What is wrong with a file, as words behind its name; None if nothing is.

        Args:
            progress: called with the bytes that were read so far.
        """
        if name not in self.files:
            return f"is not named in {FILE}: its writing did not come to its end"
        path = self.path(name)
        try:
            if path.exists() and not path.is_file():
                return "is no regular file"
            if durable.digest_file(path, progress=progress) == self.files[name]:
                return None
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return "is missing"
        except OSError as error:
            raise caused(error, f"{path} cannot be read: {error.strerror}", "restore it") from error
        return f"does not hold the bytes that {FILE} records"

    def content(self, name: str, way_out: str) -> bytes:
        """The bytes of a file, which are checked as they were read.

        Raises:
            StoreError: they are not the recorded ones.
        """
        path = self.path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            got = f"{path} cannot be read: {error.strerror}"
            raise caused(error, got, way_out) from error
        if Written(len(data), durable.digest(data)) != self.files.get(name):
            raise StoreError(f"{path} does not hold the bytes that {FILE} records; {way_out}")
        return data

    def faults(self, names: Iterable[str] | None = None) -> Iterator[str]:
        """A line for each of the `names`, by default of all files, that is not whole."""
        for name in sorted(self.files) if names is None else names:
            if wrong := self.fault(name):
                yield f"{self.path(name)} {wrong}"

    def require(self, names: Iterable[str] | None, way_out: str) -> None:
        """Raise StoreError with the first line of `faults` and `way_out`, if there is one."""
        for line in self.faults(names):
            raise StoreError(f"{line}; {way_out}")


def write(folder: Path, names: Iterable[str], about: Mapping[str, Any] | None = None) -> Digests:
    """Record the files `names` (paths in `folder`) as they are on the disk now, durably.

    It replaces the record that was there, so files that are not named no longer count.

    Args:
        about: what the files follow from; plain JSON.

    Raises:
        StoreError: a file cannot be read, or the disk refused the record.
    """
    files = {}
    for name in sorted(names):
        try:
            files[name] = durable.digest_file(folder / name)
        except OSError as error:
            got = f"{folder / name} cannot be read: {error.strerror}"
            raise caused(error, got, "restore it") from error
    return put(folder, files, about)


def put(
    folder: Path, files: Mapping[str, Written], about: Mapping[str, Any] | None = None
) -> Digests:
    """As `write`, of files whose digests are known from their writing."""
    body = {"about": dict(about or {}), "files": {name: list(files[name]) for name in files}}
    durable.write(folder / FILE, [records.encode(body)])
    return Digests(folder, dict(files), body["about"])


def read(folder: Path, way_out: str) -> Digests | None:
    """The record of `folder`; None if there is none.

    Args:
        way_out: what the user can do if the record itself is damaged.

    Raises:
        StoreError: the record is damaged or cannot be read.
    """
    path = folder / FILE
    if path.exists() and not path.is_file():  # a pipe's reading may not end
        raise StoreError(f"{path} is no regular file; {way_out}")
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise caused(error, f"{path} cannot be read: {error.strerror}", way_out) from error
    if wrong := records.fault(data):
        raise StoreError(f"{path} {wrong}; {way_out}")
    with reading(str(path), way_out):
        body = records.decode(data, str(path))
        files = {name: Written(*written) for name, written in body["files"].items()}
        return Digests(folder, files, dict(body["about"]))


def sound(folder: Path, way_out: str) -> Digests | None:
    """As `read`; but a damaged record is told in one line, and is none."""
    try:
        return read(folder, way_out)
    except TemporaryError:
        raise
    except StoreError as error:
        tell(str(error))
        return None
