"""Where a store's objects lie: a folder, or a bucket of an object store.

Every place promises two things. An object appears whole or not at all, and is durable from then on.
Of several processes that `create` one object, exactly one succeeds. Nothing else is assumed: no
order of listings, no clock. Keys are relative and separated by slashes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, Self

from residual_saes.data import durable
from residual_saes.data.durable import Buffer, Written
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import tell
from residual_saes.data.secrets import BELONG, kind_in_url
from residual_saes.data.store.claims import Claims, FileClaims, NoLocksError
from residual_saes.data.store.leases import Leases, Objects, Tag, Tagged

CLAIMS = "commits/claims"  # in a folder


class Blob(Protocol):
    """One object, open for reading parts of it."""

    size: int  # bytes

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self, offset: int, nbytes: int) -> Buffer:
        """`nbytes` from `offset` on; fewer at the end of the object."""
        ...


class Place(Objects, Protocol):
    """A root of objects.

    Methods that read raise OSError, methods that write StoreError, where the medium refuses.
    """

    name: str  # as the user gave it
    page: int | None  # names that one request lists; None: a listing is no request
    threads: int  # that read side by side at its full speed

    def read(self, key: str) -> bytes:
        """The bytes of an object; FileNotFoundError if there is none."""
        ...

    def open(self, key: str, size: int | None = None) -> Blob:
        """An object to read parts of; FileNotFoundError if there is none.

        Args:
            size: its bytes, if they are known; an object that is not there is then noticed later.
        """
        ...

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        ...

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        """The bytes of several objects, in the order of `keys`."""
        ...

    def names(self, folder: str, after: str = "") -> list[str]:
        """Names of the finished objects directly in `folder`, of those that come after `after`."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders directly under the root."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every finished object directly in `folder`, by name."""
        ...

    def sizes_of_many(self, folders: Iterable[str]) -> Iterator[dict[str, int]]:
        """The same of several folders, in their order."""
        ...

    def times(self, folder: str) -> list[float]:
        """When each object in `folder` was written, in seconds; for show, never for order."""
        ...

    def write(self, key: str, parts: Iterable[Buffer]) -> Written:
        """Write an object durably and all at once; replaces what is there."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, durably; nothing if there is none."""
        ...

    def digest(self, key: str) -> Written:
        """Size and digest of an object as it is now; FileNotFoundError if there is none."""
        ...

    def empty(self) -> bool:
        """Whether there is no object."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that are free; None if they are unbounded or unknown."""
        ...

    def claims(self) -> Claims:
        """The claims of this process; close them."""
        ...


def place_of(where: str | Path | Place) -> Place:
    """The place that a path or URL names.

    Raises:
        SettingError: the URL's kind is unknown, or needs a package that is not installed; or the
            URL holds more than a place: a user, a key, a query.
    """
    if isinstance(where, Path):
        return LocalPlace(where)
    if not isinstance(where, str):
        return where
    if kind := kind_in_url(where):
        raise SettingError(f"store= holds {kind}; {BELONG}")
    scheme, separator, _ = where.partition("://")
    if not separator:
        return LocalPlace(Path(where))
    if scheme == "file":
        return LocalPlace(Path(where.removeprefix("file://")))
    from residual_saes.data.store.bucket import SCHEMES, ObjectPlace

    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SettingError(
            f"store={where} is of an unknown kind; give a folder, or a URL of {known}"
        )
    return ObjectPlace(where)


class LocalPlace:
    """A folder."""

    page: int | None = None
    # 16 decode 16 GB/s of blosc. Where training shares the cores it pauses about 1 s per window.
    threads = min(16, os.cpu_count() or 1)

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read(0, file.size)

    def open(self, key: str, size: int | None = None) -> _File:
        # Joined as text: opening a store of a billion tokens reads 30,000 records, and pathlib took
        # half of the time.
        try:
            return _File(f"{self.name}/{key}")
        except NotADirectoryError as error:  # a file where the store would be
            raise FileNotFoundError(error.errno, error.strerror) from error

    def exists(self, key: str) -> bool:
        return (self.path / key).exists()

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        return map(self.read, keys)

    def names(self, folder: str, after: str = "") -> list[str]:
        try:
            names = os.listdir(self.path / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [name for name in names if name > after and not name.startswith(".")]

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        return {name: status.st_size for name, status in self._listed(folder)}

    def sizes_of_many(self, folders: Iterable[str]) -> Iterator[dict[str, int]]:
        return map(self.sizes, folders)

    def times(self, folder: str) -> list[float]:
        return [status.st_mtime for _, status in self._listed(folder)]

    def _listed(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """Names and status of the finished files directly in `folder`."""
        try:
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        yield entry.name, entry.stat()
        except (FileNotFoundError, NotADirectoryError):
            return

    def write(self, key: str, parts: Iterable[Buffer]) -> Written:
        path = self.path / key
        durable.make_directory(path.parent)
        return durable.write(path, parts)

    def create(self, key: str, data: bytes) -> bool:
        path = self.path / key
        durable.make_directory(path.parent)
        return durable.create(path, data)

    def read_tagged(self, key: str) -> Tagged:
        data = self.read(key)
        return Tagged(data, Tag(durable.digest(data)))

    def replace(self, key: str, data: bytes, tag: Tag) -> bool:
        # Another process may write between the two steps. Leases alone come here, and two processes
        # with one lease do the same work twice.
        try:
            is_same = self.read_tagged(key).tag == tag
        except FileNotFoundError:
            return False
        if is_same:
            self.write(key, [data])
        return is_same

    def delete(self, key: str) -> None:
        path = self.path / key
        path.unlink(missing_ok=True)
        if path.parent.exists():
            durable.sync_directory(path.parent)

    def digest(self, key: str) -> Written:
        return durable.digest_file(self.path / key)

    def empty(self) -> bool:
        if self.path.exists() and not self.path.is_dir():
            return False
        for file in self.path.rglob("*"):
            is_ours = durable.is_temporary(file) or file == self.path / CLAIMS
            if not file.is_dir() and not is_ours:
                return False
        return True

    def free_bytes(self) -> int | None:
        folder = self.path.absolute()
        while not folder.exists():  # the store is still to be made
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def claims(self) -> Claims:
        try:
            return FileClaims(self.path / CLAIMS, self.path)
        except NoLocksError as error:
            tell(f"{error}: processes lease the units, as in a bucket")
            return Leases(self)


class Loaded:
    """An object whose bytes are in memory."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, offset: int, nbytes: int) -> memoryview:
        return self._data[offset : offset + nbytes]


class _File:
    """A file that is read by position, so that threads can share it."""

    def __init__(self, path: str) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._handle).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def read(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._handle, nbytes, offset)
