"""A store as a ring: training follows the harvest, and a shard is freed when its readers have
passed it.

commits/ring.json says how large the ring is, how training takes it (in groups of `span` units) and
how far it is freed; commits/readers/NAME.json says of each training run how many training units it
will never ask for again. The objects of `layer_L` below the watermark `freed` may be absent, all
else of a unit stays. The watermark is durable before the first object goes, and it and the readers'
records change under one claim, so that no run can register for what is going. Training units are
counted in ascending order, the held-out ones left out: those are made first and never freed.

No deadlock, whatever the number of ranks, layers and readers, in a ring that holds the held-out
units and 3 groups: a trainer saves a checkpoint in every group that it enters and keeps two, so a
run in group g has passed all groups before g - 1. The slowest run therefore waits for units of
group g + 1 at most, and those fit beside what lies between: room is given in ascending order, and
counts every unit below the asked one, committed or not. A harvester waits only where the ring holds
those three groups whole, and then the slowest run has all that it needs to go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.errors import SettingError, StoreError
from data.store import claims, records
from data.store.claims import Claims
from data.store.freed import _SHARD, READERS, Follower, Record, followers, read, unit_of, write
from data.store.place import Place

if TYPE_CHECKING:  # which itself asks here what may be absent
    from data.store.store import Store

# that a ring must hold: the one being read, the one before, to which a checkpoint may fall back,
# the next
GROUPS = 3
# of an inner chunk beside its rows at most: Blosc's header, the checksum, the entry in the index
_FRAME_BYTES = 64


# -- what may be absent ----------------------------------------------------------------------------


# -- training runs ---------------------------------------------------------------------------------


@contextmanager
def _claimed(place: Place) -> Iterator[None]:
    with closing(place.claims(0, 1)) as rights:
        require_exact(rights, place)
        with rights.held(claims.RING):
            yield


def require_exact(rights: Claims, place: Place) -> None:
    """Raise SettingError where there are no locks: nobody could tell a reader that comes from one
    that is gone.
    """
    if not rights.exact:
        raise SettingError(
            f"max_bytes= needs a folder on a file system with POSIX locks, and {place.name} is none; "
            "leave it out, or give a local store="
        )


def register(place: Place, name: str, follower: Follower) -> None:
    """Keep everything from `follower.passed` on for a run, until it says more.

    Raises:
        StoreError: it needs units that are gone.
    """
    with _claimed(place):
        record = read(place)
        assert record is not None
        if follower.passed < record.freed:
            raise StoreError(
                f"{follower.run} needs training units {follower.passed} to {record.freed - 1} of {place.name}, which "
                "are freed: other readers had passed them. Harvest again into another store=, with readers= as many "
                "as will train side by side, or without max_bytes="
            )
        _write(place, name, follower)


def advance(place: Place, name: str, follower: Follower) -> None:
    """Say that a registered run needs less than before."""
    with _claimed(place):
        _write(place, name, follower)


def _write(place: Place, name: str, follower: Follower) -> None:
    place.write(f"{READERS}/{name}.json", [records.encode(follower._asdict())])


# -- the harvest -----------------------------------------------------------------------------------


def unit_bytes(tokens: int, chunk: int, d_model: int, layers: int) -> int:
    """Most bytes that the layer objects of a unit of `tokens` can have."""
    return layers * (tokens * d_model * 2 + (tokens // chunk + 1) * _FRAME_BYTES)


def span_of(max_bytes: int, held_out: int, each: int) -> int:
    """Units per group, such that a ring of `max_bytes` holds the held-out units and three groups.

    Args:
        held_out: units.
        each: most bytes of a unit.

    Raises:
        SettingError: it does not hold three groups of one unit.
    """
    span = (max_bytes // each - held_out) // GROUPS
    if span < 1:
        raise _too_small(max_bytes, held_out, 1, each)
    return span


def _too_small(max_bytes: int, held_out: int, span: int, each: int) -> SettingError:
    return SettingError(
        f"max_bytes={max_bytes:,} cannot hold {held_out} held-out units and {GROUPS} groups of {span} units of up to "
        f"{each:,} bytes; the least is max_bytes={(held_out + GROUPS * span) * each}"
        + ("" if span > 1 else ", or less with a smaller unit=")
    )


def join(
    store: Store,
    layers: Sequence[int],
    held_out: Sequence[int],
    rights: Claims,
    max_bytes: int | None,
    readers: int,
) -> Ring | None:
    """The ring of a store whose spine is complete: made, or found; None for a store that is none.

    Args:
        held_out: units that are never freed.
        max_bytes: None: as it was made.
        readers: training runs that must have registered before anything is freed.

    Raises:
        SettingError: the ring is too small, or there are no locks.
        StoreError: other layers are in the store.
    """
    with rights.held(claims.RING):
        found = read(store.place)
        if found is None and (max_bytes is None or not store.missing(layers)):
            return None
        require_exact(rights, store.place)
        kept = found.layers if found else [layer for layer in store.layers if layer not in layers]
        if kept and sorted(kept) != sorted(layers):
            raise StoreError(
                f"{store.name} has layers {sorted(kept)}, and a ring holds the layers of one harvest; harvest layers "
                f"{sorted(layers)} into another store=, or without max_bytes= into one that is no ring"
            )
        each = unit_bytes(store.unit_tokens, store.manifest["chunk"], store.d_model, len(layers))
        if found is None:
            assert max_bytes is not None
            span = span_of(max_bytes, len(held_out), each)
            write(store.place, Record(max_bytes, span, sorted(layers), list(held_out), 0))
        elif max_bytes is not None and max_bytes != found.max_bytes:
            if max_bytes < (len(found.held_out) + GROUPS * found.span) * each:
                raise _too_small(max_bytes, len(found.held_out), found.span, each)
            write(store.place, found._replace(max_bytes=max_bytes))
    return Ring(store, rights, readers, each)


class Ring:
    """The ring as one harvesting process sees it."""

    def __init__(self, store: Store, rights: Claims, readers: int, each: int) -> None:
        self._store, self._claims, self._readers, self._each = store, rights, readers, each
        self.record = self._read()

    def _read(self) -> Record:
        record = read(self._store.place)
        assert record is not None
        return record

    def ordered(self, missing: Mapping[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
        """Units to make, in the order of the ring: the held-out ones, then the others as they are
        numbered.
        """
        held = set(self.record.held_out)
        yield from sorted(missing.items(), key=lambda item: (item[0] not in held, item[0]))

    def room(self, unit: int) -> bool:
        """Whether a unit may be made now; frees what may be freed before it says no."""
        if unit in self.record.held_out:
            return True
        self.record = self._read()
        if self._fits(unit):
            return True
        self.free()
        return self._fits(unit)

    def _fits(self, unit: int) -> bool:
        # In this order: what is committed while the folders are listed is counted twice, and never
        # left out.
        committed = self._committed()
        have = self.sizes()
        later = np.flatnonzero(committed[unit:])
        if any(unit + int(after) not in self.record.held_out for after in later):
            return True  # a gap: it was given room before the units that are there behind it
        coming = {
            int(gap)
            for gap in np.flatnonzero(~committed)
            if gap <= unit or int(gap) in self.record.held_out
        }
        there = sum(size for number, size in have.items() if number not in coming)
        return there + self._each * len(coming) <= self.record.max_bytes

    def _committed(self) -> NDArray[np.bool_]:
        """(units,) which units have all layers of the ring."""
        every: NDArray[np.bool_] = np.all(
            [self._store.committed(layer) for layer in self.record.layers], axis=0
        )
        return every.copy()

    def sizes(self) -> dict[int, int]:
        """Bytes of the layer objects that lie on the disk, by unit."""
        found: dict[int, int] = {}
        for key, size in self._objects():
            found[unit_of(key)] = found.get(unit_of(key), 0) + size
        return found

    def _objects(self) -> Iterator[tuple[str, int]]:
        for layer in self.record.layers:
            for name, size in self._store.place.sizes(f"layer_{layer}").items():
                if _SHARD.fullmatch(key := f"layer_{layer}/{name}"):
                    yield key, size

    def clear(self, unit: int) -> None:
        """Remove what a killed process left of a unit that is ours to make, so that it never lies
        there twice.
        """
        for key, _ in list(self._objects()):
            if unit_of(key) == unit:
                self._store.place.delete(key)

    def free(self) -> None:
        """Free what every reader has passed: durably said first, then done."""
        with self._claims.held(claims.RING):
            self.record, registered = self._read(), followers(self._store.place)
            if registered and len(registered) >= self._readers:
                passed = min(follower.passed for follower in registered.values())
                if passed > self.record.freed:
                    self.record = self.record._replace(freed=passed)
                    write(self._store.place, self.record)
            self.sweep()

    def sweep(self) -> None:
        """Remove what lies below the watermark: a killed process had begun to, or a repaired unit
        was made again.
        """
        committed = self._committed()
        for key, _ in list(self._objects()):
            if self.record.is_freed(unit := unit_of(key)) and committed[unit]:
                self._store.place.delete(key)

    def waits_for(self) -> tuple[str, str]:
        """The name of the reader that must go on before there is room, or none, and that said to
        the user.
        """
        registered, place = followers(self._store.place), self._store.place
        if len(registered) < self._readers:
            start = f"start `python -m train store={place.name}`"
            return "", f"{len(registered)} of readers={self._readers} have registered: {start}"
        name, slowest = min(registered.items(), key=lambda item: item[1].passed)
        units = self._store.units - len(self.record.held_out)
        return name, (
            f"waiting for reader {slowest.run} at unit {slowest.passed} of {units}; if that run is given up, delete "
            f"{place.name}/{READERS}/{name}.json"
        )
