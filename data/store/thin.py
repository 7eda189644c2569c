"""A thin store: a copy with all records of a store, and the rows of few of its units.

It has everything of the held-out units, and of the training units that studies sample. Of the other
units only the kinds of the rows are there (data/store/kinds.py), and the statistics of each hook
point as a whole. Studies of a run read nothing else, so they give the same figures. Training needs
the rows, and is refused.

The record is commits/ring.json, with `kept` in it: a store is either thin or a ring. `harvest
action=thin` makes it (harvest/thinning.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from residual_saes.data.site import HookPoint
from residual_saes.data.store import ring_state
from residual_saes.data.store.place import Place


class Thin(NamedTuple):
    """What commits/ring.json records of a thin store."""

    kept: list[int]  # units with all of their objects, ascending
    freed: int  # units without rows
    span: int | None  # of the ring that it was cut from; None: it was no ring

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Thin:
        """What a record holds."""
        return cls(*(body[field] for field in cls._fields))

    @property
    def max_bytes(self) -> None:
        """It has no limit."""

    @property
    def points(self) -> Sequence[HookPoint]:
        """No hook point is harvested into it."""
        return ()

    def is_freed(self, unit: int) -> bool:
        """Whether the unit's rows may be absent."""
        return not self.stays(unit)

    def stays(self, unit: int) -> bool:
        """Whether the unit's rows are there."""
        return unit in self.kept

    def may_be_absent(self, key: str, unit: int) -> bool:
        """Whether an object of the unit may be absent: all but the kinds may, if it is not kept."""
        return not self.stays(unit) and not key.startswith("kind_")

    def status(self, place: Place, units: int) -> Iterator[str]:
        """One line: what is there."""
        yield (
            f"thin: rows of {len(self.kept)} of {units} units, which is what studies read; "
            "training and harvesting need the store that it was cut from"
        )


def write(place: Place, state: Thin) -> None:
    """Record that a store is thin."""
    ring_state.put(place, state._asdict())
