"""The codec int8 of a point, with the statistics by which it standardises the point's rows.

The statistics are frozen before the point's first row is written. They are a record of their own,
created once, because they are known only when the model has run. From the record they come into
the array's Zarr metadata, which is all that a plain Zarr reader needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc
from numpy.typing import NDArray

from residual_saes.data.durable import Buffer
from residual_saes.data.errors import StoreError
from residual_saes.data.site import HookPoint, Point
from residual_saes.data.store import records, zarr_json
from residual_saes.data.store.arrays import rows_name
from residual_saes.data.store.codec import Codec, blosc, blosc_metadata, fit_key, unpack_blosc
from residual_saes.data.store.int8 import StandardizedInt8, squared_errors, standardisation
from residual_saes.data.store.kinds import ORDINARY, describe
from residual_saes.data.store.moments import Moments
from residual_saes.data.store.place import Place

_COMPRESSOR = blosc(Blosc.NOSHUFFLE)


@dataclass(frozen=True)
class Int8(Codec):
    """`int8`: zstd over rows that are standardised to one byte per element."""

    statistics: StandardizedInt8

    lossless = False
    compresses = True

    def chain(self) -> list[dict[str, Any]]:
        return [self.statistics.to_dict(), blosc_metadata("noshuffle", 1)]

    def pack(self, chunk: NDArray[Any]) -> Buffer:
        packed: Buffer = _COMPRESSOR.encode(self.statistics.encode_rows(chunk))
        return packed

    def unpack(self, body: NDArray[np.uint8], out: NDArray[Any]) -> None:
        encoded = np.empty(self.statistics.encoded_bytes(len(out)), np.uint8)
        unpack_blosc(_COMPRESSOR, body, encoded)
        self.statistics.decode_rows(encoded, out)

    def stored(self, chunk: NDArray[Any]) -> NDArray[Any]:
        return self.statistics.stored(chunk)

    def error(self, rows: NDArray[np.uint16], stored: NDArray[np.uint16]) -> NDArray[np.float64]:
        return squared_errors(rows, stored)


def exist(place: Place, point: Point) -> bool:
    """Whether a point's statistics are frozen."""
    return place.exists(fit_key(point))


def read(place: Place, point: Point) -> Int8:
    """A point's codec.

    Raises:
        StoreError: its statistics are damaged, or not there.
    """
    key = fit_key(point)
    try:
        data = place.read(key)
    except FileNotFoundError as error:
        raise StoreError(
            f"{place.name}/{key} is missing, without which no row of {HookPoint.of(point)} can be "
            f"decoded; `python -m harvest action=repair store={place.name}` writes it again from "
            "its copies"
        ) from error
    body = records.decode(data, f"{place.name}/{key}")
    return Int8(StandardizedInt8(body["mean"], body["deviation"]))


def freeze(place: Place, point: Point, rows: torch.Tensor, bos: torch.Tensor) -> None:
    """Take a point's statistics from the ordinary rows of a sample; the first to do so counts.

    Args:
        rows: (n, d) bfloat16.
        bos: (n,) which of them are BOS.

    Raises:
        StoreError: the sample has fewer than two ordinary rows.
    """
    described = describe(rows, bos, len(rows))
    ordinary = Moments(int(described.counts[ORDINARY]), *described.moments[ORDINARY])
    statistics = standardisation(ordinary).to_dict()["configuration"]
    place.create(fit_key(point), records.encode(statistics))


def restore(place: Place, point: Point) -> bool:
    """Write a point's statistics again from their copies in Zarr metadata; False if there are none.

    Zarr metadata has no checksum, so the copy of the array must equal that of the group.
    """
    found = zarr_json.Found(place)
    name = rows_name(point)
    try:
        of_array = _codec(json.loads(found.texts[zarr_json.key_of(name)]))
        if of_array != _codec(found.repeated[name]):
            return False
        statistics = StandardizedInt8.from_dict(of_array).to_dict()["configuration"]
    except (ValueError, KeyError, TypeError, IndexError):
        return False
    place.create(fit_key(point), records.encode(statistics))
    return True


def _codec(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The codec in the Zarr metadata of an array of rows."""
    return dict(rows["codecs"][0]["configuration"]["codecs"][0])
