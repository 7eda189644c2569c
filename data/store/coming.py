"""A ring that is coming: training may be started beside its harvest, before there is a store.

A harvest with max_bytes= says so as soon as its plan fits, before it loads its model: it takes one
of the claims COMING, which ends with its process. Training waits while one of them is taken, and
for `PATIENCE_S` without.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache

from residual_saes.data import durable
from residual_saes.data.journal import heartbeat, note, tell
from residual_saes.data.store import manifest, ring_state
from residual_saes.data.store.claims import COMING
from residual_saes.data.store.ledger import RESIDUALS
from residual_saes.data.store.place import CLAIMS, LocalPlace, Place, place_of

# A harvest that is started with the training loads libraries and asks the hub for its plan first.
PATIENCE_S = 30.0
_POLL_S = 0.2


@contextmanager
def announced(place: Place) -> Iterator[None]:
    """Have training wait for the ring that is harvested in the block.

    Raises:
        SettingError: the place has no locks, so there can be no ring.
    """
    with closing(place.claims()) as claims:
        ring_state.require_locks(claims, place)
        any(map(claims.take, COMING))
        yield


def is_announced(place: Place) -> bool:
    """Whether a process is at work on a ring, which may not be there yet."""
    if not isinstance(place, LocalPlace):
        return False
    try:
        handle = os.open(place.path / CLAIMS, os.O_RDONLY)
    except OSError:  # nobody was ever at work there
        return False
    try:
        # A shared lock: those who look are not in each other's way.
        how = fcntl.LOCK_SH | fcntl.LOCK_NB
        return not durable.lock(fcntl.lockf, handle, how, len(COMING), COMING.start)
    except OSError:  # without locks there is no ring
        return False
    finally:
        os.close(handle)


@cache  # the arms of a sweep wait once
def await_ring(path: str) -> None:
    """Return once the store at `path` has rows or is a ring, or once nothing points to one."""
    place = place_of(path)
    if not isinstance(place, LocalPlace) or _has_begun(place):
        return
    if not _may_begin(place):
        return
    lacking = "is no ring yet" if manifest.exists(place) else "is not there yet"
    tell(
        f"{path} {lacking}: waiting {PATIENCE_S:.0f}s for a `python -m harvest max_bytes=... "
        f"store={path}` to begin{_beside(place)}"
    )
    with heartbeat(f"waiting for a harvest of {path}"):
        deadline = time.monotonic() + PATIENCE_S
        while not _has_begun(place) and time.monotonic() < deadline:
            if is_announced(place):
                deadline = time.monotonic() + PATIENCE_S
                note(f"waiting for the harvest of {path}, which makes its tokens first")
            time.sleep(_POLL_S)


def _may_begin(place: LocalPlace) -> bool:
    """Whether a harvest can make a store here: in a folder with nothing else in it."""
    there = next(folder for folder in (place.path, *place.path.parents) if folder.exists())
    return there.is_dir() and (manifest.exists(place) or place.empty())


def _beside(place: LocalPlace) -> str:
    """The stores that a mistyped path may have meant."""
    folders = place.path.parent.glob("*.zarr")
    stores = [str(path) for path in sorted(folders) if path != place.path and path.is_dir()]
    more = f" and {len(stores) - 3} more" if len(stores) > 3 else ""
    return f"; there is {', '.join(stores[:3])}{more}" if stores else ""


def _has_begun(place: Place) -> bool:
    """Whether there is a ring, or a store with rows that is not becoming one."""
    if place.exists(ring_state.KEY):
        return True
    return bool(place.names(RESIDUALS)) and not is_announced(place)
