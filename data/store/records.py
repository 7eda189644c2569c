"""Records: small JSON texts with a checksum of their own, created once or not at all.

A unit exists if it has a record. File names alone prove nothing: Zarr readers take a missing or
empty object for zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from residual_saes.data import durable
from residual_saes.data.errors import StoreError

# The checksum stands first, at a fixed position, and is over the bytes behind it. A store of a
# billion tokens has 30,000 records. To encode each again for its check would take longer than all
# else at the store's opening.
HEAD = b'{"checksum":"'
_BODY = len(HEAD) + 34  # 32 digits, a quotation mark and a comma


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(body: Mapping[str, Any]) -> str:
    """xxh3_128 of a JSON mapping; the order of its keys does not matter."""
    return durable.digest(_canonical(body))


def encode(body: Mapping[str, Any]) -> bytes:
    """The record of a non-empty `body`."""
    rest = _canonical(body)[1:] + b"\n"
    return HEAD + durable.digest(rest).encode() + b'",' + rest


def decode(data: bytes, name: str) -> dict[str, Any]:
    """The body of a record.

    Args:
        name: of the record in errors.

    Raises:
        StoreError: `data` is no record, or not the one that was written.
    """
    if wrong := fault(data):
        raise StoreError(f"{name} {wrong}; {_way_out(name)}")
    return dict(json.loads("{" + data[_BODY:].decode("ascii")))


def fault(data: bytes) -> str | None:
    """What is wrong with a record's bytes; None if they are the bytes that were written."""
    if not data.startswith(HEAD) or data[_BODY - 2 : _BODY] != b'",':
        return "is not a record"
    if durable.digest(data[_BODY:]).encode() != checksum(data):
        return "does not match its own checksum"
    return None


def checksum(data: bytes) -> bytes:
    """The checksum that a record states: 32 hexadecimal digits."""
    return data[len(HEAD) : _BODY - 2]


def _way_out(name: str) -> str:
    store, _, _ = name.rpartition("/commits/")
    command = (
        f"`python -m harvest action=repair store={store}`"
        if store
        else "`action=repair` of its store"
    )
    return f"{command} drops it, and harvesting again redoes its unit"
