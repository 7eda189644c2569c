"""Claims: which process makes which unit, among all that write one store.

With POSIX locks a claim is a lock on one byte of one file. It needs no clock and no clean-up: the
kernel drops it when its process ends, so the units of a killed process are free at once. Without
such locks, as on an object store, ranks divide the units by number.

Claims only save work. Two processes that make the same unit do no harm: they write the same bytes,
and the unit's record is created once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from data import durable, locks
from data.errors import StoreError
from data.journal import tell

# Claims of other things than units: reading the text, writing Zarr metadata, being at work in the
# store, changing a ring's records.
SPINE, METADATA, PRESENCE, RING = range(4)
_FIRST_UNIT = 16  # the claim of unit 0


def unit_claim(unit: int) -> int:
    """The number of a unit's claim."""
    return _FIRST_UNIT + unit


class Claims(Protocol):
    """What this process may make."""

    exact: bool  # whether a refused claim means that a living process holds it

    def take(self, claim: int) -> bool:
        """Take a claim without waiting; False if another process holds it."""
        ...

    def held(self, claim: int) -> AbstractContextManager[None]:
        """Hold a claim for a `with` block, after waiting for it where claims are exact."""
        ...

    def release(self, claim: int) -> None:
        """Give a claim back."""
        ...

    def alone(self) -> bool:
        """Whether it is certain that no other process is at work in the store."""
        ...

    def take_over(self) -> None:
        """Make the units of silent ranks too, where claims are not exact."""
        ...

    def close(self) -> None:
        """Give every claim back."""
        ...


class FileClaims:
    """Locks on the bytes of a file.

    Open one per process and store: POSIX drops all locks that a process has on a file when the
    process closes any handle of it.
    """

    exact = True

    def __init__(self, file: Path, folder: Path) -> None:
        """Join the processes at work in `folder`.

        The first of them removes the temporary files of killed processes.

        Raises:
            NoLocksError: the file system has no locks.
        """
        durable.make_directory(file.parent)
        self._folder = folder
        with durable.refusals(file):
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if self.alone():
                durable.sweep(folder)
            elif not self._lock(PRESENCE, fcntl.LOCK_SH | fcntl.LOCK_NB):
                tell(f"{folder} is being repaired or cleaned up by another process: waiting for it")
            self._lock(PRESENCE, fcntl.LOCK_SH)
        except OSError as error:
            os.close(self._handle)
            if error.errno not in locks.NONE:
                raise
            raise NoLocksError(
                f"{folder} is on a file system without locks ({error.strerror})"
            ) from error

    def _lock(self, claim: int, how: int) -> bool:
        return durable.lock(fcntl.lockf, self._handle, how, 1, claim)

    def alone(self) -> bool:
        """Whether no other process is at work here; if so, none can come before `close`."""
        return self._lock(PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def take(self, claim: int) -> bool:
        return self._lock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @contextmanager
    def held(self, claim: int) -> Iterator[None]:
        """Hold a claim for a `with` block, after waiting for it."""
        self._lock(claim, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self.release(claim)

    def release(self, claim: int) -> None:
        self._lock(claim, fcntl.LOCK_UN)

    def take_over(self) -> None:
        raise AssertionError("a lock ends with its process: there is nothing to take over")

    def close(self) -> None:
        """Leave; the last to go removes the temporary files of killed processes."""
        if self.alone():
            durable.sweep(self._folder)
        os.close(self._handle)


class NoLocksError(StoreError):
    """The file system has no locks that end with their process."""


class NumberedClaims:
    """Claims by number, for places without locks: rank r of w makes units r, r + w, r + 2 w, ..."""

    exact = False

    def __init__(self, rank: int, world: int) -> None:
        self._rank = rank
        self._world = world

    def take(self, claim: int) -> bool:
        if claim < _FIRST_UNIT:
            return self._rank == 0
        return (claim - _FIRST_UNIT) % self._world == self._rank

    @contextmanager
    def held(self, claim: int) -> Iterator[None]:
        yield

    def release(self, claim: int) -> None:
        pass

    def alone(self) -> bool:
        return False

    def take_over(self) -> None:
        self._rank = 0
        self._world = 1

    def close(self) -> None:
        pass
