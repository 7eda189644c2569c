"""The manifest: what a store's bytes follow from. Written once, compared on every later open.

It is the record commits/manifest.json, which is created before all others. The Zarr group's
attributes repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from residual_saes.data.errors import MismatchError, StoreError, differences
from residual_saes.data.store import records
from residual_saes.data.store.claims import Claims
from residual_saes.data.store.place import Place

FORMAT = 2
KEY = "commits/manifest.json"


def exists(place: Place) -> bool:
    """Whether there is a store."""
    return place.exists(KEY)


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


def agree(place: Place, settings: Mapping[str, Any], claims: Claims) -> dict[str, Any]:
    """The manifest of the store; created from `settings` where there is none.

    Args:
        claims: this process's. Without them, a process that believes to be alone would remove the
            temporary of the manifest while it is written.

    Raises:
        MismatchError: the store was made with other settings; the message names both values.
        StoreError: something else is there.
    """
    wanted = {"format": FORMAT, **settings}
    if not exists(place):
        require_free(place)
        # If another process was first, its manifest is compared below.
        place.create(KEY, records.encode(wanted))
    there = read(place)
    if unequal := differences(there, wanted):
        with claims.alone() as alone:
            # Without a commit there is nothing to protect.
            if not alone or not _untouched(place):
                raise _mismatch(place, unequal)
            place.write(KEY, [records.encode(wanted)])
        return wanted
    return there


def require_same(place: Place, wanted: Mapping[str, Any]) -> None:
    """Raise MismatchError if anything was committed under another manifest than `wanted`.

    The message names both values.
    """
    unequal = differences(read(place), wanted)
    if unequal and not _untouched(place):
        raise _mismatch(place, unequal)


def _mismatch(place: Place, unequal: Mapping[str, tuple[Any, Any]]) -> MismatchError:
    way_out = "Use those settings, or another store=."
    return MismatchError(f"store {place.name}", unequal, way_out)


def require_free(place: Place) -> None:
    """Raise StoreError if something lies there that is not a store."""
    # In this order: another process that begins the store at this moment creates its manifest
    # first.
    if not place.empty() and not exists(place):
        raise StoreError(
            f"{place.name} exists and is not an activation store; choose another store="
        )


def _untouched(place: Place) -> bool:
    """Whether nothing was ever committed."""
    folders = ("spine", "residuals", "scales", "summaries")
    return not any(place.names(f"commits/{folder}") for folder in folders)
