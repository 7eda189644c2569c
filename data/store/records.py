"""Commit records: small JSON texts that carry their own checksum and are created once or not at
all.

A record is the only thing that says that a unit exists. Layout and file names alone never do: Zarr
readers take a missing or empty object for zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data import durable
from data.errors import StoreError

# The checksum stands first, at a fixed place, and is over the bytes behind it: a store of a billion
# tokens has 30,000 records, and writing each out anew to check it would take longer than all else
# at its opening.
_HEAD = b'{"checksum":"'
_BODY = len(_HEAD) + 34  # 32 digits, a quotation mark and a comma


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(body: Mapping[str, Any]) -> str:
    """xxh3_128 of a JSON mapping, whatever the order of its keys."""
    return durable.digest(_canonical(body))


def encode(body: Mapping[str, Any]) -> bytes:
    """The record of a non-empty `body`."""
    rest = _canonical(body)[1:] + b"\n"
    return _HEAD + durable.digest(rest).encode() + b'",' + rest


def decode(data: bytes, name: str) -> dict[str, Any]:
    """The body of the record that `data` is.

    Args:
        name: what an error calls it.

    Raises:
        StoreError: it is not a record, or not the one that was written.
    """
    if wrong := fault(data):
        raise StoreError(f"{name} {wrong}; {_way_out(name)}")
    return dict(json.loads("{" + data[_BODY:].decode("ascii")))


def fault(data: bytes) -> str | None:
    """What is wrong with the bytes of a record; None if they are what was written."""
    if not data.startswith(_HEAD) or data[_BODY - 2 : _BODY] != b'",':
        return "is not a commit record"
    if durable.digest(data[_BODY:]).encode() != data[len(_HEAD) : _BODY - 2]:
        return "does not match its own checksum"
    return None


def _way_out(name: str) -> str:
    store, _, _ = name.rpartition("/commits/")
    command = (
        f"`python -m harvest action=repair store={store}`"
        if store
        else "`action=repair` of its store"
    )
    return f"{command} drops it, and harvesting again redoes its unit"
