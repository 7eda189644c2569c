"""Leases: claims where there are no locks, as in a bucket.

A lease is a small object, commits/leases/CLAIM. It is created only if it is not there. Its holder
writes it again while it works, and removes it when the work is done. Whoever has seen the same
object for `life_s` seconds by a clock of its own takes it over, by a put that succeeds only if the
object is still the one that was seen. So one process takes over what a dead one held, and no two
clocks are compared.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

from residual_saes.data import stopping
from residual_saes.data.errors import StoreError
from residual_saes.data.store.claims import FIRST_UNIT, METADATA, PRESENCE, RING, SPINE

FOLDER = "commits/leases"
LIFE_S = 30.0  # of a lease that nobody renews
_NAMES = {SPINE: "spine", METADATA: "metadata", PRESENCE: "presence", RING: "ring"}


class Tag(NamedTuple):
    """What tells one version of an object from all others."""

    e_tag: str | None
    version: str | None = None  # where the service counts versions


class Tagged(NamedTuple):
    """An object as it was at one moment."""

    data: bytes
    tag: Tag


class Objects(Protocol):
    """What leases need of a place (data/store/place.py)."""

    def names(self, folder: str) -> list[str]:
        """Names of the finished objects directly in `folder`."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that is not there yet; if it is there, do nothing and return False."""
        ...

    def read_tagged(self, key: str) -> Tagged:
        """An object and its tag; FileNotFoundError if there is none."""
        ...

    def replace(self, key: str, data: bytes, tag: Tag) -> bool:
        """Write an object if it still has this tag; if not, do nothing and return False."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing if there is none."""
        ...


class Leases:
    """The leases of one process; see `data.store.claims.Claims`."""

    exact = False

    def __init__(self, place: Objects, life_s: float = LIFE_S, poll_s: float = 2.0) -> None:
        """Take no lease yet.

        Args:
            life_s: seconds that a lease must be unchanged before it is taken over. Give all
                processes the same.
            poll_s: between two looks at a lease that is waited for.
        """
        self.poll_s = poll_s
        self._place = place
        self._life_s = life_s
        self._owner = os.urandom(8).hex()
        self._lock = threading.Lock()  # the writer's threads release leases
        self._written: dict[int, float] = {}  # when each of ours was last written
        self._seen: dict[int, tuple[Tag, float]] = {}  # others' tags, and when each was first seen
        self._writes = 0
        self._closed = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="leases", daemon=True)
        stopping.last_acts.append(self.close)

    def take(self, claim: int) -> bool:
        with self._lock:
            if claim in self._written:
                return True
        since = time.monotonic()
        taken = claim not in self._seen and self._place.create(_key(claim), self._body())
        if not taken and not self._take_what_is_there(claim):
            return False
        self._seen.pop(claim, None)
        with self._lock:
            self._written[claim] = since
            if self._renewal.ident is None:
                self._renewal.start()
        return True

    def _take_what_is_there(self, claim: int) -> bool:
        """Take a lease that another process holds, or held when this one last looked."""
        key = _key(claim)
        try:
            there = self._place.read_tagged(key)
        except FileNotFoundError:
            return self._place.create(key, self._body())
        if self._is_ours(there):  # the answer to our put was lost
            return True
        now = time.monotonic()
        tag, since = self._seen.setdefault(claim, (there.tag, now))
        if there.tag != tag:
            self._seen[claim] = there.tag, now
            return False
        return now - since > self._life_s and self._replace(key, there)

    def _replace(self, key: str, there: Tagged) -> bool:
        """Write a lease if it is still the one that was read."""
        if self._place.replace(key, self._body(), there.tag):
            return True
        try:
            return self._is_ours(self._place.read_tagged(key))  # the answer was lost
        except FileNotFoundError:
            return False

    def _body(self) -> bytes:
        """The bytes of a lease of this process, other ones each time: so its tag changes."""
        self._writes += 1
        return json.dumps({"owner": self._owner, "number": self._writes}).encode()

    def _is_ours(self, there: Tagged) -> bool:
        return self._owner.encode() in there.data

    @contextmanager
    def held(self, claim: int) -> Iterator[None]:
        """Hold a lease for a `with` block, after waiting for it."""
        while not self.take(claim):
            time.sleep(self.poll_s)
        try:
            yield
        finally:
            self.release(claim)

    def release(self, claim: int) -> None:
        with self._lock:
            written = self._written.pop(claim, None)
        # One that was not renewed in time may be another's by now.
        if written is not None and time.monotonic() - written < self._life_s:
            with suppress(StoreError):  # without a connection: it ends by itself
                self._place.delete(_key(claim))

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Never certain: a process that holds no lease leaves no trace."""
        yield False

    def clear(self) -> None:
        """Remove the leases of dead processes on units that they had committed."""
        for name in self._place.names(FOLDER):
            if name.isdecimal():
                self._place.delete(f"{FOLDER}/{name}")

    def close(self) -> None:
        """Give all leases back."""
        self._closed.set()
        if self.close in stopping.last_acts:
            stopping.last_acts.remove(self.close)
        for claim in list(self._written):
            self.release(claim)

    def _renew(self) -> None:
        """Write again each lease that grows old, until `close`."""
        pause = self._life_s / 6
        while not self._closed.wait(pause):
            with self._lock:
                old = time.monotonic() - 2 * pause
                claims = [claim for claim, written in self._written.items() if written < old]
            for claim in claims:
                # Without a connection it cannot be renewed: another process may take it over,
                # which costs work and no byte.
                with suppress(StoreError, OSError):
                    self._renew_one(claim)

    def _renew_one(self, claim: int) -> None:
        since = time.monotonic()
        there = self._place.read_tagged(_key(claim))
        kept = self._is_ours(there) and self._replace(_key(claim), there)
        with self._lock:
            if claim in self._written:
                if kept:
                    self._written[claim] = since
                else:
                    del self._written[claim]
        if kept and claim not in self._written:  # released meanwhile
            self._place.delete(_key(claim))


def _key(claim: int) -> str:
    return f"{FOLDER}/{_NAMES.get(claim) or f'{claim - FIRST_UNIT:08d}'}"
