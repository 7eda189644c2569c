"""What a ring has freed: its record, its readers' records, and which objects may be absent."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import NamedTuple

from data.errors import StoreError
from data.store import records
from data.store.place import Place

KEY, READERS = "commits/ring.json", "commits/readers"
_SHARD = re.compile(r"layer_\d+/c\.(\d+)\.0")


class Record(NamedTuple):
    """What commits/ring.json says."""

    max_bytes: int  # of all objects of layer_L together, the held-out units' included
    span: int  # training units per group
    layers: list[int]
    held_out: list[int]  # units, ascending
    freed: int  # training units whose layer objects may be absent

    def before(self, unit: int) -> int:
        """How many training units come before `unit`."""
        return unit - bisect_left(self.held_out, unit)

    def is_freed(self, unit: int) -> bool:
        """Whether the unit's layer objects may be absent."""
        return unit not in self.held_out and self.before(unit) < self.freed


class Follower(NamedTuple):
    """What a training run's record says."""

    run: str  # its directory
    layer: int
    span: int
    passed: int  # training units that no checkpoint of it needs any more


def read(place: Place) -> Record | None:
    """The ring that a store is; None for a store that keeps everything."""
    try:
        data = place.read(KEY)
    except FileNotFoundError:
        return None
    try:
        body = records.decode(data, KEY)
    except StoreError as error:
        raise StoreError(
            f"{place.name}/{KEY} is damaged, and nothing else says what was freed: restore it, or harvest again into "
            "another store="
        ) from error
    return Record(*(body[field] for field in Record._fields))


def write(place: Place, record: Record) -> None:
    """Replace the ring's record; only under the claim RING."""
    place.write(KEY, [records.encode(record._asdict())])


def followers(place: Place) -> dict[str, Follower]:
    """The registered training runs, by name."""
    names = [name for name in sorted(place.sizes(READERS)) if name.endswith(".json")]
    bodies = {
        name: records.decode(place.read(f"{READERS}/{name}"), f"{place.name}/{READERS}/{name}")
        for name in names
    }
    return {
        name.removesuffix(".json"): Follower(*(body[field] for field in Follower._fields))
        for name, body in bodies.items()
    }


class Freed:
    """Which objects of a place may be absent. What is not yet known to be is looked up: it may just
    have been freed.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._record: Record | None = None

    def __contains__(self, key: str) -> bool:
        match = _SHARD.fullmatch(key)
        if match is None:
            return False
        unit = int(match[1])
        if self._record is None or not self._record.is_freed(unit):
            self._record = read(self._place)
        return self._record is not None and self._record.is_freed(unit)

    def refuse(self, key: str) -> None:
        """Raise StoreError if the object is freed."""
        if key in self:
            raise StoreError(
                f"{self._place.name}/{key} is freed: the store is a ring, whose shards go when their readers have "
                "passed; what needs them all needs a store harvested without max_bytes="
            )


def unit_of(key: str) -> int:
    match = _SHARD.fullmatch(key)
    assert match is not None
    return int(match[1])
