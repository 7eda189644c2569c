"""Finding and dropping what a disk has damaged.

To repair a unit, dropping its record is enough: the next harvest makes the unit again. A pack that
holds the record goes before, or it would still be served. What follows from the records is written
again at once, or by the next harvest.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

from residual_saes.data.durable import Written
from residual_saes.data.errors import StoreError, TemporaryError
from residual_saes.data.journal import Progress
from residual_saes.data.site import HookPoint
from residual_saes.data.store import codec, ledger, manifest, packs, records, ring_state, zarr_json
from residual_saes.data.store.arrays import Arrays, points_of
from residual_saes.data.store.packs import Pack
from residual_saes.data.store.place import Place
from residual_saes.data.store.retention import Absences
from residual_saes.data.store.ring_state import REGISTRATIONS
from residual_saes.data.store.store import Store
from residual_saes.data.store.verified import Verified, nowhere
from residual_saes.data.store.zarr_json import GROUP, Found

_FOLDERS = (
    "commits/spine",
    "commits/residuals",
    codec.FITS,
    "commits/summaries",
    REGISTRATIONS,
)

# What a disk answers for an object that it has lost, and for what lies in its place. Anything else
# (of rights, of a network, of this process) says nothing of the object.
_OF_THE_MEDIUM = {
    *(errno.ENOENT, errno.EIO, errno.EBADMSG, errno.ENODATA, errno.ENXIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
}


def damage(place: Place, sound: Verified | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every record whose objects are not whole, and every zarr.json that is not what it must be.

    Gives the key of each, with what is wrong, a line each. Reads all that was ever committed, and
    shows how far it is where that takes long.

    What a harvest or a repair does meanwhile is no damage: what follows from something is read
    before it, and what is not there any more is let go. What is committed meanwhile may be left
    out.

    Args:
        sound: records that were found whole already; those that are now are added.

    Raises:
        StoreError: there is no store.
    """
    damaged = False
    require_store(place)
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
        if wrong := list(_wrong_with_pack(place, pack, sound)):
            damaged = True
            yield pack.key, wrong
    if damaged:
        return
    # Metadata follows from the records, so it can be compared only when they are whole.
    yield from _wrong_with_metadata(place)


def _records(place: Place) -> Iterator[str]:
    """The keys of every record: those that a repair may drop, and those that it writes again."""
    yield manifest.KEY  # it was there before the others that are listed here
    yield from filter(place.exists, (ring_state.KEY, ring_state.COPY))
    for folder in _FOLDERS:
        for name in sorted(place.names(folder)):
            if name.endswith(".json"):
                yield f"{folder}/{name}"


def _wrong_with_record(place: Place, key: str, sound: Verified) -> Iterator[str]:
    """What is wrong with a record and its objects; the record joins `sound` if it is nothing."""
    try:
        data = place.read(key)
    except FileNotFoundError as error:
        # A repair may have dropped any other, and without a record there is nothing to be whole.
        if key == manifest.KEY:
            yield _unread(place, key, error)
        return
    except OSError as error:
        yield _unread(place, key, error)
        return
    if wrong := records.fault(data):
        yield f"{place.name}/{key} {wrong}"
        return
    checksum = records.checksum(data)
    record = records.decode(data, key)
    if not _is_named_right(key, record):
        yield f"{place.name}/{key} is the record of something else"
        return
    if sound.was_whole(checksum):
        return
    damaged = list(_damaged_objects(place, record))
    yield from damaged
    if not damaged:
        sound.add(checksum)


def _is_named_right(key: str, record: Mapping[str, Any]) -> bool:
    """Whether a record has the name of its unit."""
    return not {"unit", "objects"} <= record.keys() or key == ledger.key_of(record)


def _wrong_with_pack(place: Place, pack: Pack, sound: Verified) -> Iterator[str]:
    try:
        lines = packs.decode(place.read(pack.key), f"{place.name}/{pack.key}")
    except FileNotFoundError:  # a fuller one has replaced it
        return
    except StoreError as error:
        yield str(error)
        return
    except OSError as error:
        yield _unread(place, pack.key, error)
        return
    stale = 0
    for line in lines:
        if records.checksum(line) not in sound:  # a record that came meanwhile is read now
            for _ in _wrong_with_record(
                place, ledger.key_of(records.decode(line, pack.key)), sound
            ):
                pass
            stale += records.checksum(line) not in sound
    # A repair drops the pack before the records.
    if stale and place.exists(pack.key):
        yield f"{place.name}/{pack.key} packs {stale} records that are damaged or not there"


def _wrong_with_metadata(place: Place) -> Iterator[tuple[str, list[str]]]:
    try:
        found = Found(place)
    except OSError as error:
        yield GROUP, [_unread(place, GROUP, error)]
        return
    store = Store.open(place)  # behind `found`: it knows all that the metadata follows from
    unfitted = codec.unfitted(
        store.manifest["codec"], place, sorted({*found.points, *store.points})
    )
    for point in unfitted:
        key = codec.fit_key(point)
        yield key, [f"{place.name}/{key} is missing, without which no row can be decoded"]
    if not unfitted:
        for key, wrong in found.faults(_shapes(store, found), store.points):
            yield key, [f"{place.name}/{key} {wrong}"]


def _shapes(store: Store, found: Found) -> Iterator[Arrays]:
    """The arrays as they were planned, and as they are in the end."""
    yield store.arrays_of(store.planned_rows)
    if store.spine_end is not None:
        yield store.arrays
    elif found.rows is not None and found.rows < store.planned_rows:
        yield store.arrays_of(found.rows)  # a repair has dropped the record of the text's end


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


def _unread(place: Place, key: str, error: OSError) -> str:
    """The line for what cannot be read; raises where that is no damage of the object."""
    if error.errno not in _OF_THE_MEDIUM:
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
        for key in sorted(damaged, key=is_pack, reverse=True):  # packs before their records
            if ring_state.is_ours(key):
                ring_state.mend(place, key)  # without it, rows could go that its run needs
            elif not zarr_json.is_key(key):
                place.delete(key)
        if manifest.KEY in damaged:
            _restore_manifest(place)
        for key in damaged:
            if (point := codec.fitted_point(key)) is not None:
                _restore_fit(place, point)
        if any(map(zarr_json.is_key, damaged)):  # then all records are whole
            _restore_metadata(place)
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
    if ring_state.is_ours(key):
        return True
    return key == manifest.KEY or zarr_json.is_key(key) or codec.fitted_point(key) is not None


def is_pack(key: str) -> bool:
    """Whether the object only copies records; a harvest may do without it."""
    return key.startswith(f"{packs.FOLDER}/")


def _restore_metadata(place: Place) -> None:
    declared = points_of(place.folders())  # of some of them, no unit may be there yet
    for key, text in Store.open(place).metadata(declared).items():
        place.write(key, [text])


def _restore_fit(place: Place, point: HookPoint) -> None:
    """Write the statistics of a lossy codec again from their copies in Zarr metadata."""
    if not codec.restore_fit(place, point) and ledger.count_residuals(place, [point]):
        raise StoreError(
            f"{place.name}/{codec.fit_key(point)} is damaged, and so are its copies in zarr.json: "
            f"nothing says any more how the rows of {point} are decoded; harvest anew, into "
            "another store="
        )


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
