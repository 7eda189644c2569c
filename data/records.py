"""Commit records: small JSON files that carry their own checksum and are created once or not at all.

A record is the only thing that says that a unit exists. Layout and file names alone never do: Zarr readers take a
missing or empty object for zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data import durable
from data.errors import StoreError


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(body: Mapping[str, Any]) -> str:
    """xxh3_128 of a JSON mapping, whatever the order of its keys."""
    return durable.digest(_canonical(body))


def create(path: Path, body: Mapping[str, Any]) -> bool:
    """Commit `body` as `path`; False if another writer was first."""
    return durable.create(path, _canonical({**body, "checksum": digest(body)}) + b"\n")


def read(path: Path) -> dict[str, Any]:
    """The body of a record.

    Raises:
        StoreError: the file is not a record, or not the one that was written.
    """
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a commit record; {_WAY_OUT}") from error
    if checksum != digest(body):
        raise StoreError(f"{path} does not match its own checksum; {_WAY_OUT}")
    return dict(body)


_WAY_OUT = "`python -m harvest action=repair store=...` drops it, and harvesting again redoes its unit"
