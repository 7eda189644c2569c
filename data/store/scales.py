"""The statistics by which a lossy codec standardises a layer, frozen before its first row is
written.

They are a record of their own, created once, because they are known only when the model has run;
from it they come into the array's Zarr metadata, which is all that a plain reader needs.
"""

from __future__ import annotations

import torch

from data.store import records
from data.store.int8 import StandardizedInt8, standardisation
from data.store.kinds import ORDINARY, describe
from data.store.moments import Moments
from data.store.place import Place


def exist(place: Place, layer: int) -> bool:
    """Whether a layer's statistics are frozen."""
    return place.exists(_key(layer))


def read(place: Place, layer: int) -> StandardizedInt8:
    """A layer's statistics."""
    key = _key(layer)
    body = records.decode(place.read(key), f"{place.name}/{key}")
    return StandardizedInt8(body["mean"], body["deviation"])


def freeze(place: Place, layer: int, rows: torch.Tensor, bos: torch.Tensor) -> None:
    """Take a layer's statistics from the ordinary rows of a sample, (n, d) bfloat16; the first to
    do so counts.
    """
    found = describe(rows, bos, len(rows))
    ordinary = Moments(int(found.counts[ORDINARY]), *found.moments[ORDINARY])
    place.create(_key(layer), records.encode(standardisation(ordinary).to_dict()["configuration"]))


def _key(layer: int) -> str:
    return f"commits/scales/{layer:05d}.json"
