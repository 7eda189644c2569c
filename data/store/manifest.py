"""The manifest: what a store's bytes follow from. Written once, compared on every later open.

It is the record commits/manifest.json, which is created before all others. The Zarr group's
attributes repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from data.errors import MismatchError, StoreError, differences
from data.store import records
from data.store.place import Place

FORMAT = 2
KEY = "commits/manifest.json"


def exists(place: Place) -> bool:
    """Whether there is a store."""
    return "manifest.json" in place.names("commits")


def read(place: Place) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        StoreError: there is no store, or it is of another format.
    """
    try:
        manifest = records.decode(place.read(KEY), f"{place.name}/{KEY}")
    except FileNotFoundError as error:
        raise StoreError(
            f"no activation store at {place.name}; make one with "
            f"`python -m harvest store={place.name} ...`"
        ) from error
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"{place.name} has store format {manifest.get('format')!r}; this version reads "
            f"{FORMAT}: use the version of this package that made it"
        )
    return manifest


def agree(place: Place, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the store; created from `settings` where there is none.

    Raises:
        MismatchError: the store was made with other settings; the message names both values.
        StoreError: something else is there.
    """
    wanted = {"format": FORMAT, **settings}
    if not exists(place):
        require_free(place)
        # If another process was first, its manifest is compared below.
        place.create(KEY, records.encode(wanted))
    if require_same(place, wanted):
        return read(place)
    place.write(KEY, [records.encode(wanted)])  # without a commit there is nothing to protect
    return wanted


def require_same(place: Place, wanted: Mapping[str, Any]) -> bool:
    """Whether a store has the manifest `wanted`; False also means that nothing depends on its own.

    Raises:
        MismatchError: the store was made with other settings; the message names both values.
    """
    unequal = differences(read(place), wanted)
    if unequal and not _untouched(place):
        way_out = "Use those settings, or another store=."
        raise MismatchError(f"store {place.name}", unequal, way_out)
    return not unequal


def require_free(place: Place) -> None:
    """Raise StoreError if something lies there that is not a store."""
    # In this order: another process that begins the store at this moment creates its manifest
    # first.
    if not place.empty() and not exists(place):
        raise StoreError(
            f"{place.name} exists and is not an activation store; choose another store="
        )


def _untouched(place: Place) -> bool:
    """Whether nothing was ever committed, and no other process is about to commit."""
    for folder in ("spine", "residuals", "scales", "summaries"):
        if place.names(f"commits/{folder}"):
            return False
    with closing(place.claims(0, 1)) as claims:
        return claims.alone()
