"""Packs: copies of the records of many units in one object, for places where a request is slow.

A billion tokens have 30,000 records; a bucket takes a request for each, or eight for the packs. A
pack is derived from the records and never stands for them: they stay, and say what exists. It only
spares reading them one by one. So a pack may be missing, cut or half: what it does not give is read
from the records. Nothing that is committed ever changes, so no pack grows wrong, but for a record
that a repair drops; the repair drops its pack before.

    commits/packs/FIRST.KIND.SIZE.jsonl     FIRST is the first of UNITS units, KIND is SPINE or the
                                            points in the names of the records of residuals, SIZE
                                            is how many records there are

Its lines are a head, which is a record with the digest of the others, and the records, byte for
byte, by ascending unit. A fuller pack replaces an emptier one of the same units and kind; that of
units that are whole is the same whoever writes it, and whenever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from residual_saes.data import durable
from residual_saes.data.errors import StoreError
from residual_saes.data.store import records
from residual_saes.data.store.place import Place

FOLDER = "commits/packs"
SPINE = "spine"  # the kind of packs of the spine's records
UNITS = 4096  # of a pack: 10 MB of records of two points
FEW = 8  # records that are not worth a fuller pack, before the units are whole
_NAME = re.compile(r"(?P<first>\d{8})\.(?P<kind>spine|[0-9a-z_.-]+)\.(?P<size>\d+)\.jsonl")
_AT_A_TIME = 8  # packs that are read side by side


class Pack(NamedTuple):
    """The name of a pack."""

    first: int  # unit
    kind: str
    size: int  # records

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.first:08d}.{self.kind}.{self.size}.jsonl"


class Content(NamedTuple):
    """What a pack would hold at present."""

    pack: Pack
    keys: dict[int, str]  # of its records, by ascending unit
    whole: bool  # no record of these units and this kind will follow


def there(place: Place) -> list[Pack]:
    """The packs of a store; of the same units and kind, the fullest comes last."""
    matches = filter(None, map(_NAME.fullmatch, place.names(FOLDER)))
    return sorted(Pack(int(name["first"]), name["kind"], int(name["size"])) for name in matches)


def fullest(place: Place) -> list[Pack]:
    """The fullest pack of each range of units and kind."""
    return list({pack[:2]: pack for pack in there(place)}.values())


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


def read(place: Place, chosen: Sequence[Pack]) -> Iterator[tuple[Pack, list[bytes]]]:
    """Some packs with their records; of one that is damaged or gone, nothing.

    The records themselves are read instead, and `action=verify` names a damaged pack.
    """
    for start in range(0, len(chosen), _AT_A_TIME):
        some = chosen[start : start + _AT_A_TIME]
        objects = place.read_many(pack.key for pack in some)
        with suppress(FileNotFoundError):  # a fuller one has replaced it
            for pack, data in zip(some, objects, strict=True):
                with suppress(StoreError):
                    yield pack, decode(data, pack.key)


def write(place: Place, contents: Iterable[Content]) -> None:
    """Write the packs that are due, and remove those that they replace.

    Several processes may do so at once.

    Raises:
        StoreError: a record is damaged.
    """
    for content, old in _due(place, contents):
        place.write(content.pack.key, [encode(_lines(place, content, old))])
        for pack in old:
            if pack != content.pack:
                place.delete(pack.key)


def are_written(place: Place, contents: Iterable[Content]) -> bool:
    """Whether `write` has nothing to do."""
    return not any(_due(place, contents))


def _due(place: Place, contents: Iterable[Content]) -> Iterator[tuple[Content, list[Pack]]]:
    """Contents that are to be written, each with the packs there of the same units and kind.

    On a folder there are none: packs would spare nothing.
    """
    if place.page is None:
        return
    by_range: dict[tuple[int, str], list[Pack]] = {}
    for pack in there(place):
        by_range.setdefault(pack[:2], []).append(pack)
    for content in contents:
        old = by_range.get(content.pack[:2], [])
        fresh = content.pack.size - (old[-1].size if old else 0)
        is_left_over = content.whole and fresh == 0 and len(old) > 1
        if is_left_over or fresh >= (1 if content.whole else FEW):
            yield content, old


def _lines(place: Place, content: Content, old: Sequence[Pack]) -> list[bytes]:
    """The records of a pack: from the fullest one that is there, and what that lacks."""
    packed: dict[int, bytes] = {}
    for pack, lines in read(place, old[-1:]):
        for line in lines:
            packed[records.decode(line, pack.key)["unit"]] = line
    lacking = [unit for unit in content.keys if unit not in packed]
    keys = [content.keys[unit] for unit in lacking]
    for unit, key, line in zip(lacking, keys, place.read_many(keys), strict=True):
        records.decode(line, f"{place.name}/{key}")  # raises if it is damaged
        packed[unit] = line
    return [packed[unit] for unit in content.keys]
