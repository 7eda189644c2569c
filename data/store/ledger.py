"""What the commit records of a store say, as arrays: 0.8 KB a unit and layer however large the
store.

The records are the truth; this is read from them and only ever grows, so that a process can follow
what others commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import StoreError
from data.store import records
from data.store.freed import Freed
from data.store.place import Place

SPINE, RESIDUALS = "commits/spine", "commits/residuals"
_SPINE_RECORD = re.compile(r"\d{8}\.json")
_RESIDUAL_RECORD = re.compile(r"(?P<unit>\d{8})\.(?P<layers>\d+(_\d+)*)\.json")


def spine_key(unit: int) -> str:
    """The record of a spine unit."""
    return f"{SPINE}/{unit:08d}.json"


def residual_key(unit: int, layers: Iterable[int]) -> str:
    """The record of one commit of residuals."""
    return f"{RESIDUALS}/{unit:08d}.{'_'.join(map(str, sorted(layers)))}.json"


def count_residuals(place: Place, layers: Iterable[int]) -> int:
    """How many units of `layers` have a record, summed over the layers, by the records' names
    alone.
    """
    asked = set(layers)
    matches = (_RESIDUAL_RECORD.fullmatch(name) for name in place.names(RESIDUALS))
    return sum(len(asked & {*map(int, match["layers"].split("_"))}) for match in matches if match)


@dataclass
class LayerLedger:
    """One layer's units."""

    committed: NDArray[np.bool_]  # (units,)
    chunks: NDArray[
        np.int32
    ]  # (units, C, 3) rows of each inner chunk that are BOS, OUTLIER, ORDINARY
    norm_sums: NDArray[np.float64]  # (units, 3) sums of their norms
    lost: NDArray[
        np.float64
    ]  # (units,) sum of squared errors of the ORDINARY rows, by a codec that loses something
    batch: NDArray[
        np.int32
    ]  # (units,) packed rows per forward pass, where it was not the manifest's; else 0

    @staticmethod
    def empty(units: int, chunks: int) -> LayerLedger:
        return LayerLedger(
            np.zeros(units, np.bool_),
            np.zeros((units, chunks, 3), np.int32),
            np.zeros((units, 3)),
            np.zeros(units),
            np.zeros(units, np.int32),
        )

    def note(self, unit: int, entry: Mapping[str, Any]) -> None:
        """Take in what a record says of this layer."""
        self.chunks[unit] = np.array(entry["chunks"], np.int32).reshape(self.chunks.shape[1:])
        self.norm_sums[unit] = entry["norm_sums"]
        self.lost[unit] = entry.get("lost", 0.0)
        self.batch[unit] = entry.get("batch", 0)
        self.committed[unit] = True


class Ledger:
    """All units of a store."""

    def __init__(self, place: Place, units: int, chunks: int) -> None:
        """Read every record, and check that what they name is there in full.

        Args:
            units: at most, as planned.
            chunks: inner chunks per unit.

        Raises:
            StoreError: a record is damaged, or an object is missing or cut.
        """
        self._place, self._shape = place, (units, chunks)
        self.freed = Freed(place)
        self.spine_rows = np.zeros(
            units, np.int32
        )  # (units,) packed rows of each committed spine unit; 0: none yet
        self.pieces = np.zeros(
            units, np.int64
        )  # (units,) pieces of documents in it: as many rows are BOS
        self.layers: dict[int, LayerLedger] = {}
        self._sizes: dict[str, dict[str, int]] | None = {}
        self.refresh()
        self._sizes = None  # what is committed from now on has been seen being written

    def refresh(self) -> None:
        """Take in the records that were not there the last time."""
        units = {
            name: self._unit(name)
            for name in self._place.names(SPINE)
            if _SPINE_RECORD.fullmatch(name)
        }
        fresh = sorted(name for name, unit in units.items() if not self.spine_rows[unit])
        for name, body in zip(fresh, self._read(SPINE, fresh), strict=True):
            self.note_spine(units[name], body)
        fresh = sorted(name for name in self._place.names(RESIDUALS) if self._is_news(name))
        for name, body in zip(fresh, self._read(RESIDUALS, fresh), strict=True):
            self.note_residuals(int(name[:8]), body)

    def _is_news(self, name: str) -> bool:
        if not (match := _RESIDUAL_RECORD.fullmatch(name)):
            return False
        unit, layers = self._unit(name), map(int, match["layers"].split("_"))
        return not all(
            layer in self.layers and self.layers[layer].committed[unit] for layer in layers
        )

    def _unit(self, name: str) -> int:
        unit = int(name[:8])
        if unit >= self._shape[0]:
            raise StoreError(
                f"{self._place.name} has a record of unit {unit}, and was planned with {self._shape[0]}"
            )
        return unit

    def _read(self, folder: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        keys = [f"{folder}/{name}" for name in names]
        for key, data in zip(keys, self._place.read_many(keys), strict=True):
            body = records.decode(data, f"{self._place.name}/{key}")
            if self._sizes is not None:
                for wrong in self._missing(body["objects"], self._sizes):
                    raise StoreError(
                        f"{self._place.name}/{wrong}; `python -m harvest action=repair store={self._place.name}` "
                        "drops its unit's record, and harvesting again redoes the unit"
                    )
            yield body

    def _missing(
        self, objects: Mapping[str, list[Any]], sizes: dict[str, dict[str, int]]
    ) -> Iterator[str]:
        for key, (size, _) in objects.items():
            folder, _, name = key.rpartition("/")
            if folder not in sizes:
                sizes[folder] = self._place.sizes(folder)
            found = sizes[folder].get(name)
            if found != size and not (found is None and key in self.freed):
                yield (
                    f"{key} is missing"
                    if found is None
                    else f"{key} has {found} bytes instead of {size}"
                )

    def note_spine(self, unit: int, body: Mapping[str, Any]) -> None:
        """Take in a spine record."""
        self.spine_rows[unit], self.pieces[unit] = body["rows"], body["pieces"]

    def note_residuals(self, unit: int, body: Mapping[str, Any]) -> None:
        """Take in a record of residuals."""
        for layer, entry in body["layers"].items():
            if int(layer) not in self.layers:
                # At once: threads that commit come here too.
                self.layers.setdefault(int(layer), LayerLedger.empty(*self._shape))
            self.layers[int(layer)].note(unit, entry)
