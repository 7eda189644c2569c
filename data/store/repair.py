"""Finding and dropping what a disk has damaged.

Dropping a record is all that a repair of a unit needs: without one it is made again by the next
harvest. What follows from the records is written again at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from data.durable import Written
from data.errors import StoreError
from data.store import manifest, records
from data.store.claims import FileClaims
from data.store.freed import READERS, Freed
from data.store.place import Place
from data.store.store import Store

_FOLDERS = ("commits/spine", "commits/residuals", "commits/scales", "commits/summaries", READERS)


def damage(place: Place) -> Iterator[tuple[str, list[str]]]:
    """Every record whose objects are not whole, and every piece of metadata that is not what it
    must be.

    Gives the key of each, with what is wrong, a line each. Reads all that was ever committed.
    """
    found = False
    for key in _records(place):
        if wrong := list(_wrong_with_record(place, key)):
            found = True
            yield key, wrong
    if not found:  # metadata follows from the records
        store = Store.open(place)
        for key, text in store.metadata(()).items():
            if wrong_here := _wrong_with_text(place, key, text):
                yield key, [wrong_here]


def _records(place: Place) -> Iterator[str]:
    yield manifest.KEY
    for folder in _FOLDERS:
        yield from (
            f"{folder}/{name}" for name in sorted(place.names(folder)) if name.endswith(".json")
        )


def _wrong_with_record(place: Place, key: str) -> Iterator[str]:
    try:
        data = place.read(key)
    except OSError as error:
        yield f"{place.name}/{key} cannot be read: {error.strerror or error}"
        return
    if wrong := records.fault(data):
        yield f"{place.name}/{key} {wrong}"
    else:
        yield from _damaged_objects(place, records.decode(data, key))


def _damaged_objects(place: Place, body: dict[str, Any]) -> Iterator[str]:
    freed = Freed(place)
    for key, written in body.get("objects", {}).items():
        try:
            if place.digest(key) != Written(*written):
                yield f"{place.name}/{key} does not hold the bytes that were committed"
        except FileNotFoundError:
            if key not in freed:
                yield f"{place.name}/{key} is missing"
        except OSError as error:
            yield f"{place.name}/{key} cannot be read: {error.strerror or error}"


def _wrong_with_text(place: Place, key: str, text: bytes) -> str | None:
    try:
        same = place.read(key) == text
    except FileNotFoundError:
        return f"{place.name}/{key} is missing: other Zarr readers need it"
    except OSError as error:
        return f"{place.name}/{key} cannot be read: {error.strerror or error}"
    return (
        None
        if same
        else f"{place.name}/{key} is not the metadata of this store: other Zarr readers go by it"
    )


def repair(place: Place) -> list[str]:
    """Drop damaged records, so that the next harvest makes their units again, and write again what
    follows from others.

    Gives the keys of both; `is_derived` tells them apart.

    Raises:
        StoreError: there is no store, or a harvest is writing it.
    """
    require_store(place)
    with closing(place.claims(0, 1)) as rights:
        if isinstance(rights, FileClaims) and not rights.alone():
            raise StoreError(f"{place.name} is being written; stop the harvest before repairing")
        damaged = [key for key, _ in damage(place)]
        metadata = {key for key in damaged if _is_metadata(key)}
        for key in damaged:
            if key not in metadata:
                place.delete(key)
        if manifest.KEY in damaged:
            _restore_manifest(place)
        if metadata:  # then all records are whole
            _restore_metadata(place, metadata)
    return damaged


def require_store(place: Place) -> None:
    """Raise StoreError if there is no store at all; one whose manifest is lost is one that can be
    repaired.
    """
    if not place.names("commits"):
        raise StoreError(
            f"no activation store at {place.name}; make one with `python -m harvest store={place.name} ...`"
        )


def is_derived(key: str) -> bool:
    """Whether a repair writes it again by itself, because it follows from what else is there."""
    return key == manifest.KEY or _is_metadata(key)


def _is_metadata(key: str) -> bool:
    return key.rpartition("/")[2] == "zarr.json"


def _restore_metadata(place: Place, keys: set[str]) -> None:
    for key, text in Store.open(place).metadata(()).items():
        if key in keys:
            place.write(key, [text])


def _restore_manifest(place: Place) -> None:
    """From the copy in the Zarr group, which a later harvest will compare with its own settings as
    ever.
    """
    try:
        copy = json.loads(place.read("zarr.json"))["attributes"]["manifest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the manifest of {place.name} is damaged, and so is its copy in zarr.json: nothing says any more what "
            "the store was made from; harvest it anew"
        ) from error
    place.create(manifest.KEY, records.encode(copy))
