"""The state of a ring (data/store/ring.py) on the disk, and how large a ring must be.

    commits/ring.json           RingState: the size, the groups, and the watermark `freed`
    commits/ring_copy.json      the same: nothing else would say what was freed
    commits/readers/NAME.json   Registration: a training run, and how far it has passed

All change under the claim RING alone. The watermark is durable before the first object goes.
Training units are counted in ascending order, without the held-out units.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.journal import size
from residual_saes.data.site import HookPoint
from residual_saes.data.store import records
from residual_saes.data.store.arrays import rows_key, rows_name
from residual_saes.data.store.claims import RING, Claims
from residual_saes.data.store.place import Place

KEY, COPY = "commits/ring.json", "commits/ring_copy.json"
REGISTRATIONS = "commits/readers"

# Groups of units that a ring must hold: the one being read, the one before, to which a checkpoint
# may fall back, and the next.
GROUPS = 3
# Most bytes of an inner chunk beside its rows: Blosc's header, the checksum, the index entry.
_FRAME_BYTES = 64


class RingState(NamedTuple):
    """What commits/ring.json records."""

    max_bytes: int  # of all row objects together, held-out units included
    span: int  # training units per group
    layers: list[int | str]  # the hook points, as `HookPoint.recorded` has them
    held_out: list[int]  # units, ascending
    freed: int  # training units whose row objects may be absent

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> RingState:
        """The state that a record holds."""
        return cls(*(body[field] for field in cls._fields))

    @property
    def points(self) -> list[HookPoint]:
        """The hook points whose rows are in the ring."""
        return list(map(HookPoint.of, self.layers))

    def is_freed(self, unit: int) -> bool:
        """Whether the unit lies below the watermark, so that its row objects may be absent."""
        if self.stays(unit):
            return False
        return unit - bisect_left(self.held_out, unit) < self.freed

    def stays(self, unit: int) -> bool:
        """Whether the unit's rows are never freed."""
        return unit in self.held_out

    def may_be_absent(self, key: str, unit: int) -> bool:
        """Whether an object of `unit` may be absent: its row objects may, once freed."""
        return self.is_freed(unit) and any(key == rows_key(point, unit) for point in self.points)

    def status(self, place: Place, units: int) -> Iterator[str]:
        """One line: how full the ring is, and where its readers are.

        Args:
            units: of the store, held-out units included.
        """
        nbytes = sum(sum(place.sizes(rows_name(point)).values()) for point in self.points)
        readers = ", ".join(
            f"{run.run} ({run.read}) at {run.passed}" for run in registrations(place).values()
        )
        yield (
            f"ring: {size(nbytes)} of {size(self.max_bytes)} in groups of {self.span} units, "
            f"{self.freed} of {units - len(self.held_out)} training units freed; "
            f"readers: {readers or 'none'}"
        )


class Registration(NamedTuple):
    """What commits/readers/NAME.json records of a training run."""

    run: str  # its directory
    layer: int | str | list[int | str]  # as `HookPoint.recorded`; a list: of several points
    span: int  # training units per group
    passed: int  # training units that none of its checkpoints needs any more

    @property
    def read(self) -> str:
        """The hook points that it reads, for messages."""
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        return ", ".join(str(HookPoint.of(layer)) for layer in layers if layer != -1)


def read(place: Place) -> RingState | None:
    """The state of the ring; None if the store is no ring.

    Raises:
        StoreError: the record is damaged, and so is its copy.
    """
    body = recorded(place)
    is_ring = body is not None and "kept" not in body  # which is of a thin store
    return RingState.of(body) if body and is_ring else None


def recorded(place: Place) -> dict[str, Any] | None:
    """What says which objects may be absent; None if nothing may.

    Raises:
        StoreError: the record is damaged, and so is its copy.
    """
    for key in (KEY, COPY):
        try:
            return records.decode(place.read(key), key)
        except FileNotFoundError:
            if key == KEY:
                return None
        except StoreError:
            continue
    raise StoreError(
        f"{place.name}/{KEY} is damaged, and nothing else says what was freed: restore it, "
        "or harvest again into another store="
    )


def write(place: Place, state: RingState) -> None:
    """Replace the ring's record and its copy; only under the claim RING."""
    put(place, state._asdict())


def put(place: Place, body: Mapping[str, Any]) -> None:
    """Replace the record of what may be absent, and its copy.

    The copy is second: if it is the one that is left, it says that less is freed, never more.
    """
    for key in (KEY, COPY):
        place.write(key, [records.encode(body)])


def registrations(place: Place) -> dict[str, Registration]:
    """The registered training runs, by name. One whose record is damaged needs everything."""
    runs = {}
    for file in sorted(place.sizes(REGISTRATIONS)):
        if file.endswith(".json"):
            key = f"{REGISTRATIONS}/{file}"
            try:
                body = records.decode(place.read(key), f"{place.name}/{key}")
                run = Registration(*(body[field] for field in Registration._fields))
            except StoreError:
                run = _of_damaged(file)
            runs[file.removesuffix(".json")] = run
    return runs


def _of_damaged(file: str) -> Registration:
    """What is taken for a record that says nothing any more, until its run writes it again."""
    run = f"of the damaged record {file}, which its `python -m train` mends"
    return Registration(run, layer=-1, span=0, passed=0)


def is_ours(key: str) -> bool:
    """Whether an object says what is freed, or what may be."""
    return key in (KEY, COPY) or key.startswith(f"{REGISTRATIONS}/")


def mend(place: Place, key: str) -> None:
    """Replace a damaged record; that of a training run by one that gives nothing up.

    Raises:
        StoreError: the ring's record is damaged, and so is its copy.
    """
    name = key.removeprefix(f"{REGISTRATIONS}/")
    if name != key:
        write_registration(place, name.removesuffix(".json"), _of_damaged(name))
    elif body := recorded(place):
        put(place, body)


def register(place: Place, name: str, run: Registration, fallback: int) -> Registration:
    """Keep everything from training unit `run.passed` on, until the run needs less.

    Args:
        fallback: keep what comes from this training unit on too, if none of it is freed, and if it
            is one group at most: with more a full ring would wait for a run that waits for it.

    Returns:
        What was registered.

    Raises:
        StoreError: the run needs units that are freed.
    """
    with _claimed(place):
        state = read(place)
        assert state is not None
        if run.passed < state.freed:
            raise StoreError(
                f"{run.run} needs training units {run.passed} to {state.freed - 1} of "
                f"{place.name}, which are freed: other readers had passed them, or this one had by "
                "checkpoints that are damaged or gone. Restore its newest checkpoint, or harvest "
                "again into another store=, with readers= as many as will train side by side, or "
                "without max_bytes="
            )
        if state.freed <= fallback and run.passed - run.span <= fallback < run.passed:
            run = run._replace(passed=fallback)
        write_registration(place, name, run)
    return run


def advance(place: Place, name: str, run: Registration) -> None:
    """Record that a registered run needs less than before."""
    with _claimed(place):
        write_registration(place, name, run)


def write_registration(place: Place, name: str, run: Registration) -> None:
    """Replace the record of a run; only under the claim RING."""
    place.write(f"{REGISTRATIONS}/{name}.json", [records.encode(run._asdict())])


@contextmanager
def _claimed(place: Place) -> Iterator[None]:
    with closing(place.claims()) as claims:
        require_locks(claims, place)
        with claims.held(RING):
            yield


def require_locks(claims: Claims, place: Place) -> None:
    """Raise SettingError where there are no locks.

    Without them a run that registers could not be kept apart from a harvest that frees.
    """
    if not claims.exact:
        raise SettingError(
            f"max_bytes= needs a folder on a file system with POSIX locks, and {place.name} "
            "is none; leave it out, or give a local store="
        )


# -- how large a ring must be ----------------------------------------------------------------------


def unit_bytes(tokens: int, chunk: int, d_model: int, points: int) -> int:
    """Most bytes of the row objects of one unit, over all points.

    Args:
        tokens: of a unit.
        chunk: rows per inner chunk.
        points: how many.
    """
    frames = (tokens // chunk + 1) * _FRAME_BYTES
    return points * (tokens * d_model * 2 + frames)


def span_of(max_bytes: int, held_out: int, unit_bytes: int) -> int:
    """Units per group, such that `max_bytes` hold the held-out units and three groups.

    Args:
        held_out: units.
        unit_bytes: most bytes of a unit.

    Raises:
        SettingError: they do not hold three groups of one unit.
    """
    span = (max_bytes // unit_bytes - held_out) // GROUPS
    require_size(max_bytes, held_out, max(span, 1), unit_bytes)
    return span


def require_size(max_bytes: int, held_out: int, span: int, unit_bytes: int) -> None:
    """Raise SettingError unless `max_bytes` hold the held-out units and three groups of `span`."""
    least = (held_out + GROUPS * span) * unit_bytes
    if max_bytes < least:
        smaller = "" if span > 1 else ", or less with a smaller unit="
        raise SettingError(
            f"max_bytes={max_bytes:,} cannot hold {held_out} held-out units and {GROUPS} groups of "
            f"{span} units of up to {unit_bytes:,} bytes; the least is max_bytes={least}{smaller}"
        )
