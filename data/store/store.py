"""The activation store: the one contract between harvesting, training and analysis.

What may never change (format 2): a Zarr v3 group of these arrays, each cut into units along its
first axis (data/store/arrays.py):

    tokens, document   (S, T) uint32              the spine: packed rows, and each token's document
    token_index        (N,)   uint32 | uint64     flat spine index of each stored row
    layer_L            (N, d) bfloat16            residual stream after decoder layer L, in
                                                  the order of token_index
    SITE_L             (N, d) bfloat16            another site (data/site.py) of layer L, in the
                                                  same order
    norm_L             (N,)   float32             Euclidean norms of those rows
    kind_L             (N,)   uint8               what each row is: see data/store/kinds.py
    moments_L          (units, 3, 2, d) float64   [BOS, outlier, ordinary] x [mean, sum of squared
                                                  deviations] of each unit's rows
    summary_L          (2, 3, 2, d) float64       the same of all [training, held-out] units
    norm_SITE_L, ...                              the same of another site

A unit is the unit of work, writing, commit, checksum, statistics and resume. This is how one is
committed:
1. Each of its objects is written under its final name: whole, synced to the disk (`write`).
2. Its record is created in commits/. It names every object, with size and checksum (`commit`).
Readers believe records alone, or their copies in packs (data/store/packs.py). After a kill between
the two steps there is no record, so the next harvest makes the unit again and replaces its objects
by the same bytes.

commits/manifest.json records what the store is made from. It is written once and compared on every
later open; the group's attributes repeat it.

Shapes: S spine rows, T context, N = S*T tokens, d d_model, R spine rows per unit, n rows of a unit,
C inner chunks per unit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.durable import Written
from residual_saes.data.errors import StoreError
from residual_saes.data.site import RESID_POST, HookPoint, Point
from residual_saes.data.store import codec, ledger, manifest, packs, records, zarr_json
from residual_saes.data.store.arrays import Arrays
from residual_saes.data.store.claims import Claims
from residual_saes.data.store.ledger import Ledger, PointLedger
from residual_saes.data.store.moments import Moments
from residual_saes.data.store.place import Place, place_of
from residual_saes.data.store.shard import UnitArray
from residual_saes.data.store.zarr_json import GROUP
from residual_saes.data.text.packing import Cursor

if TYPE_CHECKING:  # the process that writes the spine runs without torch
    from residual_saes.data.store.unit import Prepared

_END = "commits/spine/end.json"


class SpineEnd(NamedTuple):
    """How the text ended."""

    rows: int  # S
    ended_early: bool  # the source had less text than was asked for


class Store:
    """A store. Arrays are read by unit; nothing without a record is ever served."""

    def __init__(self, place: Place, manifest: Mapping[str, Any]) -> None:
        """Read every record. Use `open` or `open_or_create`."""
        self.place = place
        self.manifest = dict(manifest)
        self.context: int = manifest["context"]
        self.d_model: int = manifest["model"]["d_model"]
        self.unit_tokens: int = manifest["unit"]
        self._rows_codec = cache(lambda point: codec.of_rows(manifest["codec"], place, point))
        self.spine_end = self._read_end()  # None while the spine is being written
        self.ledger = Ledger(place, self.units, self.chunks)

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def open(cls, where: Path | str | Place) -> Store:
        """Open an existing store, and check that every committed object is there in full.

        Raises:
            StoreError: there is no store, it has another format, or an object is missing or cut.
        """
        place = place_of(where)
        return cls(place, manifest.read(place))

    @classmethod
    def open_or_create(
        cls, where: Path | str | Place, settings: Mapping[str, Any], claims: Claims | None = None
    ) -> Store:
        """Open the store if its manifest equals `settings`; create it where there is none.

        Args:
            claims: this process's, if it has any: it may have them once.

        Raises:
            MismatchError: it was made with other settings; the message names both values.
        """
        place = place_of(where)
        if claims is not None:
            return cls(place, manifest.agree(place, settings, claims))
        manifest.require_free(place)  # claims make a file, and the folder may be no store
        with closing(place.claims()) as briefly:
            return cls(place, manifest.agree(place, settings, briefly))

    @property
    def name(self) -> str:
        """The store's path or URL, as the user gave it."""
        return self.place.name

    def refresh(self) -> None:
        """Take in what other processes have committed."""
        self.spine_end = self.spine_end or self._read_end()
        self.ledger.refresh(self.units)

    def look(self, points: Iterable[Point] = ()) -> int:
        """Take in which units others have committed, as cheaply as the place allows.

        `missing` counts them from then on. What their records of residuals say comes with
        `refresh`; the spine's are taken in whole.

        Args:
            points: to look for; if there are none, those that are there already.

        Returns:
            The requests that listed names: 0 in a folder.
        """
        if self.place.page is None:
            self.refresh()
            return 0
        self.spine_end = self.spine_end or self._read_end()
        return self.ledger.look(self.units, list(map(HookPoint.of, points)) or self.points)

    def _read_end(self) -> SpineEnd | None:
        try:
            return SpineEnd(**self._read_record(_END))
        except FileNotFoundError:
            return None

    def _read_record(self, key: str) -> dict[str, Any]:
        return records.decode(self.place.read(key), f"{self.name}/{key}")

    # -- writing: objects first, then the record ---------------------------------------------------

    def commit_spine(
        self, unit: int, tokens: NDArray[np.uint32], document: NDArray[np.uint32], end: Cursor
    ) -> None:
        """Commit one unit of the spine.

        Args:
            tokens: (R, T) packed rows.
            document: (R, T) the document of each token.
            end: where the text goes on behind the last token.
        """
        permutation = order.permutation(tokens.size, self.manifest["seed"], unit)
        index = permutation + unit * self.unit_tokens
        arrays = self.arrays
        objects = {
            **self.write(arrays.tokens(), unit, tokens),
            **self.write(arrays.document(), unit, document),
            **self.write(arrays.token_index(), unit, index.astype(arrays.token_index().dtype)),
        }
        record = {
            "unit": unit,
            "rows": len(tokens),
            "pieces": int(_starts(document).sum()),
            "cursor": list(end),
            "objects": objects,
        }
        self.commit(ledger.spine_key(unit), record)
        self.ledger.note_spine(unit, record)

    def commit_residuals(
        self,
        unit: int,
        points: Mapping[HookPoint, Prepared] | Mapping[int, Prepared],
        batch: int | None = None,
    ) -> None:
        """Commit one unit's rows of all of `points` at once.

        Args:
            batch: packed rows per forward pass, if it was not the manifest's.
        """
        arrays = self.arrays
        objects: dict[str, Written] = {}
        entries: dict[str, dict[str, Any]] = {}
        for point, prepared in points.items():
            name = HookPoint.of(point).name
            statistics = prepared.statistics
            objects |= self.write(arrays.rows(point), unit, prepared.bits)
            objects |= self.write(arrays.norms(point), unit, statistics.norms)
            objects |= self.write(arrays.kinds(point), unit, statistics.kinds.astype(np.uint8))
            objects |= self.write(arrays.moments(point), unit, statistics.moments[None])
            entries[name] = prepared.entry(self.chunks)
            if batch:
                entries[name]["batch"] = batch
        rows = self.rows_of(unit)
        record = {"unit": unit, "rows": rows, "objects": objects, "layers": entries}
        self.commit(ledger.residual_key(unit, points), record)
        self.ledger.note_residuals(unit, record)

    def write(self, array: UnitArray, unit: int, rows: NDArray[Any]) -> dict[str, Written]:
        """Write one unit's object of an array; no reader looks at it before its record is there.

        Gives the entry of the record: the object's key, its size and checksum.
        """
        # Threads share out compression. Without it only checksums remain; they hold the GIL, so
        # threads gain nothing.
        pool = self._pool if array.codec.compresses else None
        key = array.key(unit)
        return {key: self.place.write(key, array.encode(rows, pool))}

    def commit(self, key: str, record: Mapping[str, Any]) -> None:
        """Create a record. Another process may have been first, with the same record.

        Raises:
            StoreError: the other process's record is different.
        """
        data = records.encode(record)
        if not self.place.create(key, data) and self.place.read(key) != data:
            raise StoreError(
                f"{self.name}/{key} was committed by another process with other contents: the two "
                "processes computed different bits. Stop one, and run `python -m harvest "
                "action=verify`"
            )

    def close_spine(self, end: SpineEnd) -> None:
        """Fix the store's final shape."""
        self.commit(_END, end._asdict())
        self.spine_end = end

    def declare(self, points: Iterable[Point]) -> None:
        """Write the Zarr metadata of the group and of every array, at their present shapes.

        Other Zarr readers need it. Of ours only `verify` reads it. The group's, which repeats all
        others, is written last: if it is right already, so are they.
        """
        if not self.is_declared(points):
            for key, text in self.metadata(points).items():
                self.place.write(key, [text])

    def is_declared(self, points: Iterable[Point]) -> bool:
        """Whether the Zarr metadata is there as `declare` writes it."""
        self.spine_end = self.spine_end or self._read_end()  # another process may have declared it
        try:
            return self.place.read(GROUP) == self.metadata(points)[GROUP]
        except FileNotFoundError:
            return False

    def pack(self) -> None:
        """Pack the records that were taken in, where that spares requests (data/store/packs.py)."""
        packs.write(self.place, self.ledger.packable(self.units))

    def is_packed(self) -> bool:
        """Whether `pack` has nothing to do."""
        return packs.are_written(self.place, self.ledger.packable(self.units))

    def metadata(self, points: Iterable[Point]) -> dict[str, bytes]:
        """The zarr.json of the group and of every array, by key; the group's comes last."""
        return zarr_json.texts(self.arrays, {*self.points, *map(HookPoint.of, points)})

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="encode")

    # -- shape -------------------------------------------------------------------------------------

    @property
    def arrays(self) -> Arrays:
        """Every array of the store, at its present shape."""
        return self.arrays_of(self.spine_rows)

    def arrays_of(self, spine_rows: int) -> Arrays:
        """Every array of the store, at the shape of another number of spine rows."""
        return Arrays(self.manifest, spine_rows, self._rows_codec)

    @property
    def spine_complete(self) -> bool:
        """Whether the text's end is known and every unit of the spine has its record."""
        return self.spine_end is not None and bool(self.ledger.spine_rows[: self.units].all())

    @property
    def spine_rows(self) -> int:
        """S: rows of the finished spine, or the planned ones while it is being written."""
        return self.spine_end.rows if self.spine_end else self.planned_rows

    @property
    def planned_rows(self) -> int:
        """Spine rows that were asked for."""
        return int(-(-self.manifest["tokens"] // self.context))

    @property
    def rows(self) -> int:
        """N: tokens of the spine and rows of every point."""
        return self.spine_rows * self.context

    @property
    def units(self) -> int:
        return -(-self.rows // self.unit_tokens)

    @property
    def chunks(self) -> int:
        """C: inner chunks per unit."""
        return int(self.unit_tokens // self.manifest["chunk"])

    @property
    def points(self) -> list[HookPoint]:
        """Hook points that have at least one committed unit."""
        return sorted(point for point, its in self.ledger.points.items() if its.named.any())

    @property
    def layers(self) -> list[int]:
        """Layers whose resid_post has at least one committed unit."""
        return [point.layer for point in self.points if point.site == RESID_POST]

    @property
    def lossless(self) -> bool:
        """Whether the rows are the bits that the model gave."""
        return codec.is_lossless(self.manifest["codec"])

    @property
    def identity(self) -> str:
        """Digest of what the contents follow from: the manifest, and where the text ended."""
        rows = self.spine_end.rows if self.spine_end else None
        return records.digest({"manifest": self.manifest, "rows": rows})

    def rows_of(self, unit: int) -> int:
        """n: tokens of a unit whose spine is committed."""
        return int(self.ledger.spine_rows[unit]) * self.context

    # -- reading the spine -------------------------------------------------------------------------

    def spine_cursor(self) -> tuple[int, Cursor]:
        """The first uncommitted spine unit, and where its text starts."""
        unit = int(np.argmin(np.append(self.ledger.spine_rows, 0)))
        if unit == 0:
            return 0, Cursor(0, 0, None)
        return unit, Cursor(*self._read_record(ledger.spine_key(unit - 1))["cursor"])

    def tokens(self, unit: int) -> NDArray[np.uint32]:
        """(R, T) token ids of a unit's spine rows."""
        return self._read_spine(self.arrays.tokens(), unit)

    def document(self, unit: int) -> NDArray[np.uint32]:
        """(R, T) document numbers of a unit's spine rows."""
        return self._read_spine(self.arrays.document(), unit)

    def token_index(self, unit: int) -> NDArray[Any]:
        """(n,) flat spine index of each stored row of a unit."""
        return self._read_spine(self.arrays.token_index(), unit)

    def piece_starts(self, unit: int) -> NDArray[np.bool_]:
        """(R, T) which tokens of a unit begin a document's piece: these are its BOS tokens."""
        return _starts(self.document(unit))

    def permutation(self, unit: int) -> NDArray[np.int64]:
        """(n,) the token of each stored row, as flat position in the unit's spine rows."""
        return self.token_index(unit).astype(np.int64) - unit * self.unit_tokens

    def _read_spine(self, array: UnitArray, unit: int) -> NDArray[Any]:
        tokens = self._require_spine(unit)
        return self._read(array, unit, tokens // math.prod(array.inner))

    def _require_spine(self, unit: int) -> int:
        """n of a unit; StoreError if its spine is not committed."""
        rows = self.rows_of(unit)
        if not rows:
            raise StoreError(
                f"unit {unit} of {self.name} is not committed; run `python -m harvest` again"
            )
        return rows

    # -- reading residuals -------------------------------------------------------------------------

    def committed(self, point: Point) -> NDArray[np.bool_]:
        """(units,) which units of `point` are there and taken in."""
        return self._point(point).committed[: self.units]

    def missing(self, points: Iterable[Point]) -> dict[int, list[HookPoint]]:
        """Units that lack some of `points`, with the points that each lacks, in order."""
        wanted = list(map(HookPoint.of, points))
        # Copies: a writer thread may commit a unit between the two looks below. That unit
        # would then get an empty list.
        there = {point: self._point(point).named[: self.units].copy() for point in wanted}
        incomplete = np.flatnonzero(~np.all(list(there.values()), axis=0))
        missing = {}
        for unit in incomplete.tolist():
            missing[unit] = [point for point in wanted if not there[point][unit]]
        return missing

    def lacking(self, points: Iterable[Point]) -> int:
        """How many units lack some of `points`."""
        there = [self._point(HookPoint.of(point)).named[: self.units] for point in points]
        return self.units - int(np.count_nonzero(np.all(there, axis=0)))

    def committed_meanwhile(self, unit: int, points: Iterable[Point]) -> bool:
        """Whether another process committed exactly these points of a unit since `refresh`."""
        try:
            record = self._read_record(ledger.residual_key(unit, points))
        except FileNotFoundError:
            return False
        self.ledger.note_residuals(unit, record)
        return True

    def complete(self, point: Point) -> bool:
        """Whether every unit of `point` is committed."""
        return self.spine_complete and bool(self.committed(point).all())

    def residuals(
        self, point: Point, unit: int, start: int = 0, stop: int | None = None
    ) -> NDArray[np.uint16]:
        """(n, d) bfloat16 bits of a unit's stored rows, from `start` to `stop`, None: to the last.

        Raises:
            StoreError: the unit is not committed, its object is damaged, or a ring freed it.
        """
        return self._read_rows(self.arrays.rows(point), point, unit, start, stop)

    def norms(self, point: Point, unit: int) -> NDArray[np.float32]:
        """(n,) Euclidean norms of a unit's stored rows."""
        return self._read_rows(self.arrays.norms(point), point, unit)

    def kinds(self, point: Point, unit: int) -> NDArray[np.uint8]:
        """(n,) kind of each of a unit's stored rows: see data/store/kinds.py."""
        return self._read_rows(self.arrays.kinds(point), point, unit)

    def _read_rows(
        self, array: UnitArray, point: Point, unit: int, start: int = 0, stop: int | None = None
    ) -> NDArray[Any]:
        self._require(point, unit)
        rows = self._require_spine(unit)
        return self._read(array, unit, rows if stop is None else min(stop, rows), start)

    def _read(self, array: UnitArray, unit: int, rows: int, start: int = 0) -> NDArray[Any]:
        try:
            return array.read(self.place, unit, rows, start)
        except StoreError:
            self.ledger.absences.refuse(array.key(unit), unit)
            raise

    def _require(self, point: Point, unit: int) -> None:
        if not self._point(point).committed[unit]:
            there = ", ".join(map(str, self.points)) or "none"
            raise StoreError(
                f"unit {unit} of {HookPoint.of(point)} is not in {self.name} (there are: {there})"
            )

    # -- what the records say of a point -----------------------------------------------------------

    def _point(self, point: Point) -> PointLedger:
        known = self.ledger.points.get(HookPoint.of(point))
        return known or PointLedger.empty(len(self.ledger.spine_rows), self.chunks)

    def batch_of(self, point: Point, unit: int) -> int:
        """Packed rows per forward pass that a unit was made with."""
        return int(self._point(point).batch[unit] or self.manifest["batch"])

    def batches(self, point: Point) -> NDArray[np.int32]:
        """(units,) packed rows per pass of each unit; 0: the manifest's batch."""
        return self._point(point).batch[: self.units]

    def lost(self, point: Point, unit: int) -> float:
        """Sum of squared errors of a unit's ORDINARY rows; 0 for a lossless codec."""
        self._require(point, unit)
        return float(self._point(point).lost[unit])

    def rows_bytes(self, point: Point, unit: int) -> int:
        """Bytes of the object that holds a unit's rows."""
        self._require(point, unit)
        return int(self._point(point).nbytes[unit])

    def chunk_counts(self, point: Point, unit: int) -> NDArray[np.int32]:
        """(C, 3) rows of each inner chunk of a unit that are BOS, OUTLIER, ORDINARY."""
        self._require(point, unit)
        counts: NDArray[np.int32] = self._point(point).chunks[unit]
        return counts

    def norm_sums(self, point: Point, unit: int) -> NDArray[np.float64]:
        """(3,) sums of the norms of a unit's BOS, OUTLIER, ORDINARY rows."""
        self._require(point, unit)
        sums: NDArray[np.float64] = self._point(point).norm_sums[unit]
        return sums

    def non_finite(self, point: Point) -> int:
        """Rows of `point` with NaN or infinity in the committed units."""
        entries = self._point(point)
        spine_rows = self.ledger.spine_rows.astype(np.int64)[entries.committed]
        return int(spine_rows.sum() * self.context - entries.chunks.sum(dtype=np.int64))

    def unit_moments(self, point: Point, units: Sequence[int]) -> Iterator[list[Moments]]:
        """Exact statistics of the BOS, OUTLIER and ORDINARY rows of each of some units."""
        read = self.arrays.moments(point).read_many(self.place, units, 1)
        for unit, moments in zip(units, read, strict=True):
            counts = self.chunk_counts(point, unit).sum(0, dtype=np.int64)
            pairs = zip(counts, moments[0], strict=True)
            yield [Moments(int(count), *of_kind) for count, of_kind in pairs]


def _starts(document: NDArray[np.uint32]) -> NDArray[np.bool_]:
    starts = np.ones(document.shape, np.bool_)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return starts
