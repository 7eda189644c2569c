"""Zarr v3 arrays that are cut along their first axis into units, one object on disk per unit.

An object is written once, whole, and read directly: a conforming Zarr file, but without any Zarr
library's copies. On one thread at width 2560 that is 3.9 times zarr-python's speed for writing
plain chunks and 2.8 for reading them, 1.7 and 1.9 for compressed ones (`python -m
tests.bench.store_speed`). Rows past the array's end are zeros inside a chunk and absent chunks
behind it, as the specification has it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from data.durable import Buffer
from data.errors import StoreError
from data.store.codec import CRC_BYTES, Codec
from data.store.place import LocalPlace, Place

if TYPE_CHECKING:
    from data.store.int8 import StandardizedInt8

# Bytes that `scatter` reads, checks and puts in their places at a time: in a core's 1 MB of
# second-level cache.
_SCATTER_BYTES = 128 * 5120
ABSENT = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_NATIVE = {
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
    "uint8": "|u1",
    "uint32": "<u4",
    "uint64": "<u8",
}


@dataclass(frozen=True)
class UnitArray:
    """One array: (length, *inner) elements, `unit` rows per object, `chunk` rows per inner chunk of
    a shard.
    """

    name: str
    data_type: str  # Zarr's name for it
    length: int  # rows
    inner: tuple[int, ...]  # shape of one row
    unit: int  # rows per object
    codec_name: Any
    chunk: int | None = None  # rows per inner chunk; None: the object is one plain chunk
    int8: StandardizedInt8 | None = None  # the statistics that the codec int8 needs

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_NATIVE[self.data_type])

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.codec_name, self.dtype.itemsize, self.int8)

    def key(self, unit: int) -> str:
        """The unit's object, relative to the store."""
        return f"{self.name}/c.{unit}" + ".0" * len(self.inner)

    def metadata(self) -> dict[str, Any]:
        """The array's zarr.json."""
        codecs = self.codec.metadata()
        if self.chunk is not None:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            sharding = {
                "chunk_shape": [self.chunk, *self.inner],
                "codecs": codecs,
                "index_codecs": index,
            }
            codecs = [
                {"name": "sharding_indexed", "configuration": {**sharding, "index_location": "end"}}
            ]
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

    def encode(
        self, rows: NDArray[Any], pool: ThreadPoolExecutor | None = None
    ) -> Iterator[Buffer]:
        """The bytes of one unit's object, in parts; `pool` compresses inner chunks side by side."""
        assert (
            rows.dtype == self.dtype and rows.shape[1:] == self.inner and 0 < len(rows) <= self.unit
        )
        encoded = (
            pool.map(self.codec.parts, self._chunks(rows))
            if pool
            else map(self.codec.parts, self._chunks(rows))
        )
        if self.chunk is None:
            for parts in encoded:
                yield from parts
            return
        index = np.full((self.unit // self.chunk, 2), ABSENT, "<u8")
        offset = 0
        for number, parts in enumerate(encoded):
            nbytes = sum(map(len, parts))
            index[number] = offset, nbytes
            offset += nbytes
            yield from parts
        table = index.tobytes()
        yield table + google_crc32c.value(table).to_bytes(CRC_BYTES, "little")

    def _chunks(self, rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
        step = self.chunk or self.unit
        return (_padded(rows[at : at + step], step) for at in range(0, len(rows), step))

    def stored(self, rows: NDArray[Any]) -> NDArray[Any]:
        """What reading will give back for one unit's rows: the same, from a codec that is
        lossless.
        """
        if self.codec.lossless:
            return rows
        return np.concatenate([self.codec.stored(chunk) for chunk in self._chunks(rows)])[
            : len(rows)
        ]

    def read(self, place: Place, unit: int, rows: int) -> NDArray[Any]:
        """All rows of one unit, of which there are `rows`.

        Raises:
            StoreError: the object is missing, cut, or does not match its checksum.
        """
        step = self.chunk or self.unit
        count = -(-rows // step)
        out = np.empty((count * step, *self.inner), self.dtype)
        if self.chunk is None:
            key = self.key(unit)
            with explained(place, key):
                self.codec.decode(place.read(key), out)
        else:
            with Shard(self, place, unit) as shard:
                for chunk in range(count):
                    shard.read(chunk, out[chunk * step : (chunk + 1) * step])
        return out[:rows]


@contextmanager
def explained(place: Place, key: str, part: str = "") -> Iterator[None]:
    """What goes wrong in reading an object, said with its name and the way out."""
    try:
        yield
    except (OSError, StoreError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StoreError(
            f"{place.name}/{key}{part} cannot be read: {reason}; `python -m harvest action=repair store={place.name}` "
            "drops damaged units, and harvesting again redoes them"
        ) from error


def _padded(rows: NDArray[Any], length: int) -> NDArray[Any]:
    if len(rows) == length:
        return np.ascontiguousarray(rows)
    padded = np.zeros((length, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


class Shard:
    """One shard, open for reading single inner chunks by its index."""

    def __init__(self, array: UnitArray, place: Place, unit: int) -> None:
        assert array.chunk is not None
        self._array, self._place, self._key = array, place, array.key(unit)
        with explained(place, self._key):
            self._blob = place.open(self._key)
            try:
                self._index = self._read_index(array.unit // array.chunk)
            except BaseException:
                self._blob.__exit__(None, None, None)
                raise

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self._blob.__exit__(None, None, None)

    def _read_index(self, chunks: int) -> NDArray[np.uint64]:
        nbytes = chunks * 16 + CRC_BYTES
        data = bytes(self._blob.read(max(self._blob.size - nbytes, 0), nbytes))
        table, crc = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
        if len(data) != nbytes or google_crc32c.value(table) != crc:
            raise StoreError(f"the shard's index is damaged or cut off ({self._blob.size} bytes)")
        return np.frombuffer(table, "<u8").reshape(chunks, 2)

    def read(self, chunk: int, out: NDArray[Any]) -> None:
        """Decode inner chunk number `chunk` into the C-contiguous `out` of a whole chunk's shape.

        Raises:
            StoreError: it is absent or damaged.
        """
        offset, nbytes = self._index[chunk]
        with explained(self._place, self._key, f", chunk {chunk},"):
            if offset == ABSENT:
                raise StoreError("it is absent")
            self._array.codec.decode(self._blob.read(int(offset), int(nbytes)), out)

    def scatter(
        self,
        chunk: int,
        places: NDArray[np.int64],
        out: NDArray[np.uint16],
        memory: threading.local,
    ) -> None:
        """Decode inner chunk number `chunk` and put its row i at out[places[i]].

        Args:
            memory: where a thread keeps what it decodes into.

        Raises:
            StoreError: it is absent or damaged; some rows may be there even so.
        """
        if self._array.codec_name == "none":
            self._scatter_plain(chunk, places, out)
            return
        if not hasattr(memory, "rows"):
            memory.rows = np.empty((len(places), out.shape[1]), np.uint16)
        self.read(chunk, memory.rows)
        out[places] = memory.rows

    def _scatter_plain(
        self, chunk: int, places: NDArray[np.int64], out: NDArray[np.uint16]
    ) -> None:
        """Block by block, so that what is read is still in the cache when it is checked and
        moved.
        """
        offset, nbytes = map(int, self._index[chunk])
        each = out.shape[1] * out.itemsize
        # A bucket is asked for the whole chunk: a request takes 20 ms.
        step = (
            max(1, _SCATTER_BYTES // each) if isinstance(self._place, LocalPlace) else len(places)
        )
        with explained(self._place, self._key, f", chunk {chunk},"):
            if offset == ABSENT:
                raise StoreError("it is absent")
            if nbytes != len(places) * each + CRC_BYTES:
                raise StoreError(
                    f"chunk of {nbytes - CRC_BYTES} bytes where {len(places) * each} belong"
                )
            crc = 0
            for at in range(0, len(places), step):
                there = places[at : at + step]
                last = at + step >= len(places)
                data = self._blob.read(offset + at * each, len(there) * each + last * CRC_BYTES)
                if len(data) != len(there) * each + last * CRC_BYTES:
                    raise StoreError("the file is cut off")
                rows = np.frombuffer(data, np.uint8, len(there) * each)
                crc = google_crc32c.extend(crc, rows)
                out[there] = rows.view(np.uint16).reshape(len(there), -1)
            if crc != int.from_bytes(data[-CRC_BYTES:], "little"):
                raise StoreError(
                    "crc32c does not match: the bytes on disk are not the ones that were written"
                )
