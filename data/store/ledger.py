"""What the records of a store say, as arrays: 0.8 KB a unit and layer, however large the store.

The records are the truth. A ledger is read from them and only ever grows, so that a process can
follow what others commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import StoreError
from data.store import records
from data.store.place import Place
from data.store.retention import Absences

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
    """How many units of `layers` have a record, summed over the layers; by the names alone."""
    asked = set(layers)
    count = 0
    for name in place.names(RESIDUALS):
        if match := _RESIDUAL_RECORD.fullmatch(name):
            count += len(asked.intersection(_layers(match)))
    return count


def _layers(match: re.Match[str]) -> list[int]:
    """The layers that a record of residuals names."""
    return [int(layer) for layer in match["layers"].split("_")]


@dataclass
class LayerLedger:
    """One layer's units."""

    committed: NDArray[np.bool_]  # (units,)
    # (units, C, 3) rows of each inner chunk that are BOS, OUTLIER, ORDINARY
    chunks: NDArray[np.int32]
    norm_sums: NDArray[np.float64]  # (units, 3) sums of the norms of those rows
    # (units,) sum of squared errors of the ORDINARY rows, from a lossy codec
    lost: NDArray[np.float64]
    # (units,) packed rows per forward pass where it was not the manifest's; else 0
    batch: NDArray[np.int32]

    @staticmethod
    def empty(units: int, chunks: int) -> LayerLedger:
        return LayerLedger(
            committed=np.zeros(units, np.bool_),
            chunks=np.zeros((units, chunks, 3), np.int32),
            norm_sums=np.zeros((units, 3)),
            lost=np.zeros(units),
            batch=np.zeros(units, np.int32),
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
        """Read every record, and check that every object that they name is there in full.

        Args:
            units: at most, as planned.
            chunks: inner chunks per unit.

        Raises:
            StoreError: a record is damaged, or an object is missing or cut.
        """
        self._place = place
        self._units = units
        self._chunks = chunks
        self.absences = Absences(place)
        self.spine_rows = np.zeros(units, np.int32)  # (units,) packed rows; 0: not committed
        self.pieces = np.zeros(units, np.int64)  # (units,) pieces of documents: as many BOS rows
        self.layers: dict[int, LayerLedger] = {}
        # Bytes of every object, by folder and name. None after the start: the objects of
        # later records are not checked.
        self._sizes: dict[str, dict[str, int]] | None = {}
        self.refresh()
        self._sizes = None

    def refresh(self) -> None:
        """Take in the records that were not there the last time."""
        for name, record in self._new(SPINE, self._is_new_spine):
            self.note_spine(_unit(name), record)
        for name, record in self._new(RESIDUALS, self._is_new_residuals):
            self.note_residuals(_unit(name), record)

    def _is_new_spine(self, name: str) -> bool:
        return bool(_SPINE_RECORD.fullmatch(name)) and not self.spine_rows[self._checked(name)]

    def _is_new_residuals(self, name: str) -> bool:
        match = _RESIDUAL_RECORD.fullmatch(name)
        if not match:
            return False
        unit = self._checked(name)
        for layer in _layers(match):
            if layer not in self.layers or not self.layers[layer].committed[unit]:
                return True
        return False

    def _checked(self, name: str) -> int:
        """The unit of a record; StoreError if the store cannot have it."""
        unit = _unit(name)
        if unit >= self._units:
            raise StoreError(
                f"{self._place.name} has a record of unit {unit}, and was planned with "
                f"{self._units}"
            )
        return unit

    def _new(
        self, folder: str, is_new: Callable[[str], bool]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """New records of a folder, in order of their names."""
        names = sorted(filter(is_new, self._place.names(folder)))
        keys = [f"{folder}/{name}" for name in names]
        for name, key, data in zip(names, keys, self._place.read_many(keys), strict=True):
            record = records.decode(data, f"{self._place.name}/{key}")
            self._require_objects(record)
            yield name, record

    def _require_objects(self, record: Mapping[str, Any]) -> None:
        """At the start, raise StoreError if an object of a record is missing or cut."""
        if self._sizes is None:
            return
        for key, (size, _) in record["objects"].items():
            folder, _, name = key.rpartition("/")
            if folder not in self._sizes:
                self._sizes[folder] = self._place.sizes(folder)
            present = self._sizes[folder].get(name)
            if present == size:
                continue
            if present is None and self.absences.allow(key, record["unit"]):
                continue
            wrong = "is missing" if present is None else f"has {present} bytes instead of {size}"
            raise StoreError(
                f"{self._place.name}/{key} {wrong}; `python -m harvest action=repair "
                f"store={self._place.name}` drops its unit's record, and harvesting again redoes "
                "the unit"
            )

    def note_spine(self, unit: int, record: Mapping[str, Any]) -> None:
        """Take in a spine record."""
        self.spine_rows[unit] = record["rows"]
        self.pieces[unit] = record["pieces"]

    def note_residuals(self, unit: int, record: Mapping[str, Any]) -> None:
        """Take in a record of residuals."""
        for layer, entry in record["layers"].items():
            if int(layer) not in self.layers:
                # `setdefault` is atomic: threads that commit come here too.
                self.layers.setdefault(int(layer), LayerLedger.empty(self._units, self._chunks))
            self.layers[int(layer)].note(unit, entry)


def _unit(name: str) -> int:
    """The unit of a record's name."""
    return int(name[:8])
