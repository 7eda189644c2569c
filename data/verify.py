"""Finding and dropping what a disk has damaged.

Dropping a record is all that a repair needs: a unit without one is made again by the next harvest, and all that is
not a unit's follows from what is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from data import manifest, records
from data.claims import FileClaims
from data.durable import Written
from data.errors import StoreError
from data.place import Place
from data.ring import READERS, Freed
from data.store import Store

_FOLDERS = ("commits/spine", "commits/residuals", "commits/scales", "commits/summaries", READERS)


def damage(place: Place) -> Iterator[tuple[str, list[str]]]:
    """Every record whose objects are not whole, and every piece of metadata that is not what it must be.

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
        yield from (f"{folder}/{name}" for name in sorted(place.names(folder)) if name.endswith(".json"))


def _wrong_with_record(place: Place, key: str) -> Iterator[str]:
    try:
        body = records.decode(place.read(key), f"{place.name}/{key}")
    except StoreError as error:
        yield str(error)
    except OSError as error:
        yield f"{place.name}/{key} cannot be read: {error.strerror or error}"
    else:
        yield from _damaged_objects(place, body)


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
    return None if same else f"{place.name}/{key} is not the metadata of this store: other Zarr readers go by it"


def repair(place: Place) -> list[str]:
    """Drop the records of damaged units, so that the next harvest makes them again; which were dropped.

    Raises:
        StoreError: there is no store, or a harvest is writing it.
    """
    if not place.names("commits"):
        raise StoreError(f"no activation store at {place.name}")
    with closing(place.claims(0, 1)) as rights:
        if isinstance(rights, FileClaims) and not rights.alone():
            raise StoreError(f"{place.name} is being written; stop the harvest before repairing")
        dropped = [key for key, _ in damage(place)]
        for key in dropped:
            place.delete(key)
        if manifest.KEY in dropped:
            _restore_manifest(place)
    return dropped


def _restore_manifest(place: Place) -> None:
    """From the copy in the Zarr group, which a later harvest will compare with its own settings as ever."""
    try:
        copy = json.loads(place.read("zarr.json"))["attributes"]["manifest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the manifest of {place.name} is damaged, and so is its copy in zarr.json: nothing says any more what "
            "the store was made from; harvest it anew"
        ) from error
    place.create(manifest.KEY, records.encode(copy))
