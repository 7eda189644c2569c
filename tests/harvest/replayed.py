"""A harvest's writes, noted and then played again beside whoever reads the store.

A reader's every look at the store lets some writes happen. So each write falls between each two
looks in some play, and what threads meet by chance is met for certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from residual_saes.data import durable
from residual_saes.data.durable import Buffer, Written
from residual_saes.data.store.claims import Claims
from residual_saes.data.store.leases import Tag, Tagged
from residual_saes.data.store.place import Loaded, LocalPlace


class Step(NamedTuple):
    """One object as it appears; with None it goes."""

    key: str
    data: bytes | None


class Noted(LocalPlace):
    """A folder that notes what is written."""

    def __init__(self, path: Path, page: int | None = None) -> None:
        """`page`: as a bucket has it, so that packs are written."""
        super().__init__(path)
        self.page = page
        self.steps: list[Step] = []

    def write(self, key: str, parts: Iterable[Buffer]) -> Written:
        data = b"".join(map(bytes, parts))
        written = super().write(key, [data])
        self.steps.append(Step(key, data))
        return written

    def create(self, key: str, data: bytes) -> bool:
        created = super().create(key, data)
        if created:
            self.steps.append(Step(key, data))
        return created

    def delete(self, key: str) -> None:
        super().delete(key)
        self.steps.append(Step(key, None))


class Replayed:
    """A place in memory, where `pace` steps happen before every look.

    With `stale`, listings are those of the start: a service may show new names late, and old ones
    for long.
    """

    name = "replayed"
    threads = 1

    def __init__(
        self, steps: list[Step], start: int, pace: float, page: int | None, *, stale: bool = False
    ) -> None:
        self.page = page
        self.objects: dict[str, bytes] = {}
        self._steps = iter(steps)
        self._pace = pace
        self._due = 0.0
        self._happen(start)
        self._listed = list(self.objects) if stale else None

    def _happen(self, steps: float) -> None:
        self._due += steps
        while self._due >= 1:
            self._due -= 1
            step = next(self._steps, None)
            if step is not None and step.data is not None:
                self.objects[step.key] = step.data
            elif step is not None:
                self.objects.pop(step.key, None)

    def _keys(self) -> list[str]:
        self._happen(self._pace)
        return list(self.objects) if self._listed is None else self._listed

    def read(self, key: str) -> bytes:
        self._happen(self._pace)
        try:
            return self.objects[key]
        except KeyError:
            raise FileNotFoundError(2, "No such file or directory", key) from None

    def open(self, key: str, size: int | None = None) -> Loaded:
        return Loaded(self.read(key))

    def exists(self, key: str) -> bool:
        self._happen(self._pace)
        return key in self.objects

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        return map(self.read, keys)

    def names(self, folder: str, after: str = "") -> list[str]:
        found = [key.rpartition("/") for key in self._keys()]
        return [name for of, _, name in found if of == folder and name > after]

    def folders(self) -> list[str]:
        return sorted({key.partition("/")[0] for key in self._keys() if "/" in key})

    def sizes(self, folder: str) -> dict[str, int]:
        there = ((name, f"{folder}/{name}") for name in self.names(folder))
        return {name: len(self.objects[key]) for name, key in there if key in self.objects}

    def sizes_of_many(self, folders: Iterable[str]) -> Iterator[dict[str, int]]:
        return map(self.sizes, folders)

    def times(self, folder: str) -> list[float]:
        return [0.0 for _ in self.names(folder)]

    def digest(self, key: str) -> Written:
        data = self.read(key)
        return Written(len(data), durable.digest(data))

    def empty(self) -> bool:
        return not self.objects

    def free_bytes(self) -> None:
        return None

    # -- readers write nothing ---------------------------------------------------------------------

    def write(self, key: str, parts: Iterable[Buffer]) -> Written:
        raise AssertionError(key)

    def create(self, key: str, data: bytes) -> bool:
        raise AssertionError(key)

    def delete(self, key: str) -> None:
        raise AssertionError(key)

    def read_tagged(self, key: str) -> Tagged:
        return Tagged(self.read(key), Tag(None))

    def replace(self, key: str, data: bytes, tag: Tag) -> bool:
        raise AssertionError(key)

    def claims(self) -> Claims:
        raise AssertionError
