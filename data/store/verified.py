"""How far a verification has come, kept in the store while it runs, so that a stop loses little.

    .verified    {"since": seconds since 1970, "records": [checksums of the records that are whole],
                  "store": its path or URL}

It is a record with a checksum of its own (data/store/records.py). It counts for a day, since bytes
may rot later, and not in a copy of the store. It is removed when a verification ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from residual_saes.data.errors import PipelineError, StoreError
from residual_saes.data.journal import tell
from residual_saes.data.store import records
from residual_saes.data.store.place import Place

KEY = ".verified"
_COUNTS_S = 86_400.0  # a file that was begun earlier is left alone


class Verified:
    """The records that are whole, by their checksums."""

    def __init__(self, place: Place | None, since: float, earlier: set[bytes], save_s: float):
        """
        Args:
            place: where it is kept; None: nowhere.
            since: seconds since 1970, when the first of them was checked.
            earlier: those that were found whole before a stop.
            save_s: seconds of checking that a stop may lose.
        """
        self._place = place
        self._since = since
        self._earlier = earlier
        self._records: set[bytes] = set()
        self._save_s = save_s
        self._saved = time.monotonic()

    def __contains__(self, checksum: bytes) -> bool:
        return checksum in self._records

    def was_whole(self, checksum: bytes) -> bool:
        """Whether a record that is there was found whole before the stop: then it counts."""
        if checksum not in self._earlier:
            return False
        self._records.add(checksum)
        return True

    def add(self, checksum: bytes) -> None:
        """Count a record whose objects are whole."""
        self._records.add(checksum)
        if self._place is not None and time.monotonic() - self._saved >= self._save_s:
            self._save(self._place)

    def _save(self, place: Place) -> None:
        whole = sorted(checksum.decode() for checksum in self._earlier | self._records)
        body = {"since": self._since, "records": whole, "store": _store(place)}
        try:
            place.write(KEY, [records.encode(body)])
        except (OSError, PipelineError) as error:
            tell(f"how far it is cannot be kept in {place.name}, so a stop begins anew: {error}")
            self._place = None
        self._saved = time.monotonic()


def nowhere() -> Verified:
    """Nothing was checked, and nothing is kept."""
    return Verified(None, 0.0, set(), 0.0)


@contextmanager
def kept(place: Place, save_s: float = 10.0) -> Iterator[Verified]:
    """What was found whole before a stop, to go on from; removed when the block ends.

    Args:
        save_s: seconds of checking that a stop may lose.
    """
    now = time.time()
    since, earlier = _read(place)
    if not 0 <= now - since < _COUNTS_S:
        since, earlier = now, set()
    if earlier:
        tell(
            f"{len(earlier):,} records were found whole before the last stop and are not read "
            f"again; delete {place.name}/{KEY} to read them too"
        )
    yield Verified(place, since, earlier, save_s)
    try:
        if place.exists(KEY):
            place.delete(KEY)
    except (OSError, PipelineError) as error:
        tell(f"{place.name}/{KEY} cannot be removed, and counts for nothing in a day: {error}")


def _read(place: Place) -> tuple[float, set[bytes]]:
    """When the file was begun, and its records; none of a file that is missing or damaged."""
    try:
        content = records.decode(place.read(KEY), KEY)
        if content["store"] == _store(place):
            return content["since"], {checksum.encode() for checksum in content["records"]}
    except (OSError, StoreError):
        pass
    return 0.0, set()


def _store(place: Place) -> str:
    return place.name if "://" in place.name else os.path.abspath(place.name)
