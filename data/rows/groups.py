"""The rounds of a ring, and the training runs that follow a ring.

The ring's protocol stands in data/store/ring.py.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from residual_saes.data.errors import SettingError, StopRequest, StoreError, TemporaryError
from residual_saes.data.journal import heartbeat, note, tell
from residual_saes.data.rows import summary
from residual_saes.data.rows.follower import Follower
from residual_saes.data.rows.rounds import KeptRows
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import held_out_units, training_units
from residual_saes.data.store import ring_state
from residual_saes.data.store.ring_state import Registration, RingState

# Later groups may drop twice the first group's share of rows, and 1/1000 of them.
_MARGIN = 1000


class Groups:
    """The rounds of a ring: the training units in groups of `span`, each read once."""

    def __init__(self, kept: KeptRows, batch: int, poll_s: float) -> None:
        """Wait for the held-out units and the first group.

        Args:
            batch: rows per batch.
            poll_s: seconds between looks for what the harvest commits.

        Raises:
            SettingError: a batch is larger than a group.
            StoreError: the ring lacks a hook point.
        """
        store = kept.store
        state = ring_state.read(store.place)
        assert state is not None
        training = training_units(store)
        self.store = store
        self.span = state.span
        self.training_units = len(training)
        self._kept = kept
        self._batch = batch
        self._poll_s = poll_s
        self._groups = [
            training[start : start + state.span] for start in range(0, len(training), state.span)
        ]
        self.most_units = max(map(len, self._groups))
        self._ends: list[int] = []  # kept rows up to the end of each group that is there whole
        _await_first(kept, state, self._groups[0], poll_s)
        # Of the first group alone, for all of the run: the others are not there yet.
        parts = [self._groups[0], held_out_units(store)]
        self.statistics = [summary.make(*source, parts) for source in kept.sources]
        self._count_rows()
        self.rows = self._expected_rows()

    def _count_rows(self) -> None:
        """Count the rows of the groups that have become whole."""
        committed = committed_in(self._kept.sources)
        for number in range(len(self._ends), len(self._groups)):
            group = self._groups[number]
            if not committed[group].all():
                break
            rows = int(self._kept.of_chunks(group).sum())
            is_last = number + 1 == len(self._groups)
            if rows < self._batch and not is_last:
                raise SettingError(
                    f"batch={self._batch} is more than the {rows} rows of {self.span} units, by "
                    f"which training follows the ring {self.store.name}; lower it, or "
                    "harvest with a larger max_bytes="
                )
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + rows)

    def _expected_rows(self) -> int:
        """Rows of one pass, as many as there will surely be.

        The spine says how many rows are BOS. Of the others, those to come are expected to lose
        twice the share that the first group lost to outliers and NaN, and 1/1000. A batch is left
        for the end.
        """
        first = self._ends[0]
        ahead = [unit for group in self._groups[1:] for unit in group]
        if not ahead:
            return first
        candidates = self._kept.candidates(self._groups[0])
        to_come = self._kept.candidates(ahead)
        lost = 2 * to_come * (candidates - first) // max(candidates, 1)
        lost += to_come // _MARGIN + self._batch
        return max(first, first + to_come - lost)

    @property
    def first_rows(self) -> int:
        """Kept rows of the first group."""
        return self._ends[0]

    def units(self, number: int) -> list[int]:
        return self._groups[number]

    def ready(self, number: int) -> bool:
        """Whether a group can be read now; takes in what the harvest committed."""
        if len(self._ends) <= number < len(self._groups):
            self.store.refresh()
            self._count_rows()
        return number < len(self._ends)

    def locate(self, batch: int) -> tuple[int, int]:
        """The group in which a batch begins, and how many of its rows come before the batch."""
        row = batch * self._batch
        number = bisect_right(self._ends, row)
        before = self._ends[number - 1] if number else 0
        return number, row - before

    def has(self, batch: int) -> bool:
        """Whether all rows of a batch can be read now, or none will follow."""
        end = (batch + 1) * self._batch
        while self._ends[-1] < end and len(self._ends) < len(self._groups):
            if not self.ready(len(self._ends)):
                return False
        return True

    def ended(self) -> StoreError:
        """Why there is no group any more."""
        name = self.store.name
        if len(self._ends) < len(self._groups):
            return TemporaryError(
                f"{name} is not harvested that far; `python -m harvest` must be at work on it"
            )
        return StoreError(
            f"the ring {name} ended after {self._ends[-1]:,} rows, "
            f"and {self.rows:,} were expected: later units had more than twice the first units' "
            "share of outliers and NaN. "
            f"Harvest again and train with tokens={self._ends[-1] // self._batch * self._batch} at "
            "most, or with drop_outliers=false"
        )

    def follower(self, name: str, run: str) -> RingFollower:
        """How a training run follows the harvest; nothing is registered yet."""
        registration = Registration(run, _recorded(self._kept.sources), self.span, 0)
        return RingFollower(self, name, registration, self._poll_s)

    def committed(self) -> int:
        """Units of which all that is read is there."""
        return int(committed_in(self._kept.sources).sum())


def committed_in(sources: Sequence[Source]) -> NDArray[np.bool_]:
    """(units,) which units every source has."""
    committed: NDArray[np.bool_] = np.all([source.committed() for source in sources], axis=0)
    return committed


def _recorded(sources: Sequence[Source]) -> int | str | list[int | str]:
    """What the registration of a run says that it reads: of a single hook point no list."""
    points = [source.point.recorded for source in sources]
    return points[0] if len(points) == 1 else points


def _await_first(kept: KeptRows, state: RingState, first: Sequence[int], poll_s: float) -> None:
    """Wait for what a run needs before its first step: the held-out units and the first group."""
    store = kept.store
    for source in kept.sources:
        if source.point not in state.points:
            there = ", ".join(map(str, state.points))
            raise StoreError(f"{source.point} is not in the ring {store.name}; it has {there}")
    needed = [*state.held_out, *first]
    if committed_in(kept.sources)[needed].all():
        return

    def told() -> str:
        there = int(committed_in(kept.sources)[needed].sum())
        points = ", ".join(str(source.point) for source in kept.sources)
        return (
            f"waiting for the harvest: {there} of the first {len(needed)} units of {points} are "
            "there"
        )

    tell(told())
    with StopRequest() as stop, heartbeat(told()):
        while not committed_in(kept.sources)[needed].all():
            stop.check()
            time.sleep(poll_s)
            store.refresh()
            note(told())


class RingFollower:
    """How a training run and a ring wait for each other: the registration of one run."""

    def __init__(
        self, groups: Groups, name: str, registration: Registration, poll_s: float
    ) -> None:
        """Nothing is registered yet.

        Args:
            name: of the registration, safe as a file's name.
        """
        self.span: int | None = registration.span
        self.at_once: int | None = groups.first_rows
        self._groups = groups
        self._store = groups.store
        self._name = name
        self._registration = registration
        self._poll_s = poll_s

    def require(self, rows: int) -> None:
        """Raise SettingError if a run asks for more than one pass."""
        if rows > self._groups.rows:
            raise SettingError(
                f"tokens={rows} is more than the {self._groups.rows} rows that one pass over the "
                f"ring {self._store.name} surely has, and what was read is freed; lower it, or "
                "harvest without max_bytes="
            )

    def begin(self, batch: int | None, fallback: int = 0) -> None:
        """Register for everything from batch number `batch` on, and from `fallback` on if it is
        there.

        Raises:
            StoreError: a part of what is needed is freed.
        """
        everything = self._groups.training_units
        passed = everything if batch is None else self._passed(batch)
        needs = self._registration._replace(passed=passed)
        wants = self._passed(fallback)
        self._registration = ring_state.register(self._store.place, self._name, needs, wants)

    def round(self, batch: int) -> int:
        return self._groups.locate(batch)[0]

    def has(self, batch: int) -> bool:
        return self._groups.has(batch)

    def wait(self, batch: int, stop: StopRequest) -> None:
        """Wait until batch number `batch` can be read, or until a signal comes."""
        if self._groups.has(batch):
            return

        def told() -> str:
            return (
                f"waiting for the harvest: {self._groups.committed()} of {self._store.units} units "
                f"are there, not yet batch {batch:,}"
            )

        tell(told())
        with heartbeat(told()):
            while not self._groups.has(batch) and stop.signum is None:
                time.sleep(self._poll_s)
                note(told())

    def release(self, batch: int) -> None:
        """Record that nothing before batch number `batch` is needed any more."""
        self._advance(self._passed(batch))

    def finish(self) -> None:
        """Record that nothing is needed any more."""
        self._advance(self._groups.training_units)

    def held_up_by(self, other: Follower, batch: int) -> str | None:
        """How to give up another run, if a batch cannot come while that one stands still.

        The harvest makes a unit if the ring holds it beside all units from the slowest run's on.
        """
        place = self._store.place
        if not isinstance(other, RingFollower) or other._store.place.name != place.name:
            return None
        standing = ring_state.registrations(place).get(other._name)
        state = ring_state.read(place)
        if standing is None or state is None or self._groups.has(batch):
            return None
        points = len(state.layers)
        chunk = self._store.manifest["chunk"]
        most = ring_state.unit_bytes(self._store.unit_tokens, chunk, self._store.d_model, points)
        room = state.max_bytes // most - len(state.held_out)  # training units at a time
        end = min((self.round(batch) + 1) * state.span, self._groups.training_units)
        if end - standing.passed <= room:
            return None
        return f"delete {place.name}/{ring_state.REGISTRATIONS}/{other._name}.json"

    def _passed(self, batch: int) -> int:
        """Training units of the groups before the one in which a batch begins."""
        passed = self.round(batch) * self._registration.span
        return min(passed, self._groups.training_units)

    def _advance(self, passed: int) -> None:
        if passed > self._registration.passed:
            self._registration = self._registration._replace(passed=passed)
            ring_state.advance(self._store.place, self._name, self._registration)
