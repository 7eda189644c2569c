"""Cutting a store to what the studies of its runs read: `python -m harvest action=thin`.

The store itself stays as it is. What is copied goes into another one (data/store/thin.py), unit by
unit and the record last, as a harvest commits. So a copy that was stopped goes on with the next
unit. Every object is compared with its record's digest on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

from residual_saes.data import command_line
from residual_saes.data.durable import Buffer, Written
from residual_saes.data.errors import SettingError, StoreError, TemporaryError
from residual_saes.data.journal import Progress, show, size, suggest, tell
from residual_saes.data.rows import split, summary
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.statistics import FITTED, SAMPLED, sample
from residual_saes.data.store import codec, ledger, manifest, records, retention, ring_state
from residual_saes.data.store import thin as thin_store
from residual_saes.data.store.place import Blob, Place, place_of
from residual_saes.data.store.store import Store
from residual_saes.data.store.thin import Thin

_FOLDERS = (codec.FITS, ledger.SPINE, ledger.RESIDUALS, "commits/summaries")  # in this order
_BLOCK = 1 << 24  # bytes that are copied at a time


def thin(place: Place, named: str | Place | None) -> None:
    """Copy a store to a thin one, or go on with a copy; says what to do next.

    Args:
        named: path or URL of the thin store; None: beside the store, as NAME_thin.zarr.

    Raises:
        SettingError: the thin store would lie in the store itself.
        StoreError: the store is not complete, an object is damaged, or something else is there.
        TemporaryError: another process makes the same thin store.
    """
    out = place_of(named or f"{place.name.rstrip('/').removesuffix('.zarr')}_thin.zarr")
    if f"{_absolute(out)}/".startswith(f"{_absolute(place)}/"):
        raise SettingError(
            f"out={out.name} lies in store={place.name}, of which nothing is changed; "
            "give another place"
        )
    store = Store.open(place)
    state = _kept(store)
    manifest.require_free(out)
    with closing(out.claims()) as claims, claims.alone() as alone:
        if claims.exact and not alone:
            raise TemporaryError(f"another process is at work in {out.name}; wait, or stop it")
        _begin(store, out, state)
        tell(f"{out.name} gets the rows of {len(state.kept)} of {store.units} units")
        progress = Progress(quiet_s=5.0)
        for folder in _FOLDERS:
            for count, total in _copied(store, out, folder, set(state.kept)):
                progress.show(f"{folder}: {count:,} of {total:,} records copied")
        progress.close()
        made = Store.open(out)
        made.declare(store.points)
        made.pack()
    before, after = (sum(one.ledger.nbytes.values()) for one in (store, made))
    show(
        f"{out.name} is complete: {size(after)}, {after / before:.2%} of {place.name}; studies "
        f"take it as store={out.name}",
    )
    suggest(command_line.of("harvest", "action=verify", f"store={out.name}"))


def _absolute(place: Place) -> str:
    return place.name if "://" in place.name else os.path.realpath(place.name)


def _kept(store: Store) -> Thin:
    """Which units keep everything: those that are held out, and the samples of the others."""
    if not store.points:
        raise StoreError(f"{store.name} has no rows yet; harvest a layer first")
    for point in store.points:
        Source.of(store, point).require_complete()
        if not summary.exists(store, point):
            raise StoreError(
                f"{store.name} lacks the statistics of {point}: its `python -m harvest` was "
                "stopped before its end; run it again"
            )
    retained = retention.read(store.place)
    if isinstance(retained, Thin):
        return retained
    kept = set(split.held_out_units(store))
    if retained.span is None:  # of a ring, studies read no training unit
        for rows in (SAMPLED, FITTED):
            kept.update(sample(split.training_units(store), store.unit_tokens, rows))
    return Thin(sorted(kept), store.units - len(kept), retained.span)


def _begin(store: Store, out: Place, state: Thin) -> None:
    """Make the thin store, or see that it is the one that was begun."""
    there = ring_state.recorded(out)
    is_ours = there == state._asdict() or (there is None and not out.names(ledger.SPINE))
    if manifest.exists(out) and (manifest.read(out) != store.manifest or not is_ours):
        raise StoreError(
            f"{out.name} is there, and is no thin store of {store.name}; give another out="
        )
    out.create(manifest.KEY, records.encode(store.manifest))
    thin_store.write(out, state)


def _copied(store: Store, out: Place, folder: str, kept: set[int]) -> Iterator[tuple[int, int]]:
    """Copy each record of a folder behind its objects; gives how many of how many are there."""
    names = sorted(name for name in store.place.names(folder) if name.endswith(".json"))
    there = set(out.names(folder))
    keys = [f"{folder}/{name}" for name in names if name not in there]
    texts = store.place.read_many(keys)
    for count, (key, data) in enumerate(zip(keys, texts, strict=True), len(names) - len(keys)):
        record = records.decode(data, f"{store.name}/{key}")
        objects: Mapping[str, Any] = record.get("objects", {})
        is_whole = record.get("unit") is None or record["unit"] in kept
        for name, written in objects.items():
            if is_whole or name.startswith("kind_"):
                _copy(store.place, out, name, Written(*written))
        out.create(key, data)
        yield count + 1, len(names)


def _copy(place: Place, out: Place, key: str, written: Written) -> None:
    with place.open(key, written[0]) as blob:
        copied = out.write(key, _blocks(blob))
    if copied != written:
        out.delete(key)
        raise StoreError(
            f"{place.name}/{key} does not hold the bytes that were committed; `python -m harvest "
            f"action=repair store={place.name}` drops what is damaged"
        )


def _blocks(blob: Blob) -> Iterator[Buffer]:
    for start in range(0, blob.size, _BLOCK):
        yield blob.read(start, min(_BLOCK, blob.size - start))
