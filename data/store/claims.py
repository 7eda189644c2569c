"""Who makes what, among processes that write one store.

On a file system with POSIX locks a claim is a lock on one byte of one file: it needs no clock and
no clean-up, and it ends with its process, so that what a killed process had in hand is free at
once. Without such locks, as on an object store, the work is shared out by number alone. Claims save
work and nothing else: that two processes make the same unit is harmless, since it has the same
bytes and its record is created once.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from data import durable
from data.errors import StoreError
from data.journal import tell

SPINE, METADATA, PRESENCE, RING = range(4)  # what else there is to claim
_UNITS = 16  # claims of units begin here
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def unit(number: int) -> int:
    """The claim of a unit."""
    return _UNITS + number


class Claims(Protocol):
    """What this process may make."""

    exact: bool  # whether a refused claim means that a living process holds it

    def take(self, claim: int) -> bool:
        """Whether the claim is ours now; it is never waited for."""
        ...

    def held(self, claim: int) -> AbstractContextManager[None]:
        """Hold a claim, waiting for it where it is exact."""
        ...

    def release(self, claim: int) -> None:
        """Give a claim back."""
        ...

    def take_over(self) -> None:
        """Take the shares of ranks that are silent for our own, where claims are not exact."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class FileClaims:
    """Locks on the bytes of a file. Open one per process and store: closing any one gives back the
    locks of all.
    """

    exact = True

    def __init__(self, file: Path, folder: Path) -> None:
        """Join the processes at work in `folder`; the first to come removes what killed ones left
        half written.

        Raises:
            StoreError: the file system has no locks.
        """
        durable.make_directory(file.parent)
        self._folder = folder
        with durable.refusals(file):
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if self._lock(PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB):
                durable.sweep(folder)
            else:
                self._wait_for_room(folder)
            self._lock(PRESENCE, fcntl.LOCK_SH)
        except OSError as error:
            os.close(self._handle)
            if error.errno not in _NO_LOCKS:
                raise
            raise NoLocksError(
                f"{folder} is on a file system without locks ({error.strerror})"
            ) from error

    def _wait_for_room(self, folder: Path) -> None:
        if not self._lock(PRESENCE, fcntl.LOCK_SH | fcntl.LOCK_NB):
            tell(f"{folder} is being repaired or cleaned up by another process: waiting for it")

    def _lock(self, claim: int, how: int) -> bool:
        try:
            fcntl.lockf(self._handle, how, 1, claim)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def alone(self) -> bool:
        """Whether no other process is at work here; if so, none can come before `close`."""
        return self._lock(PRESENCE, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def take(self, claim: int) -> bool:
        return self._lock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @contextmanager
    def held(self, claim: int) -> Iterator[None]:
        """Hold a claim, waiting for it."""
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
        """Leave; the last to go removes what a killed one left half written meanwhile."""
        if self.alone():
            durable.sweep(self._folder)
        os.close(self._handle)


class NoLocksError(StoreError):
    """The medium has no locks that die with their process."""


class Shares:
    """The unit's number says whose it is: for places without locks."""

    exact = False

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world

    def take(self, claim: int) -> bool:
        return (claim - _UNITS) % self._world == self._rank if claim >= _UNITS else self._rank == 0

    @contextmanager
    def held(self, claim: int) -> Iterator[None]:
        yield

    def release(self, claim: int) -> None:
        pass

    def take_over(self) -> None:
        self._rank, self._world = 0, 1

    def close(self) -> None:
        pass
