"""Packs: copies of the records of many units in one object, for places where a request is slow.

A billion tokens have 30,000 records; a bucket takes a request for each, or eight for the packs. A
pack is derived from the records and never stands for them: they stay, and say what exists. It only
spares reading them one by one. So a pack may be missing, cut or half: what it does not give is read
from the records. Nothing that is committed ever changes, so no pack grows old, but for a record
that a repair drops; the repair drops its pack before.

    commits/packs/FIRST.KIND.jsonl    FIRST is its first unit, a multiple of UNITS. KIND is SPINE,
                                      or the layers of records of residuals, as in their names.

Its lines are a head, which is a record with the digest of the others, and the records, byte for
byte, by ascending unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from data import durable
from data.errors import StoreError
from data.store import records
from data.store.place import Place

FOLDER = "commits/packs"
SPINE = "spine"  # the kind of packs of the spine's records
UNITS = 4096  # of a pack: 10 MB of records of two layers
_NAME = re.compile(r"\d{8}\.(spine|\d+(_\d+)*)\.jsonl")
_AT_A_TIME = 8  # packs that are read side by side


def name_of(first: int, kind: str) -> str:
    """The name of a pack."""
    return f"{first:08d}.{kind}.jsonl"


def parse(name: str) -> tuple[int, str]:
    """First unit and kind of a pack."""
    first, kind, _ = name.split(".")
    return int(first), kind


def names(place: Place) -> list[str]:
    """The packs of a store, in order."""
    return sorted(filter(_NAME.fullmatch, place.names(FOLDER)))


def encode(lines: Sequence[bytes]) -> bytes:
    """The pack of some records, each of which is one line."""
    body = b"".join(lines)
    return records.encode({"digest": durable.digest(body), "records": len(lines)}) + body


def decode(data: bytes, name: str) -> list[bytes]:
    """The records of a pack.

    Raises:
        StoreError: `data` is not the pack that was written, or holds what is no record.
    """
    head, _, body = data.partition(b"\n")
    said = records.decode(head + b"\n", name)
    lines = body.splitlines(keepends=True)
    is_whole = said == {"digest": durable.digest(body), "records": len(lines)}
    if not is_whole or any(map(records.fault, lines)):
        raise StoreError(f"{name} does not hold the records that were packed")
    return lines


def read(place: Place, chosen: Sequence[str]) -> Iterator[tuple[str, list[bytes]]]:
    """Name and records of some packs; none of a pack that is damaged."""
    for start in range(0, len(chosen), _AT_A_TIME):
        some = chosen[start : start + _AT_A_TIME]
        keys = [f"{FOLDER}/{name}" for name in some]
        for name, data in zip(some, place.read_many(keys), strict=True):
            try:
                yield name, decode(data, name)
            except StoreError:
                continue  # the records themselves are read instead; `action=verify` names the pack


def write(place: Place, finished: Iterable[tuple[str, list[str]]]) -> None:
    """Write the packs that are not there; on a folder, none: there they would spare nothing.

    Several processes may do so at once: they write the same bytes.

    Args:
        finished: names of packs, each with the keys of its records.

    Raises:
        StoreError: a record is damaged.
    """
    for name, keys in _missing(place, finished):
        lines = list(place.read_many(keys))
        for key, line in zip(keys, lines, strict=True):
            records.decode(line, f"{place.name}/{key}")
        place.write(f"{FOLDER}/{name}", [encode(lines)])


def are_there(place: Place, finished: Iterable[tuple[str, list[str]]]) -> bool:
    """Whether `write` has nothing to do."""
    return not any(_missing(place, finished))


def _missing(
    place: Place, finished: Iterable[tuple[str, list[str]]]
) -> Iterator[tuple[str, list[str]]]:
    """Those packs that `write` writes."""
    if place.page is None:
        return
    there = set(names(place))
    for name, keys in finished:
        if name not in there:
            yield name, keys
