"""A store in a bucket: S3 and what speaks its language, Google's and Azure's object stores, through
obstore.

A put is atomic there: an object that fails half-way is not there at all. Keys and secrets come from
the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, ...), never
from settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Self

import xxhash

from data import durable
from data.durable import Buffer, Written
from data.errors import SettingError, StoreError, first_line
from data.store.claims import Claims, NumberedClaims

SCHEMES = ("s3", "gs", "az")
_CONNECTIONS = (
    32  # small objects read at a time: a request takes some 20 ms, and records are 30,000
)
RETRIES = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=3),
}  # of each request, with growing pauses


@contextmanager
def _as_os_error() -> Iterator[None]:
    """The object store's refusals as OSError, which is what a disk raises."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(5, first_line(error)) from error


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    try:
        with _as_os_error():
            yield
    except OSError as error:
        raise StoreError(
            f"cannot write {name}: {error.strerror}; what was committed before is intact, so mend the connection or "
            "the rights and run the same command again"
        ) from error


class ObjectPlace:
    """A bucket, or a prefix in one. Ranks share units out by number: there are no locks."""

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
                f"store={url} needs the package obstore; `pip install 'residual-saes[objects]'`, or give a folder"
            ) from error
        self.name, self._api = url.rstrip("/"), obstore
        # A server on loopback or in a cluster speaks http; the user has said so by its address.
        plain = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith(
            "http://"
        )
        try:
            self.store: Any = obstore.store.from_url(
                self.name, client_options={"allow_http": plain}, retry_config=RETRIES
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise SettingError(f"store={url} cannot be opened: {first_line(error)}") from error

    def read(self, key: str) -> bytes:
        with _as_os_error():
            return bytes(self._api.get(self.store, key).bytes())

    def open(self, key: str) -> _Object:
        with _as_os_error():
            return _Object(self, key, self._api.head(self.store, key)["size"])

    def range(self, key: str, offset: int, nbytes: int) -> bytes:
        """Part of an object."""
        with _as_os_error():
            return bytes(self._api.get_range(self.store, key, start=offset, length=nbytes))

    def exists(self, key: str) -> bool:
        try:
            self.open(key)
        except FileNotFoundError:
            return False
        return True

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="read") as pool:
            yield from pool.map(self.read, keys)

    def names(self, folder: str) -> list[str]:
        return list(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        return {entry["path"].rpartition("/")[2]: entry["size"] for entry in self._listed(folder)}

    def times(self, folder: str) -> list[float]:
        return [entry["last_modified"].timestamp() for entry in self._listed(folder)]

    def _listed(self, folder: str) -> list[Any]:
        with _as_os_error():
            pages = self._api.list(self.store, prefix=f"{folder}/")
            return [
                entry
                for page in pages
                for entry in page
                if entry["path"].rpartition("/")[0] == folder
            ]

    def write(self, key: str, parts: Iterable[Buffer]) -> Written:
        state, held = xxhash.xxh3_128(), []
        for part in parts:
            state.update(part)
            held.append(part)
        data = b"".join(held)
        with _refusals(f"{self.name}/{key}"):
            self._api.put(self.store, key, data)
        return Written(len(data), state.hexdigest())

    def create(self, key: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with _refusals(f"{self.name}/{key}"):
            try:
                self._api.put(self.store, key, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False  # also to a put that is repeated because its answer was lost
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

    def room(self) -> None:
        return None

    def claims(self, rank: int, world: int) -> Claims:
        return NumberedClaims(rank, world)


class _Object:
    def __init__(self, place: ObjectPlace, key: str, size: int) -> None:
        self._place, self._key, self.size = place, key, size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._place.range(self._key, offset, nbytes)
