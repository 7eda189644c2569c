"""Requests that a store in a bucket costs: `python -m tests.bench.requests [--out FILE]`.

The bucket is a dictionary in memory, behind the calls that S3 gets. Its store has the units, layers
and objects of a billion tokens (tests/bench/scale.py); rows are few and narrow. A LIST counts once
for each 1,000 names that it gives, as S3 sends and bills it. Answers that nothing is there count.
"""

from __future__ import annotations

import argparse
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from obstore.store import MemoryStore

from residual_saes.data.errors import StopRequest
from residual_saes.data.rows.reader import WINDOW, Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.store import manifest
from residual_saes.data.store.bucket import ObjectPlace
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.text.packing import Cursor
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import finish as finish_store
from residual_saes.harvest.plan import share_done
from residual_saes.harvest.status import status
from tests.bench import scale
from tests.bench.outcome import finish
from tests.conftest import commit, make_spine

PAGE = 1000  # names
BATCHES = 100


class Counted:
    """obstore's functions; they count what they send."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(obstore, name)

    def _count(self, kind: str) -> None:
        with self._lock:
            self.sent[kind] += 1

    def get(self, *given: Any, **named: Any) -> Any:
        self._count("GET")
        return obstore.get(*given, **named)

    def get_range(self, *given: Any, **named: Any) -> Any:
        self._count("GET")
        return obstore.get_range(*given, **named)

    def head(self, *given: Any, **named: Any) -> Any:
        self._count("HEAD")
        return obstore.head(*given, **named)

    def put(self, *given: Any, **named: Any) -> Any:
        self._count("PUT")
        return obstore.put(*given, **named)

    def delete(self, *given: Any, **named: Any) -> Any:
        self._count("DELETE")
        return obstore.delete(*given, **named)

    def list(self, *given: Any, **named: Any) -> Iterator[Any]:
        self._count("LIST")
        names = 0
        for part in obstore.list(*given, **{**named, "chunk_size": PAGE}):
            if names:
                self._count("LIST")
            names += len(part)
            yield part

    def list_with_delimiter(self, *given: Any, **named: Any) -> Any:
        self._count("LIST")
        return obstore.list_with_delimiter(*given, **named)


def place(bucket: MemoryStore, requests: Counted | None = None) -> ObjectPlace:
    """A bucket in memory as a store's place."""
    made = ObjectPlace("s3://memory/store")
    made.store = bucket
    made._api = requests or obstore
    return made


def make_spine_of(bucket: MemoryStore, units: int) -> Store:
    """A store whose spine alone is there."""
    store = Store.open_or_create(place(bucket), scale.settings(units))
    rows = scale.UNIT // scale.CONTEXT
    tokens, document = make_spine(rows, scale.CONTEXT, np.random.default_rng(0))
    for unit in range(units):
        store.commit_spine(unit, tokens, document, Cursor(unit * 100, 17, {"shard": unit // 100}))
    store.close_spine(SpineEnd(units * rows, ended_early=False))
    return store


class Table:
    """Requests of each operation, by kind."""

    def __init__(self, bucket: MemoryStore) -> None:
        self._bucket = bucket
        self.figures: dict[str, dict[str, int]] = {}

    def measure(self, name: str, action: Callable[[ObjectPlace], Any]) -> None:
        """Count what an action sends; it gets the bucket as a place that nobody has opened yet."""
        self._keep(name, action, place(self._bucket, requests := Counted()), requests)

    def of_store(self, name: str, action: Callable[[Store], Any]) -> None:
        """Count what an action sends, behind the opening of the store that it gets."""
        requests = Counted()
        store = Store.open(place(self._bucket, requests))
        requests.sent.clear()
        self._keep(name, action, store, requests)

    def _keep(self, name: str, action: Callable[[Any], Any], given: Any, requests: Counted) -> None:
        action(given)
        sent = dict(sorted(requests.sent.items()))
        self.figures[name] = {**sent, "all": sum(sent.values())}
        print(f"{name:>36}  {self.figures[name]}", flush=True)


def agree(where: ObjectPlace) -> None:
    wanted = {name: value for name, value in manifest.read(where).items() if name != "format"}
    requests = where._api
    requests.sent.clear()
    with closing(where.claims()) as claims:
        manifest.agree(where, wanted, claims)


def done(where: ObjectPlace, units: int) -> None:
    tokens = units * scale.UNIT
    share_done(
        HarvestConfig(store=where, layers=scale.LAYERS, tokens=tokens, context=scale.CONTEXT)
    )


def reader(store: Store) -> Reader:
    return Reader([Source.of(store, scale.LAYERS[0])], batch=scale.BATCH, seed=0, policy=Policy())


def measured(units: int) -> dict[str, dict[str, int]]:
    """The requests of each operation."""
    bucket, rows = MemoryStore(), scale.residuals()
    store = make_spine_of(bucket, units)
    table = Table(bucket)
    for unit in range(units // 2):
        commit(store, unit, rows)
    table.measure("open, half done, without packs", Store.open)
    Store.open(place(bucket)).pack()
    table.measure("open, half done", Store.open)
    table.of_store("look, half done", lambda store: store.look())
    table.of_store("refresh, half done", lambda store: store.refresh())
    table.of_store("commit a unit", lambda store: commit(store, units // 2, rows))
    for unit in store.missing(scale.LAYERS):
        commit(store, unit, rows)

    def end(store: Store) -> None:
        """What each rank does when all units are there."""
        with closing(store.place.claims()) as claims, StopRequest() as stop:
            finish_store(store, scale.LAYERS, claims, stop)

    table.measure("open, complete, no summary", Store.open)
    table.of_store("end of a harvest, first rank", end)
    table.of_store("end of a harvest, later rank", end)
    table.measure("open", Store.open)
    table.measure("manifest.exists", manifest.exists)
    table.measure("manifest.agree", agree)
    table.of_store("look, nothing new", lambda store: store.look())
    table.of_store("refresh, nothing new", lambda store: store.refresh())
    table.measure("status", lambda where: list(status(where)))
    table.measure("plan's share_done", lambda where: done(where, units))
    table.of_store("Reader", reader)
    table.of_store("Reader, first batch", lambda store: next(reader(store).batches(0)))
    table.of_store(
        f"Reader, {BATCHES} batches",
        lambda store: [None for _ in islice(reader(store).batches(0), BATCHES)],
    )
    return table.figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.requests")
    parser.add_argument("--units", type=int, default=scale.UNITS)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    given = parser.parse_args()
    figures = measured(given.units)
    shape = {"units": given.units, "layers": len(scale.LAYERS), "window": WINDOW}
    finish(shape, figures, given.out)


if __name__ == "__main__":
    main()
