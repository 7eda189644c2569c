"""A store in a bucket of S3 or a compatible service, of Google or of Azure, through obstore.

A put is atomic: if it fails half-way there is no object. Keys and secrets come from the environment
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, ...), never from settings.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Self, TypeVar

from residual_saes.data import durable
from residual_saes.data.durable import Buffer, Written
from residual_saes.data.errors import SettingError, caused, first_line
from residual_saes.data.store.claims import Claims
from residual_saes.data.store.leases import Leases, Tag, Tagged

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az")
# Small objects that are read at a time: a request takes some 20 ms, and there are 30,000 records.
_CONNECTIONS = 32
# Of each request, with growing pauses.
RETRIES = {"max_retries": 8, "retry_timeout": timedelta(minutes=3)}


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise the object store's errors as OSError, as a disk does."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = first_line(error)
        raise OSError(_errno(reason), reason) from error


def _errno(reason: str) -> int:
    """The number for a refusal: of rights or names EACCES, of what may pass ECONNABORTED.

    A listing's refusals have no class of their own, so the HTTP status in the text decides.
    """
    status = re.search(r"status code: (4\d\d)", reason)
    wrong = "redirect" in reason if status is None else int(status[1]) not in (408, 425, 429)
    return errno.EACCES if wrong else errno.ECONNABORTED


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Raise the object store's refusal to write `name` as StoreError."""
    try:
        with _as_os_error():
            yield
    except OSError as error:
        refusal = f"cannot write {name}: {error.strerror or first_line(error)}"
        way_out = "mend the rights or the bucket's name and run the same command again"
        raise caused(error, f"{refusal}; what was committed before is intact", way_out) from error


class ObjectPlace:
    """A bucket, or a prefix in one. It has no locks: processes share the units by leases."""

    page: int | None = 1000
    threads = _CONNECTIONS

    def __init__(self, url: str) -> None:
        """Open the bucket; nothing is sent yet.

        Raises:
            SettingError: obstore is not installed, or `url` is malformed.
        """
        try:
            import obstore
            import obstore.store
        except ImportError as error:
            raise SettingError(
                f"store={url} needs the package obstore; `pip install obstore`, or give a folder"
            ) from error
        self.name = url.rstrip("/")
        self._api = obstore
        # A server on loopback or in a cluster speaks http; its address says so.
        endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
        plain = endpoint.startswith("http://")
        try:
            self.store: Any = obstore.store.from_url(
                self.name, client_options={"allow_http": plain}, retry_config=RETRIES
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise SettingError(f"store={url} cannot be opened: {first_line(error)}") from error

    def read(self, key: str) -> bytes:
        with _as_os_error():
            return bytes(self._api.get(self.store, key).bytes())

    def open(self, key: str, size: int | None = None) -> _Object:
        with _as_os_error():
            return _Object(self, key, size or self._api.head(self.store, key)["size"])

    def range(self, key: str, offset: int, nbytes: int) -> bytes:
        """`nbytes` of an object from `offset` on."""
        with _as_os_error():
            return bytes(self._api.get_range(self.store, key, start=offset, length=nbytes))

    def exists(self, key: str) -> bool:
        try:
            self.open(key)
        except FileNotFoundError:
            return False
        return True

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        return _in_order(self.read, keys)

    def names(self, folder: str, after: str = "") -> list[str]:
        return [_name(entry) for entry in self._listed(folder, after)]

    def folders(self) -> list[str]:
        with _as_os_error():
            found = self._api.list_with_delimiter(self.store)
        return [str(path) for path in found["common_prefixes"]]

    def sizes(self, folder: str) -> dict[str, int]:
        return {_name(entry): entry["size"] for entry in self._listed(folder)}

    def sizes_of_many(self, folders: Iterable[str]) -> Iterator[dict[str, int]]:
        return _in_order(self.sizes, folders)

    def times(self, folder: str) -> list[float]:
        return [entry["last_modified"].timestamp() for entry in self._listed(folder)]

    def _listed(self, folder: str, after: str = "") -> list[Any]:
        """The objects directly in `folder` behind `after`, as obstore describes them."""
        objects = []
        offset = f"{folder}/{after}" if after else None
        with _as_os_error():
            for page in self._api.list(self.store, prefix=f"{folder}/", offset=offset):
                objects += [entry for entry in page if entry["path"].rpartition("/")[0] == folder]
        return objects

    def write(self, key: str, parts: Iterable[Buffer]) -> Written:
        data = b"".join(parts)
        with _refusals(f"{self.name}/{key}"):
            self._api.put(self.store, key, data)
        return Written(len(data), durable.digest(data))

    def create(self, key: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with _refusals(f"{self.name}/{key}"):
            try:
                self._api.put(self.store, key, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False  # a retried put sees its own object and returns False too
        return True

    def read_tagged(self, key: str) -> Tagged:
        with _as_os_error():
            answer = self._api.get(self.store, key)
            meta = answer.meta
            return Tagged(bytes(answer.bytes()), Tag(meta["e_tag"], meta["version"]))

    def replace(self, key: str, data: bytes, tag: Tag) -> bool:
        from obstore.exceptions import PreconditionError

        with _refusals(f"{self.name}/{key}"):
            try:
                mode = {name: part for name, part in tag._asdict().items() if part is not None}
                self._api.put(self.store, key, data, mode=mode, use_multipart=False)
            except (FileNotFoundError, PreconditionError):
                return False
        return True

    def delete(self, key: str) -> None:
        with _refusals(f"{self.name}/{key}"), suppress(FileNotFoundError):
            self._api.delete(self.store, key)

    def digest(self, key: str) -> Written:
        data = self.read(key)
        return Written(len(data), durable.digest(data))

    def empty(self) -> bool:
        with _as_os_error():
            return not any(page for page in self._api.list(self.store, chunk_size=1))

    def free_bytes(self) -> None:
        return None

    def claims(self) -> Claims:
        return Leases(self)


def _in_order(request: Callable[[str], T], keys: Iterable[str]) -> Iterator[T]:
    """The answers to many requests in their order; a few dozen are under way at a time."""
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="request") as pool:
        coming: deque[Future[T]] = deque()
        for key in keys:
            if len(coming) == 2 * _CONNECTIONS:
                yield coming.popleft().result()
            coming.append(pool.submit(request, key))
        while coming:
            yield coming.popleft().result()


def _name(entry: Mapping[str, Any]) -> str:
    """The last part of an object's key."""
    return str(entry["path"].rpartition("/")[2])


class _Object:
    """An object that is read by ranges."""

    def __init__(self, place: ObjectPlace, key: str, size: int) -> None:
        self.size = size
        self._place = place
        self._key = key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._place.range(self._key, offset, nbytes)
