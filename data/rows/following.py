"""A training run that follows a ring: its registration, and its waiting for the harvest."""

from __future__ import annotations

import time

from data.errors import SettingError, StopRequest
from data.journal import tell
from data.rows.reader import Reader
from data.rows.split import training_units
from data.store import freed, ring
from data.store.store import Store

_POLL_S = 0.2  # between looks for what a harvest commits: 0.04 s each at 15,000 units


class RingFollower:
    """How a training run and a ring wait for each other: the registration of one reader."""

    def __init__(self, reader: Reader, store: Store, layer: int, name: str, run: str) -> None:
        """Nothing is registered yet.

        Args:
            name: of the registration, safe as a file's.
            run: what users are told that the ring waits for.
        """
        assert reader.span is not None
        self.span: int | None = reader.span
        self._reader, self._store, self._name = reader, store, name
        self._units = len(training_units(store))
        self._said = freed.Follower(run, layer, reader.span, 0)

    def require(self, rows: int) -> None:
        """Raise SettingError if a run asks for more than one pass."""
        if rows > self._reader.rows:
            raise SettingError(
                f"tokens={rows} is more than the {self._reader.rows} rows that one pass over the ring "
                f"{self._store.name} surely has, and what was read is freed; lower it, or harvest without max_bytes="
            )

    def begin(self, batch: int) -> None:
        """Register for everything from batch number `batch` on.

        Raises:
            StoreError: a part of it is gone.
        """
        self._said = self._said._replace(passed=self._passed(batch))
        ring.register(self._store.place, self._name, self._said)

    def round(self, batch: int) -> int:
        """The round in which batch number `batch` begins."""
        return self._reader.locate(batch)[0]

    def has(self, batch: int) -> bool:
        """Whether batch number `batch` can be read without waiting, or none will follow: for
        `windows.to_device`.
        """
        return self._reader.has(batch)

    def wait(self, batch: int, stop: StopRequest) -> None:
        """Come back when batch number `batch` can be read, or a signal came."""
        told = False
        while not self._reader.has(batch) and stop.signum is None:
            if not told:
                there = int(self._store.committed(self._said.layer).sum())
                tell(
                    f"waiting for the harvest: {there} of {self._store.units} units are there, not yet batch {batch:,}"
                )
            told = True
            time.sleep(_POLL_S)

    def release(self, batch: int) -> None:
        """Say that nothing before batch number `batch` is needed any more."""
        self._say(self._passed(batch))

    def finish(self) -> None:
        """Say that nothing is needed any more."""
        self._say(self._units)

    def _passed(self, batch: int) -> int:
        return min(self.round(batch) * self._said.span, self._units)

    def _say(self, passed: int) -> None:
        if passed > self._said.passed:
            self._said = self._said._replace(passed=passed)
            ring.advance(self._store.place, self._name, self._said)
