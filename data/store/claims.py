"""Claims: which process makes which unit, among all that write one store.

With POSIX locks a claim is a lock on one byte of one file. It needs no clock and no clean-up: the
kernel drops it when its process ends, so the units of a killed process are free at once. Without
such locks, as in a bucket, a claim is a lease (data/store/leases.py).

Claims only save work. Two processes that make the same unit do no harm: they write the same bytes,
and the unit's record is created once.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from residual_saes.data import durable, locks
from residual_saes.data.errors import StoreError
from residual_saes.data.journal import tell

# Claims of other things than units: reading the text, writing Zarr metadata, being at work in the
# store, changing a ring's records.
SPINE, METADATA, PRESENCE, RING = range(4)
FIRST_UNIT = 16  # the claim of unit 0
COMING = range(4, FIRST_UNIT)  # a process takes one of them while it makes a ring
_POLL_S = 0.1  # a look lists all records: 40 ms for 30,000
_QUIET_S = 2.0  # of a wait that is not worth a line


def unit_claim(unit: int) -> int:
    """The number of a unit's claim."""
    return FIRST_UNIT + unit


class Claims(Protocol):
    """What this process may make."""

    exact: bool  # whether a refused claim means that a living process holds it
    poll_s: float  # between two looks whether a claim is free or a commit has come

    def take(self, claim: int) -> bool:
        """Take a claim without waiting; False if another process holds it."""
        ...

    def held(self, claim: int) -> AbstractContextManager[None]:
        """Hold a claim for a `with` block, after waiting for it."""
        ...

    def release(self, claim: int) -> None:
        """Give a claim back."""
        ...

    def alone(self) -> AbstractContextManager[bool]:
        """Whether it is certain that no other process is at work in the store.

        If so, none can come before the `with` block ends.
        """
        ...

    def clear(self) -> None:
        """Remove the traces of all claims on units, once no unit is missing."""
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
    poll_s = _POLL_S

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
            with self.alone() as alone:
                if alone:
                    durable.sweep(folder)
        except OSError as error:
            os.close(self._handle)
            if error.errno not in locks.NONE:
                raise
            raise NoLocksError(
                f"{folder} is on a file system without locks ({error.strerror})"
            ) from error

    def _lock(self, claim: int, how: int) -> bool:
        return durable.lock(fcntl.lockf, self._handle, how, 1, claim)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process is at work here; if so, none can come in the `with` block."""
        alone = self._lock(PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield alone
        finally:
            self._share_presence()

    def _share_presence(self) -> None:
        """Be at work here beside others, after whoever wants to be alone."""
        told_at = time.monotonic() + _QUIET_S
        while not self._lock(PRESENCE, fcntl.LOCK_SH | fcntl.LOCK_NB):
            if time.monotonic() > told_at:
                told_at = math.inf
                tell(
                    f"{self._folder} is being repaired or cleaned up by another process: waiting "
                    "for it"
                )
            time.sleep(_POLL_S)

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

    def clear(self) -> None:
        pass  # a lock leaves no trace

    def close(self) -> None:
        """Leave; the last to go removes the temporary files of killed processes."""
        with self.alone() as alone:
            if alone:
                durable.sweep(self._folder)
        os.close(self._handle)


class NoLocksError(StoreError):
    """The file system has no locks that end with their process."""
