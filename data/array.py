"""Zarr v3 arrays that are cut along their first axis into units, one object on disk per unit.

An object is written once, whole, and read directly: a conforming Zarr file, but without any Zarr library's
copies. On one thread at width 2560 that is 3.9 times zarr-python's speed for writing plain chunks and 2.8 for reading
them, 1.7 and 1.9 for compressed ones (`python -m tests.bench.store_speed`).
Rows past the array's end are zeros inside a chunk and absent chunks behind it, as the specification has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from data.codec import CRC_BYTES, Codec
from data.errors import StoreError

ABSENT = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_NATIVE = {"bfloat16": "<u2", "float32": "<f4", "float64": "<f8", "uint32": "<u4", "uint64": "<u8"}


@dataclass(frozen=True)
class UnitArray:
    """One array: (length, *inner) elements, `unit` rows per object, `chunk` rows per inner chunk of a shard."""

    name: str
    data_type: str  # Zarr's name for it
    length: int  # rows
    inner: tuple[int, ...]  # shape of one row
    unit: int  # rows per object
    codec_name: Any
    chunk: int | None = None  # rows per inner chunk; None: the object is one plain chunk

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_NATIVE[self.data_type])

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.codec_name, self.dtype.itemsize)

    @property
    def units(self) -> int:
        return -(-self.length // self.unit)

    def rows(self, unit: int) -> int:
        """Rows of the array that lie in `unit`."""
        return min(self.unit, self.length - unit * self.unit)

    def key(self, unit: int) -> str:
        """The unit's object, relative to the store."""
        return f"{self.name}/c.{unit}" + ".0" * len(self.inner)

    def metadata(self) -> dict[str, Any]:
        """The array's zarr.json."""
        codecs = self.codec.metadata()
        if self.chunk is not None:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            sharding = {"chunk_shape": [self.chunk, *self.inner], "codecs": codecs, "index_codecs": index}
            codecs = [{"name": "sharding_indexed", "configuration": {**sharding, "index_location": "end"}}]
        grid = {"name": "regular", "configuration": {"chunk_shape": [self.unit, *self.inner]}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.length, *self.inner],
            "data_type": self.data_type,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0 if self.dtype.kind == "f" or self.data_type == "bfloat16" else 0,
            "codecs": codecs,
            "attributes": {},
        }

    def encode(self, rows: NDArray[Any], pool: ThreadPoolExecutor | None = None) -> Iterator[bytes]:
        """The bytes of one unit's object, in parts; `pool` compresses inner chunks side by side."""
        assert rows.dtype == self.dtype and rows.shape[1:] == self.inner and 0 < len(rows) <= self.unit
        step = self.chunk or self.unit
        chunks = (_padded(rows[at : at + step], step) for at in range(0, len(rows), step))
        encoded = pool.map(self.codec.encode, chunks) if pool else map(self.codec.encode, chunks)
        if self.chunk is None:
            yield from encoded
            return
        index = np.full((self.unit // self.chunk, 2), ABSENT, "<u8")
        offset = 0
        for number, data in enumerate(encoded):
            index[number] = offset, len(data)
            offset += len(data)
            yield data
        table = index.tobytes()
        yield table + google_crc32c.value(table).to_bytes(CRC_BYTES, "little")

    def read(self, root: Path, unit: int) -> NDArray[Any]:
        """All rows of one unit.

        Raises:
            StoreError: the object is missing, cut, or does not match its checksum.
        """
        step = self.chunk or self.unit
        count = -(-self.rows(unit) // step)
        out = np.empty((count * step, *self.inner), self.dtype)
        if self.chunk is None:
            path = root / self.key(unit)
            try:
                self.codec.decode(path.read_bytes(), out)
            except (OSError, StoreError, RuntimeError, ValueError) as error:
                raise StoreError(f"{path} cannot be read: {error}; {_way_out(root)}") from error
        else:
            with Shard(self, root, unit) as shard:
                for chunk in range(count):
                    shard.read(chunk, out[chunk * step : (chunk + 1) * step])
        return out[: self.rows(unit)]


def _way_out(root: Path) -> str:
    return f"`python -m harvest action=repair store={root}` drops damaged units, and harvesting again redoes them"


def _padded(rows: NDArray[Any], length: int) -> NDArray[Any]:
    if len(rows) == length:
        return np.ascontiguousarray(rows)
    padded = np.zeros((length, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


class Shard:
    """One shard file, open for reading single inner chunks by its index."""

    def __init__(self, array: UnitArray, root: Path, unit: int) -> None:
        assert array.chunk is not None
        self._array = array
        self._path, self._root = root / array.key(unit), root
        try:
            self._file = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}; {_way_out(root)}") from error
        try:
            self._index = self._read_index(array.unit // array.chunk)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _read_index(self, chunks: int) -> NDArray[np.uint64]:
        nbytes = chunks * 16 + CRC_BYTES
        size = os.fstat(self._file).st_size
        data = os.pread(self._file, nbytes, max(size - nbytes, 0))
        table, crc = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
        if len(data) != nbytes or google_crc32c.value(table) != crc:
            raise StoreError(
                f"{self._path}: the shard's index is damaged or cut off ({size} bytes); {_way_out(self._root)}"
            )
        return np.frombuffer(table, "<u8").reshape(chunks, 2)

    def read(self, chunk: int, out: NDArray[Any]) -> None:
        """Decode inner chunk number `chunk` into the C-contiguous `out` of a whole chunk's shape."""
        offset, nbytes = self._index[chunk]
        if offset == ABSENT:
            raise StoreError(f"{self._path}: chunk {chunk} is absent")
        try:
            data = os.pread(self._file, int(nbytes), int(offset))
            self._array.codec.decode(data, out)
        except (OSError, StoreError, RuntimeError, ValueError) as error:
            raise StoreError(f"{self._path}, chunk {chunk}: {error}; {_way_out(self._root)}") from error
