"""What the records of a store say, as arrays: 0.8 KB a unit and point, however large the store.

The records are the truth. A ledger is read from them, or from their copies in packs
(data/store/packs.py), and only ever grows, so that a process can follow what others commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.data.errors import SettingError, StoreError, TemporaryError
from residual_saes.data.site import RESID_POST, SITES, HookPoint, Point
from residual_saes.data.store import packs, records
from residual_saes.data.store.arrays import points_of, rows_key, rows_name
from residual_saes.data.store.packs import Content, Pack
from residual_saes.data.store.place import Place
from residual_saes.data.store.retention import Absences

SPINE, RESIDUALS = "commits/spine", "commits/residuals"
_SPINE_RECORD = re.compile(r"(?P<unit>\d{8})\.json")
_RESIDUAL_RECORD = re.compile(r"(?P<unit>\d{8})\.(?P<points>[0-9a-z_.-]+)\.json", re.ASCII)
# Of one site in the name of a record: layers of resid_post as 21_27, of others as mlp_in_0-41_50.
_RANGE = r"\d{1,5}(?:-\d{1,5})?"
_OF_SITE = re.compile(rf"(?:(?P<site>[a-z_]+)_)?(?P<layers>{_RANGE}(?:_{_RANGE})*)", re.ASCII)
_LONGEST_KIND = 200  # bytes; file systems allow names of 255

_AT_A_TIME = 32  # records of the spine that a look asks for at a time
_LISTINGS = 8  # of a folder whose records go while they are read


def spine_key(unit: int) -> str:
    """The record of a spine unit."""
    return f"{SPINE}/{unit:08d}.json"


def residual_key(unit: int, points: Iterable[Point]) -> str:
    """The record of one commit of residuals."""
    return f"{RESIDUALS}/{unit:08d}.{kind_of(points)}.json"


def kind_of(points: Iterable[Point]) -> str:
    """What the name of a record, or of a pack of records, says of its points.

    The layers of resid_post come first, as in `21_27`. Behind a dot comes each other site with its
    layers, three or more in a row as a range: `21_27.mlp_in_0-41`.

    Raises:
        SettingError: the name would be too long.
    """
    by_site: dict[str, list[int]] = {}
    for point in sorted(set(map(HookPoint.of, points))):
        by_site.setdefault(point.site, []).append(point.layer)
    parts = []
    if RESID_POST in by_site:
        parts.append("_".join(map(str, by_site.pop(RESID_POST))))
    for site, layers in sorted(by_site.items()):
        parts.append(f"{site}_{'_'.join(_ranges(layers))}")
    kind = ".".join(parts)
    if len(kind) > _LONGEST_KIND:
        raise SettingError(
            f"{kind[:40]}... names too many hook points to be harvested at once; harvest some "
            "layers or sites now, and the others into the same store= later"
        )
    return kind


def _ranges(layers: Sequence[int]) -> list[str]:
    """Ascending layers as text: three or more in a row as `first-last`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts: list[str] = []
    for run in runs:
        texts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    return texts


def count_residuals(place: Place, points: Iterable[Point]) -> int:
    """How many units of `points` have a record, summed over the points; by the names alone."""
    asked = set(map(HookPoint.of, points))
    count = 0
    for name in place.names(RESIDUALS):
        if match := _RESIDUAL_RECORD.fullmatch(name):
            count += len(asked.intersection(_points(match["points"])))
    return count


@cache
def _points(kind: str) -> tuple[HookPoint, ...]:
    """The points that a record's name names; none if it is no record's name."""
    points: list[HookPoint] = []
    for part in kind.split("."):
        match = _OF_SITE.fullmatch(part)
        site = match and (match["site"] or RESID_POST)
        if match is None or site not in SITES:
            return ()
        for run in match["layers"].split("_"):
            first, _, last = run.partition("-")
            points += [
                HookPoint(layer, site) for layer in range(int(first), int(last or first) + 1)
            ]
    return tuple(points)


@dataclass
class PointLedger:
    """One point's units."""

    named: NDArray[np.bool_]  # (units,) whose record is there
    committed: NDArray[np.bool_]  # (units,) whose record is taken in; the others' entries are zeros
    # (units, C, 3) rows of each inner chunk that are BOS, OUTLIER, ORDINARY
    chunks: NDArray[np.int32]
    norm_sums: NDArray[np.float64]  # (units, 3) sums of the norms of those rows
    # (units,) sum of squared errors of the ORDINARY rows, from a lossy codec
    lost: NDArray[np.float64]
    # (units,) packed rows per forward pass where it was not the manifest's; else 0
    batch: NDArray[np.int32]
    nbytes: NDArray[np.int64]  # (units,) of the object that holds the rows

    @staticmethod
    def empty(units: int, chunks: int) -> PointLedger:
        return PointLedger(
            named=np.zeros(units, np.bool_),
            committed=np.zeros(units, np.bool_),
            chunks=np.zeros((units, chunks, 3), np.int32),
            norm_sums=np.zeros((units, 3)),
            lost=np.zeros(units),
            batch=np.zeros(units, np.int32),
            nbytes=np.zeros(units, np.int64),
        )

    def note(self, unit: int, entry: Mapping[str, Any], nbytes: int) -> None:
        """Take in what a record says of this point."""
        self.chunks[unit] = np.array(entry["chunks"], np.int32).reshape(self.chunks.shape[1:])
        self.norm_sums[unit] = entry["norm_sums"]
        self.lost[unit] = entry.get("lost", 0.0)
        self.batch[unit] = entry.get("batch", 0)
        self.nbytes[unit] = nbytes
        self.committed[unit] = True
        self.named[unit] = True


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
        self.points: dict[HookPoint, PointLedger] = {}
        # (units,) which residuals were committed together, by the points of their records' names.
        self._kinds: dict[str, NDArray[np.bool_]] = {}
        self._packs: set[Pack] = set()  # that were read
        # Bytes of every object, by folder and name. None after the start: the objects of
        # later records are not checked.
        sizes: dict[str, dict[str, int]] = {}
        self._sizes: dict[str, dict[str, int]] | None = sizes
        self.refresh(units)
        self._sizes = None
        # Bytes of the objects of each array, as they were at the start.
        self.nbytes = {folder: sum(of_folder.values()) for folder, of_folder in sizes.items()}

    # -- following what is committed ---------------------------------------------------------------

    def refresh(self, units: int) -> None:
        """Take in the records that were not there the last time.

        Args:
            units: of the store, as far as is known.
        """
        # Many at a time, where they are packed.
        chosen = [pack for pack in packs.fullest(self._place) if self._may_give(pack, units)]
        self._packs.update(chosen)
        for pack, lines in packs.read(self._place, chosen):
            for line in lines:
                self._note(records.decode(line, f"{self._place.name}/{pack.key}"))

        # The others one by one, from the first unit on that no pack gave. The spine's come last: a
        # unit's residuals are committed behind its spine, so they are never known without it.
        first = self._first_unknown(units)
        if first < units:
            self._read(RESIDUALS, first, self._is_new_residuals)
        first = _first_missing([self.spine_rows[:units]])
        if first < units:
            self._read(SPINE, first, self._is_new_spine)

    def _may_give(self, pack: Pack, units: int) -> bool:
        """Whether a pack may have records that are not taken in."""
        return pack not in self._packs and not self._is_whole(pack.kind, pack.first, units)

    def _is_whole(self, kind: str, first: int, units: int) -> bool:
        """Whether all units of a pack's range are taken in: the spine's, or those of all points."""
        of_range = slice(first, min(first + packs.UNITS, units))
        if kind == packs.SPINE:
            return bool(self.spine_rows[of_range].all())
        return all(self.point(point).committed[of_range].all() for point in _points(kind))

    def _first_unknown(self, units: int) -> int:
        """The first unit that may have a record of residuals that is not taken in."""
        known = {rows_name(point) for point in self.points}
        if points_of(set(self._place.folders()) - known):
            return 0
        return _first_missing([point.committed[:units] for point in self.points.values()])

    def look(self, units: int, points: Iterable[HookPoint]) -> int:
        """Take in by name which units are there, and the records of the spine.

        Args:
            points: to look for; if there are none, all are listed.

        Returns:
            The requests that listed names.
        """
        self._follow_spine(units)
        first = _first_missing([self.point(point).named[:units] for point in points])
        if first == units:
            return 0
        names = self._place.names(RESIDUALS, after=_before(first))
        for name in names:
            if match := _RESIDUAL_RECORD.fullmatch(name):
                for point in _points(match["points"]):
                    self.point(point).named[self._checked(name)] = True
        return max(1, -(-len(names) // self._place.page)) if self._place.page else 0

    def _follow_spine(self, units: int) -> None:
        """Take in the records of the spine from the first missing one to the next missing one.

        The text is read in order, so a look costs little more requests than there are new records:
        it asks for one, then for twice as many as were there, and ends where one is not there.
        """
        count = 1
        while (first := _first_missing([self.spine_rows[:units]])) < units:
            keys = [spine_key(unit) for unit in range(first, min(first + count, units))]
            try:
                for key, data in zip(keys, self._place.read_many(keys), strict=True):
                    self._note(records.decode(data, f"{self._place.name}/{key}"))
            except FileNotFoundError:
                return
            count = min(2 * count, _AT_A_TIME)

    # -- reading records ---------------------------------------------------------------------------

    def _is_new_spine(self, name: str) -> bool:
        return bool(_SPINE_RECORD.fullmatch(name)) and not self.spine_rows[self._checked(name)]

    def _is_new_residuals(self, name: str) -> bool:
        match = _RESIDUAL_RECORD.fullmatch(name)
        if not match:
            return False
        unit = self._checked(name)
        return any(not self.point(point).committed[unit] for point in _points(match["points"]))

    def _checked(self, name: str) -> int:
        """The unit of a record; StoreError if the store cannot have it."""
        return self._planned(int(name[:8]))

    def _planned(self, unit: int) -> int:
        if unit >= self._units:
            raise StoreError(
                f"{self._place.name} has a record of unit {unit}, and was planned with "
                f"{self._units}"
            )
        return unit

    def _read(self, folder: str, first: int, is_new: Callable[[str], bool]) -> None:
        """Take in the new records of a folder from unit `first` on, in order of their names.

        Raises:
            TemporaryError: records are listed and not there, time and again.
        """
        for _ in range(_LISTINGS):
            names = sorted(filter(is_new, self._place.names(folder, after=_before(first))))
            keys = [f"{folder}/{name}" for name in names]
            # A repair may drop a record behind the listing: then the rest is listed anew.
            with suppress(FileNotFoundError):
                for key, data in zip(keys, self._place.read_many(keys), strict=True):
                    self._note(records.decode(data, f"{self._place.name}/{key}"))
                return
        raise TemporaryError(
            f"{self._place.name}/{folder} lists records that are not there: a repair is dropping "
            "them; run the same command again"
        )

    def _note(self, record: Mapping[str, Any]) -> None:
        """Take in a record that was read, after a check of its objects."""
        self._require_objects(record)
        note = self.note_residuals if "layers" in record else self.note_spine
        note(self._planned(record["unit"]), record)

    def _require_objects(self, record: Mapping[str, Any]) -> None:
        """At the start, raise StoreError if an object of a record is missing or cut."""
        if self._sizes is None:
            return
        objects = record["objects"]
        fresh = {key.rpartition("/")[0] for key in objects} - self._sizes.keys()
        if fresh:
            self._sizes.update(zip(fresh, self._place.sizes_of_many(fresh), strict=True))
        for key, (size, _) in objects.items():
            folder, _, name = key.rpartition("/")
            present = self._sizes[folder].get(name)
            if present is None and self.absences.allow(key, record["unit"]):
                continue
            if present != size:  # it may have come, with its record, after the folder was listed
                present = self._size_now(key)
            if present == size:
                continue
            wrong = "is missing" if present is None else f"has {present} bytes instead of {size}"
            raise StoreError(
                f"{self._place.name}/{key} {wrong}; `python -m harvest action=repair "
                f"store={self._place.name}` drops its unit's record, and harvesting again redoes "
                "the unit"
            )

    def _size_now(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        try:
            with self._place.open(key) as blob:
                return blob.size
        except FileNotFoundError:
            return None

    # -- taking in records -------------------------------------------------------------------------

    def note_spine(self, unit: int, record: Mapping[str, Any]) -> None:
        """Take in a spine record."""
        self.spine_rows[unit] = record["rows"]
        self.pieces[unit] = record["pieces"]

    def note_residuals(self, unit: int, record: Mapping[str, Any]) -> None:
        """Take in a record of residuals."""
        for name, entry in record["layers"].items():
            nbytes, _ = record["objects"][rows_key(name, unit)]
            self.point(HookPoint.of(name)).note(unit, entry, nbytes)
        kind = kind_of(record["layers"])
        self._kinds.setdefault(kind, np.zeros(self._units, np.bool_))[unit] = True

    def point(self, named: Point) -> PointLedger:
        """The units of a hook point, of which there may be none."""
        point = HookPoint.of(named)
        if point not in self.points:
            # `setdefault` is atomic: threads that commit come here too.
            self.points.setdefault(point, PointLedger.empty(self._units, self._chunks))
        return self.points[point]

    # -- packs -------------------------------------------------------------------------------------

    def packable(self, units: int) -> Iterator[Content]:
        """The records that were taken in, as packs.

        Units are whole for records of residuals when each of them has all of their points.
        """
        kinds = {packs.SPINE: self.spine_rows != 0, **self._kinds}
        for first in range(0, units, packs.UNITS):
            for kind, there in kinds.items():
                of_kind = first + np.flatnonzero(there[first : min(first + packs.UNITS, units)])
                keys = {unit: _key(kind, unit) for unit in of_kind.tolist()}
                if keys:
                    pack = Pack(first, kind, len(keys))
                    yield Content(pack, keys, self._is_whole(kind, first, units))


def key_of(record: Mapping[str, Any]) -> str:
    """Where a record of the spine or of residuals lies."""
    if "layers" in record:
        return residual_key(record["unit"], record["layers"])
    return spine_key(record["unit"])


def _key(kind: str, unit: int) -> str:
    """The record of a unit."""
    return spine_key(unit) if kind == packs.SPINE else residual_key(unit, _points(kind))


def _first_missing(of_units: Sequence[NDArray[Any]]) -> int:
    """The first unit that some array lacks; as many as there are units, if none is missing.

    Of no array it is 0.
    """
    return min((int(np.argmin(np.append(there != 0, False))) for there in of_units), default=0)


def _before(unit: int) -> str:
    """What comes behind all records of the units before `unit`, and before its own."""
    return f"{unit:08d}"
