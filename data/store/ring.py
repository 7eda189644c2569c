"""A ring: a store from which rows are freed when every training run has passed them.

Training follows the harvest in groups of `span` training units. commits/ring.json and
commits/readers/ (data/store/ring_state.py) record the ring's size, how far each run has passed, and
how far the ring is freed. The row objects below the watermark `freed` may be absent; all else of a
unit stays. The watermark is durable before the first object goes, and it changes under the same
claim as the runs' records, so no run can register for rows that are going. Held-out units are made
first and never freed.

There is no deadlock, whatever the number of ranks, points and runs, in a ring that holds the
held-out units and 3 groups:
- A run saves a checkpoint in every group that it enters and keeps two. So a run in group g has
  passed all groups before g - 1.
- The slowest run therefore waits for units of group g + 1 at most.
- Those units fit beside groups g - 1 and g. Room is given in ascending order, and room for a unit
  counts every unit below it, committed or not.
- A harvest waits only where the ring holds those three groups whole, and then the slowest run has
  all that it needs to go on, whichever of the ring's points it reads: a harvest makes and commits
  all of them of a unit together, and a unit's room is that of them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.errors import StoreError
from residual_saes.data.journal import size, tell
from residual_saes.data.site import HookPoint, Point
from residual_saes.data.store import ring_state
from residual_saes.data.store.arrays import rows_key, rows_name
from residual_saes.data.store.claims import RING, Claims
from residual_saes.data.store.retention import KeepAll
from residual_saes.data.store.ring_state import REGISTRATIONS, RingState, registrations

if TYPE_CHECKING:
    from residual_saes.data.store.store import Store


def join(
    store: Store, points: Sequence[Point], claims: Claims, max_bytes: int | None, readers: int
) -> KeepAll | Ring:
    """The room of a harvest: a ring's, which is made if `max_bytes` asks for it, or all.

    Args:
        max_bytes: None: as the store was made.
        readers: training runs that must have registered before a ring frees anything.

    Raises:
        SettingError: the ring is too small, or there are no locks.
        StoreError: the store holds other points than the ring would.
    """
    if not store.spine_complete:
        return KeepAll()  # a ring waits for the whole spine: see `needs_whole_spine`
    with claims.held(RING):
        state = ring_state.read(store.place)
        if state is None and (max_bytes is None or not store.lacking(points)):
            return KeepAll()
        ring_state.require_locks(claims, store.place)
        _require_points(store, state, points)
        chunk = store.manifest["chunk"]
        unit_bytes = ring_state.unit_bytes(store.unit_tokens, chunk, store.d_model, len(points))
        state = _made(store, points, state, max_bytes, unit_bytes)
    tell(
        f"a ring of {size(state.max_bytes)}, freed behind its readers in groups of {state.span} "
        f"units: training may start now, with `python -m train store={store.name}`"
    )
    return Ring(store, claims, readers, unit_bytes)


def _made(
    store: Store,
    points: Sequence[Point],
    state: RingState | None,
    max_bytes: int | None,
    unit_bytes: int,
) -> RingState:
    """The state of the ring that is asked for, written if it is new or of another size."""
    if state is None:
        assert max_bytes is not None
        held_out = order.held_out(store.units, store.manifest["seed"]).tolist()
        span = ring_state.span_of(max_bytes, len(held_out), unit_bytes)
        named = [point.recorded for point in sorted(map(HookPoint.of, points))]
        wanted = RingState(max_bytes, span, named, held_out, 0)
    elif max_bytes is None or max_bytes == state.max_bytes:
        return state
    else:
        ring_state.require_size(max_bytes, len(state.held_out), state.span, unit_bytes)
        wanted = state._replace(max_bytes=max_bytes)
    ring_state.write(store.place, wanted)
    return wanted


def _require_points(store: Store, state: RingState | None, points: Sequence[Point]) -> None:
    """Raise StoreError if the store is a ring of other points, or holds rows of others."""
    wanted = sorted(map(HookPoint.of, points))
    others = [point for point in store.points if point not in wanted]
    present = sorted(state.points if state else others)
    if present and present != wanted:
        raise StoreError(
            f"{store.name} has {', '.join(map(str, present))}, and a ring holds what one harvest "
            f"makes; harvest {', '.join(map(str, wanted))} into another store=, or without "
            "max_bytes= into one that is no ring"
        )


class Ring:
    """The ring as one harvesting process sees it."""

    def __init__(self, store: Store, claims: Claims, readers: int, unit_bytes: int) -> None:
        """Read the ring's state.

        Args:
            readers: training runs that must have registered before anything is freed.
            unit_bytes: most bytes of a unit's row objects, over all points.
        """
        self._store = store
        self._claims = claims
        self._readers = readers
        self._unit_bytes = unit_bytes
        self._told: set[str] = set()  # readers for which a full ring was said to wait
        self.state = self._read()
        self._unit_of = {
            rows_key(point, unit): unit
            for point in self.state.points
            for unit in range(store.units)
        }

    def _read(self) -> RingState:
        state = ring_state.read(self._store.place)
        assert state is not None
        return state

    def ordered(
        self, missing: Mapping[int, list[HookPoint]], rank: int = 0
    ) -> Iterator[tuple[int, list[HookPoint]]]:
        """Units to make, in the order of the ring: held-out ones first, each part ascending.

        It is the same for every rank, because room is given in this order.
        """
        held_out = set(self.state.held_out)
        yield from sorted(missing.items(), key=lambda item: (item[0] not in held_out, item[0]))

    def admits(self, unit: int) -> bool:
        """Whether a unit may be made now; frees what may be freed before it refuses."""
        if self.state.stays(unit):
            return True
        self.state = self._read()
        if self._fits(unit):
            return True
        self.free()
        if self._fits(unit):
            return True
        self._tell_full()
        return False

    def _fits(self, unit: int) -> bool:
        # Read `committed` before the sizes: a unit that is committed in between counts twice, never
        # zero times.
        committed = self._committed()
        nbytes = self.sizes()

        # A unit below a committed training unit was dropped by a repair. Its bytes are reserved.
        for later in np.flatnonzero(committed[unit:]) + unit:
            if not self.state.stays(int(later)):
                return True

        # The bytes that are there, and full units for all that may still be made up to this one.
        coming = [
            int(missing)
            for missing in np.flatnonzero(~committed)
            if missing <= unit or self.state.stays(int(missing))
        ]
        present = sum(nbytes.values()) - sum(nbytes.get(other, 0) for other in coming)
        return present + self._unit_bytes * len(coming) <= self.state.max_bytes

    def _committed(self) -> NDArray[np.bool_]:
        """(units,) which units have all points of the ring."""
        committed = np.ones(self._store.units, np.bool_)
        for point in self.state.points:
            committed &= self._store.committed(point)
        return committed

    def sizes(self) -> dict[int, int]:
        """Bytes of the row objects on the disk, by unit."""
        nbytes: dict[int, int] = {}
        for _, unit, of_object in self._objects():
            nbytes[unit] = nbytes.get(unit, 0) + of_object
        return nbytes

    def _objects(self) -> list[tuple[str, int, int]]:
        """Every row object on the disk: key, unit, bytes."""
        objects = []
        for point in self.state.points:
            folder = rows_name(point)
            for name, nbytes in self._store.place.sizes(folder).items():
                key = f"{folder}/{name}"
                if key in self._unit_of:
                    objects.append((key, self._unit_of[key], nbytes))
        return objects

    def clear(self, unit: int) -> None:
        """Remove what a killed process left of a unit that this process claimed.

        Otherwise the unit would lie there twice while it is written again.
        """
        for point in self.state.points:
            key = rows_key(point, unit)
            if self._store.place.exists(key):
                self._store.place.delete(key)

    def free(self) -> None:
        """Free what every reader has passed: first the durable watermark, then the objects."""
        with self._claims.held(RING):
            self.state = self._read()
            runs = registrations(self._store.place)
            if runs and len(runs) >= self._readers:
                passed = min(run.passed for run in runs.values())
                if passed > self.state.freed:
                    self.state = self.state._replace(freed=passed)
                    ring_state.write(self._store.place, self.state)
            self.sweep()

    def sweep(self) -> None:
        """Remove row objects below the watermark.

        Some are there after a kill in the middle of freeing, or after a repair that made a freed
        unit again.
        """
        committed = self._committed()
        for key, unit, _ in self._objects():
            if self.state.is_freed(unit) and committed[unit]:
                self._store.place.delete(key)

    def waits_for(self) -> tuple[str, str]:
        """The run that a full ring waits for ("": none), and a message for the user."""
        place = self._store.place
        runs = registrations(place)
        if len(runs) < self._readers:
            start = f"start `python -m train store={place.name}`"
            return "", f"{len(runs)} of readers={self._readers} have registered: {start}"
        name, slowest = min(runs.items(), key=lambda item: item[1].passed)
        units = self._store.units - len(self.state.held_out)
        return name, (
            f"waiting for reader {slowest.run} at unit {slowest.passed} of {units}; if that run is "
            f"given up, delete {place.name}/{REGISTRATIONS}/{name}.json"
        )

    def _tell_full(self) -> None:
        """Say which reader the full ring waits for, of each reader once."""
        name, reason = self.waits_for()
        if name not in self._told:
            self._told.add(name)
            nbytes = sum(self.sizes().values())
            tell(f"ring full: {size(nbytes)} of {size(self.state.max_bytes)}; {reason}")
