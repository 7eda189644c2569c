"""Which rows of a store are on the disk: all of them, those that fit in a ring, or few of them.

`KeepAll` is the rule. A ring (data/store/ring.py) frees rows behind its readers: records, norms,
kinds and statistics of a unit stay. A thin store (data/store/thin.py) is a copy for studies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from residual_saes.data.errors import StoreError
from residual_saes.data.site import HookPoint
from residual_saes.data.store import ring_state
from residual_saes.data.store.claims import Claims
from residual_saes.data.store.place import Place
from residual_saes.data.store.ring_state import RingState
from residual_saes.data.store.thin import Thin


class KeepAll:
    """All rows stay.

    The first part is what a store's records say, as `RingState` says it of a ring. The second part
    is what a harvest asks before it makes a unit, as it asks a `Ring`.
    """

    max_bytes = None  # most bytes of rows at a time: no limit
    span = None  # training units that training takes at a time: all of them
    points: Sequence[HookPoint] = ()  # that alone are harvested: any
    freed = 0  # units whose rows may be absent

    def is_freed(self, unit: int) -> bool:
        """Whether the unit's rows may be absent."""
        return False

    def stays(self, unit: int) -> bool:
        """Whether the unit's rows are never freed."""
        return True

    def may_be_absent(self, key: str, unit: int) -> bool:
        """Whether an object of the unit may be absent though a record names it."""
        return False

    def status(self, place: Place, units: int) -> Iterator[str]:
        """Lines for `action=status`."""
        yield from ()

    def ordered(
        self, missing: Mapping[int, list[HookPoint]], rank: int = 0
    ) -> Iterable[tuple[int, list[HookPoint]]]:
        """Units to make with the points that each lacks, in the order in which to make them.

        Each rank starts elsewhere, so that ranks meet rarely. Rank 0 starts at the first unit.
        """
        units = list(missing.items())
        start = int(len(units) * _fraction(rank))
        return units[start:] + units[:start]

    def admits(self, unit: int) -> bool:
        """Whether there is room for a unit now."""
        return True

    def clear(self, unit: int) -> None:
        """Remove what a killed process left of a unit: a second write replaces the first."""

    def sweep(self) -> None:
        """Remove what is freed and still there."""


def _fraction(rank: int) -> float:
    """Where of the whole a rank starts: 0, 1/2, 1/4, 3/4, 1/8, 5/8, ...

    However many ranks there are, they lie apart: van der Corput's sequence of base 2.
    """
    fraction = 0.0
    part = 0.5
    while rank:
        fraction += part * (rank & 1)
        part /= 2
        rank >>= 1
    return fraction


Retention = KeepAll | RingState | Thin


def read(place: Place) -> Retention:
    """The retention that a store's records name."""
    body = ring_state.recorded(place)
    if body is None:
        return KeepAll()
    return Thin.of(body) if "kept" in body else RingState.of(body)


def refuse_thin(place: Place, purpose: str) -> None:
    """Raise StoreError if the store is thin.

    Args:
        purpose: what needs all rows, as in "training".
    """
    if isinstance(read(place), Thin):
        raise StoreError(
            f"{place.name} is a thin store, which has only the rows that studies read: {purpose} "
            "needs the store that it was cut from; give that one as store="
        )


def needs_whole_spine(place: Place, claims: Claims, max_bytes: int | None) -> bool:
    """Whether the whole spine must be there before residuals are made.

    A ring needs the text's end: which units are held out follows from how many there are.

    Raises:
        SettingError: a ring is asked for, and there are no locks.
    """
    if max_bytes is not None:
        ring_state.require_locks(claims, place)
        return True
    return read(place).max_bytes is not None


class Absences:
    """Which objects may be absent from a place.

    An object that is not known to be freed is looked up again: it may just have been freed.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._retention: Retention = KeepAll()

    def allow(self, key: str, unit: int) -> bool:
        """Whether this object of `unit` may be absent."""
        if not self._retention.may_be_absent(key, unit):
            self._retention = read(self._place)
        return self._retention.may_be_absent(key, unit)

    def refuse(self, key: str, unit: int) -> None:
        """Raise StoreError if the object is freed."""
        if self.allow(key, unit):
            refuse_thin(self._place, f"{key}, which is not there,")
            raise StoreError(
                f"{self._place.name}/{key} is freed: the store is a ring, whose shards go when "
                "their readers have passed; what needs them all needs a store harvested without "
                "max_bytes="
            )
