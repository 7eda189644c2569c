"""Finding and dropping what a disk has damaged.

Dropping a unit's record is all that a repair needs: a unit without a record is made again by the next harvest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import durable, records
from data.durable import Written
from data.errors import StoreError


def damage(store: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each commit record of the store whose unit is not whole, with what is wrong, a line each."""
    for record in sorted((store / "commits").glob("*/*.json")):
        try:
            body = records.read(record)
        except StoreError as error:
            yield record, [str(error)]
            continue
        if wrong := list(_damaged_objects(store, body)):
            yield record, wrong


def _damaged_objects(store: Path, body: dict[str, Any]) -> Iterator[str]:
    for key, written in body.get("objects", {}).items():
        path = store / key
        if not path.exists():
            yield f"{path} is missing"
        elif durable.digest_file(path) != Written(*written):
            yield f"{path} does not hold the bytes that were committed"


def repair(store: Path) -> list[Path]:
    """Drop the records of damaged units, so that the next harvest makes them again; which were dropped.

    Raises:
        StoreError: there is no store, or a harvest is writing it.
    """
    if not (store / "zarr.json").is_file():
        raise StoreError(f"no activation store at {store}")
    with durable.locked(store, f"{store} is being written; stop the harvest before repairing"):
        dropped = [record for record, _ in damage(store)]
        for record in dropped:
            record.unlink()
            durable.sync_directory(record.parent)
    return dropped
