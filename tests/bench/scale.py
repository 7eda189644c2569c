"""Start-up, resume and memory of a store of a billion tokens: `python -m tests.bench.scale --store
DIR [--out FILE]`.

What grows with a store are its units, records and objects, so those are as many and as large as a
billion tokens have: 15,259 units of 64 inner chunks, two layers. Only the rows are few and narrow.
It is made once, through the store's own calls, in a few minutes and 2 GB of DIR; beside it are one
of a quarter and one of a sixteenth.

Every figure is of a fresh process, from its first call to its last; imports are not counted. The
files' names and contents are in the page cache. Times are the best of the rounds, with their range,
and CPU seconds beside them, which a busy machine changes less. Memory is the process's own peak,
which for the three sizes says how it grows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from residual_saes.data.rows import summary
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.store import ledger, manifest, records
from residual_saes.data.store.claims import METADATA
from residual_saes.data.store.place import place_of
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.text.packing import Cursor
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.plan import share_done
from residual_saes.harvest.status import status
from tests.bench.outcome import finish
from tests.conftest import commit, make_manifest, make_spine

UNITS = 15_259  # of 65,536 tokens: a billion
SHARES = (16, 4, 1)  # of that, one over
LAYERS = (21, 27)
CONTEXT, UNIT, CHUNK, WIDTH = 64, 1024, 16, 8  # 64 inner chunks a unit, as real ones have
BATCHES, COMMITS, BATCH = 50, 50, 1024


def settings(units: int) -> dict[str, Any]:
    return make_manifest(WIDTH, tokens=units * UNIT, context=CONTEXT, unit=UNIT, chunk=CHUNK)


def residuals() -> dict[int, NDArray[np.uint16]]:
    """One unit's rows of each layer, in spine order; all units have these."""
    rng = np.random.default_rng(0)
    return {layer: rng.integers(0x3F00, 0x4000, (UNIT, WIDTH), dtype=np.uint16) for layer in LAYERS}


def make(path: Path, units: int) -> None:
    """A complete store of `units` units; goes on with what is there."""
    # 400,000 syncs are most of an hour, and a store that is only looked at need not survive a power
    # cut.
    with mock.patch.object(os, "fsync"):
        _make(path, units)


def _make(path: Path, units: int) -> None:
    rng, rows = np.random.default_rng(0), residuals()
    store = Store.open_or_create(path, settings(units))
    tokens, document = make_spine(UNIT // CONTEXT, CONTEXT, rng)
    first, _ = store.spine_cursor()
    for unit in range(first, units):
        state = {"shard": 1 + unit // 100, "examples_iterable": {"offset": unit * 1000}}
        store.commit_spine(unit, tokens, document, Cursor(unit * 100, 17, state))
    if store.spine_end is None:
        store.close_spine(SpineEnd(units * UNIT // CONTEXT, ended_early=False))
    for unit in store.missing(LAYERS):
        commit(store, unit, rows)
    for layer in LAYERS:
        summary.write(store, layer)
    store.declare(LAYERS)


# -- what is measured, each in a process of its own ------------------------------------------------


def start(path: Path) -> None:
    Store.open(path)


def done(path: Path) -> None:
    """What a harvest's plan asks of the store, before the model is loaded."""
    tokens = manifest.read(place_of(path))["tokens"]
    assert share_done(HarvestConfig(store=path, layers=LAYERS, tokens=tokens, context=CONTEXT)) == 1


def resume(path: Path) -> None:
    """All that a harvest does behind the loading of its model, but for the model's own checks and
    passes.
    """
    place = place_of(path)
    wanted = {name: value for name, value in manifest.read(place).items() if name != "format"}
    manifest.agree(place, wanted)
    with closing(place.claims()) as claims:
        store = Store.open_or_create(place, wanted)
        assert not store.missing(LAYERS)
        with claims.held(METADATA):
            store.declare(LAYERS)
        store.refresh()
        for layer in LAYERS:
            summary.write(store, layer)


def tell(path: Path) -> None:
    assert len(list(status(place_of(path)))) > len(LAYERS)


def first_batch(path: Path) -> None:
    read(path, 1)


def many_batches(path: Path) -> None:
    read(path, BATCHES)


def read(path: Path, count: int) -> None:
    reader = Reader([Source.of(Store.open(path), LAYERS[0])], batch=BATCH, seed=0, policy=Policy())
    assert sum(len(batch) for batch in islice(reader.batches(0), count)) == count * BATCH


def many_commits(path: Path) -> None:
    """Commit units once more: all the work is done again, and the records say the same."""
    store, rows = Store.open(path), residuals()
    for unit in range(max(0, store.units - COMMITS), store.units):
        commit(store, unit, rows)


TIMED = {"open": start, "plan": done, "resume": resume, "status": tell, "first_batch": first_batch}
MEASURED = {**TIMED, "read_50_batches": many_batches, "commit_50_units": many_commits}


def probe(name: str, path: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak MB of this process for one measurement."""
    clock, cpu = time.perf_counter(), time.process_time()
    MEASURED[name](path)
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    # Not ru_maxrss, into which Linux counts the process that this one was forked from.
    (peak,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return {"s": seconds, "cpu_s": cpu_seconds, "peak_MB": int(peak.split()[1]) * 1024 / 1e6}


def fresh(name: str, path: Path) -> dict[str, float]:
    """The same, of a new process."""
    call = [sys.executable, "-m", "tests.bench.scale", "--store", str(path), "--probe", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- figures ---------------------------------------------------------------------------------------


def times(path: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TIMED}
    for _ in range(rounds):
        for name in TIMED:
            found[name].append(fresh(name, path))
    figures: dict[str, Any] = {}
    for name, runs in found.items():
        walls = [run["s"] for run in runs]
        figures[f"{name}_s"], figures[f"{name}_cpu_s"] = (
            min(walls),
            min(run["cpu_s"] for run in runs),
        )
        figures[f"{name}_s_range"] = [round(min(walls), 3), round(max(walls), 3)]
    return figures


def memory(paths: dict[int, Path], rounds: int) -> dict[str, Any]:
    """Peak MB at each size, and how much a billion tokens add."""
    figures: dict[str, Any] = {}
    for name in ("read_50_batches", "commit_50_units"):
        peaks = {
            share: statistics.median(fresh(name, path)["peak_MB"] for _ in range(rounds))
            for share, path in paths.items()
        }
        figures[f"{name}_peak_MB"] = {f"1/{share}": round(peak, 1) for share, peak in peaks.items()}
        least, most = max(SHARES), min(SHARES)
        figures[f"{name}_MB_per_1e9"] = (peaks[most] - peaks[least]) / (1 / most - 1 / least)
    return figures


def shape_of(path: Path) -> dict[str, Any]:
    """What the largest store consists of, and what looking for news costs."""
    store = Store.open(path)
    texts = {folder: store.place.sizes(folder) for folder in (ledger.SPINE, ledger.RESIDUALS)}
    keys = ledger.spine_key(0), ledger.residual_key(0, LAYERS)
    objects = sum(len(records.decode(store.place.read(key), key)["objects"]) for key in keys)
    of_layers = [array for point in store.ledger.points.values() for array in vars(point).values()]
    return {
        "units": store.units,
        "layers": len(LAYERS),
        "chunks": store.chunks,
        "objects": objects * store.units,
        "records": sum(map(len, texts.values())),
        "record_bytes": {
            folder: round(statistics.mean(sizes.values())) for folder, sizes in texts.items()
        },
        "ledger_MB": sum(array.nbytes for array in of_layers) / 1e6,
        "refresh_s": min(_seconds(store.refresh) for _ in range(5)),
    }


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale")
    parser.add_argument(
        "--store", type=Path, required=True, help="folder in which the stores are, or are made"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--units", type=int, default=UNITS, help="units of the largest store")
    parser.add_argument(
        "--probe", choices=MEASURED, help="one measurement of the store itself, as JSON"
    )
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    given = parser.parse_args()
    if given.probe:
        print(json.dumps(probe(given.probe, given.store)))
        return
    paths = {share: given.store / f"{given.units // share}.zarr" for share in SHARES}
    for share, path in paths.items():
        make(path, given.units // share)
    whole = paths[min(SHARES)]
    finish(
        shape_of(whole), {**times(whole, given.rounds), **memory(paths, given.rounds)}, given.out
    )


if __name__ == "__main__":
    main()
