"""Two stores of the same tokens: row i of both is of the same token.

Rows are permuted inside their unit by a pure function of (seed, unit). So equal tokens in equal
units under an equal seed have their rows in one order, whatever models made them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows.source import Source
from residual_saes.data.store import ledger, records, retention
from residual_saes.data.store.store import Store

_SETTINGS = ("seed", "unit", "context", "chunk")  # of the manifest, which decide places of rows
_ARRAYS = ("tokens", "document")  # a document's first token is a BOS row


def require(sources: Sequence[Source]) -> None:
    """Raise SettingError unless row i of all sources is of the same token.

    Of one store it always is. Of two, both must have their whole text, and neither may be a ring.

    Raises:
        StoreError: the text of a store is not whole.
    """
    first, *others = {source.store.name: source.store for source in sources}.values()
    for other in others:
        _require_pair(first, other)


@cache  # the streams of a sweep ask once; by identity, as `Store` has no equality
def _require_pair(one: Store, other: Store) -> None:
    for store in (one, other):
        if retention.read(store.place).span is not None:
            raise SettingError(
                f"store={store.name} is a ring, and rows of two stores are read from whole stores "
                "alone; harvest it without max_bytes="
            )
        if not store.spine_complete:
            raise StoreError(
                f"the text of {store.name} is not whole; run the same `python -m harvest` command "
                "again to finish it"
            )
    differ = [name for name in _SETTINGS if one.manifest[name] != other.manifest[name]]
    values = {name: (one.manifest[name], other.manifest[name]) for name in differ}
    if one.rows != other.rows:
        values["tokens"] = one.rows, other.rows
    if values:
        listed = ", ".join(f"{name} {a!r} and {b!r}" for name, (a, b) in values.items())
        raise _refused(one, other, f"they differ in {listed}")
    for unit in _units_that_differ(one, other):
        raise _refused(one, other, f"their texts differ, first in unit {unit}")


def _refused(one: Store, other: Store, reason: str) -> SettingError:
    return SettingError(
        f"store=[{one.name},{other.name}]: their rows are not of the same tokens: {reason}; "
        "harvest both with the same text.*, tokens=, context=, unit=, seed= and tokenizer"
    )


def _units_that_differ(one: Store, other: Store) -> Iterator[int]:
    """Units whose tokens or documents differ.

    Equal digests of the files prove that they do not. Where the codecs differ, so do the files of
    equal tokens, and the tokens are compared.
    """
    for unit, (a, b) in enumerate(zip(_digests(one), _digests(other), strict=True)):
        if a == b:
            continue
        for name in _ARRAYS:
            if not np.array_equal(getattr(one, name)(unit), getattr(other, name)(unit)):
                yield unit
                break


def _digests(store: Store) -> Iterator[list[str]]:
    """Of each unit, what its record says of the files of its tokens and documents."""
    arrays = [getattr(store.arrays, name)() for name in _ARRAYS]
    keys = map(ledger.spine_key, range(store.units))
    for unit, data in enumerate(store.place.read_many(keys)):
        objects = records.decode(data, f"{store.name}/{ledger.spine_key(unit)}")["objects"]
        yield [objects[array.key(unit)] for array in arrays]
