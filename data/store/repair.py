"""Finding and dropping what a disk has damaged.

To repair a unit, dropping its record is enough: the next harvest makes the unit again. A pack that
holds the record goes before, or it would still be served. What follows from the records is written
again at once, or by the next harvest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from data.durable import Written
from data.errors import StoreError, TemporaryError
from data.journal import Progress
from data.store import manifest, packs, records
from data.store.place import Place
from data.store.retention import Absences
from data.store.ring_state import REGISTRATIONS
from data.store.store import Store
from data.store.verified import Verified, nowhere

_FOLDERS = (
    "commits/spine",
    "commits/residuals",
    "commits/scales",
    "commits/summaries",
    REGISTRATIONS,
)


def damage(place: Place, sound: Verified | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every record whose objects are not whole, and every zarr.json that is not what it must be.

    Gives the key of each, with what is wrong, a line each. Reads all that was ever committed, and
    shows how far it is where that takes long.

    Args:
        sound: records that were found whole already; those that are now are added.
    """
    damaged = False
    sound = nowhere() if sound is None else sound
    keys = list(_records(place))
    progress = Progress(quiet_s=5.0)
    for number, key in enumerate(keys, 1):
        progress.show(f"checking the digests of record {number:,} of {len(keys):,}")
        if wrong := list(_wrong_with_record(place, key, sound)):
            damaged = True
            yield key, wrong
    progress.close()
    for pack in packs.there(place):
        if wrong := list(_wrong_with_pack(place, pack.key, sound)):
            damaged = True
            yield pack.key, wrong
    if damaged:
        return
    # Metadata follows from the records, so it can be compared only when they are whole.
    for key, text in Store.open(place).metadata(()).items():
        if wrong_here := _wrong_with_text(place, key, text):
            yield key, [wrong_here]


def _records(place: Place) -> Iterator[str]:
    """The keys of every record that a repair may drop. commits/ring.json is none of them."""
    yield manifest.KEY
    for folder in _FOLDERS:
        for name in sorted(place.names(folder)):
            if name.endswith(".json"):
                yield f"{folder}/{name}"


def _wrong_with_record(place: Place, key: str, sound: Verified) -> Iterator[str]:
    """What is wrong with a record and its objects; the record joins `sound` if it is nothing."""
    try:
        data = place.read(key)
    except OSError as error:
        yield _unread(place, key, error)
        return
    if wrong := records.fault(data):
        yield f"{place.name}/{key} {wrong}"
        return
    checksum = records.checksum(data)
    if sound.was_whole(checksum):
        return
    damaged = list(_damaged_objects(place, records.decode(data, key)))
    yield from damaged
    if not damaged:
        sound.add(checksum)


def _wrong_with_pack(place: Place, key: str, sound: Verified) -> Iterator[str]:
    try:
        lines = packs.decode(place.read(key), f"{place.name}/{key}")
    except (OSError, StoreError) as error:
        yield f"{place.name}/{key} cannot be read: {error}"
        return
    stale = [line for line in lines if records.checksum(line) not in sound]
    if stale:
        yield f"{place.name}/{key} packs {len(stale)} records that are damaged or not there"


def _damaged_objects(place: Place, record: dict[str, Any]) -> Iterator[str]:
    absences = Absences(place)
    for key, written in record.get("objects", {}).items():
        try:
            if place.digest(key) != Written(*written):
                yield f"{place.name}/{key} does not hold the bytes that were committed"
        except FileNotFoundError:
            # A summary's record names no unit, and nothing of it may be absent.
            if "unit" not in record or not absences.allow(key, record["unit"]):
                yield f"{place.name}/{key} is missing"
        except OSError as error:
            yield _unread(place, key, error)


def _wrong_with_text(place: Place, key: str, text: bytes) -> str | None:
    try:
        if place.read(key) == text:
            return None
    except FileNotFoundError:
        return f"{place.name}/{key} is missing: other Zarr readers need it"
    except OSError as error:
        return _unread(place, key, error)
    return f"{place.name}/{key} is not the metadata of this store: other Zarr readers go by it"


def _unread(place: Place, key: str, error: OSError) -> str:
    """The line for what cannot be read; raises where that is no damage of the object."""
    if isinstance(error, ConnectionError | TimeoutError):
        raise error
    return f"{place.name}/{key} cannot be read: {error.strerror or error}"


def repair(place: Place) -> list[str]:
    """Drop damaged records; rebuild the manifest and zarr.json where they are damaged.

    The next harvest makes the units of dropped records again, and packs. Gives the keys of both;
    `is_derived` tells them apart.

    Raises:
        StoreError: there is no store, or a harvest is writing it.
    """
    require_store(place)
    with closing(place.claims()) as claims, claims.alone() as alone:
        if claims.exact and not alone:
            raise TemporaryError(
                f"{place.name} is being written; stop the harvest before repairing"
            )
        damaged = [key for key, _ in damage(place)]
        metadata = {key for key in damaged if _is_metadata(key)}
        for key in sorted(damaged, key=is_pack, reverse=True):  # packs before their records
            if key not in metadata:
                place.delete(key)
        if manifest.KEY in damaged:
            _restore_manifest(place)
        if metadata:  # then all records are whole
            _restore_metadata(place, metadata)
    return damaged


def require_store(place: Place) -> None:
    """Raise StoreError if there is no store; one that lost its manifest can be repaired."""
    if not (manifest.exists(place) or any(place.names(folder) for folder in _FOLDERS)):
        raise StoreError(
            f"no activation store at {place.name}; make one with "
            f"`python -m harvest store={place.name} ...`"
        )


def is_derived(key: str) -> bool:
    """Whether `repair` can rebuild the object from the rest of the store."""
    return key == manifest.KEY or _is_metadata(key)


def is_pack(key: str) -> bool:
    """Whether the object only copies records; a harvest may do without it."""
    return key.startswith(f"{packs.FOLDER}/")


def _is_metadata(key: str) -> bool:
    return key.rpartition("/")[2] == "zarr.json"


def _restore_metadata(place: Place, keys: set[str]) -> None:
    for key, text in Store.open(place).metadata(()).items():
        if key in keys:
            place.write(key, [text])


def _restore_manifest(place: Place) -> None:
    """Write the manifest again from its copy in the Zarr group.

    A later harvest compares it with its own settings as ever.
    """
    try:
        copy = json.loads(place.read("zarr.json"))["attributes"]["manifest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the manifest of {place.name} is damaged, and so is its copy in zarr.json: nothing "
            "says any more what the store was made from; harvest it anew"
        ) from error
    place.create(manifest.KEY, records.encode(copy))
