"""What several streams of one pass read, and what it costs to count the rows that they keep:
`python -m tests.bench.side_by_side [--folder D] [--out FILE]`.

A store of three hook points of layer 21 and one of layer 27. An SAE reads layer 21, a transcoder
mlp_in and mlp_out, a crosscoder layers 21 and 27: five arrays are asked for, four are there. Each
stream is read alone and all are read side by side, a batch of each in turn, as a sweep does.

"asked" are the bytes that reads returned (rchar of /proc/self/io), "disk" those that came from the
disk (read_bytes), over the bytes of one array's training units. Before each measurement the page
cache gives up the store's files, so --folder must be on a disk.

The rows of one source and of two are read from the page cache in turn, in GB/s and in GB for a CPU
second. Every source has outliers, the same share in the same chunks, so that the kinds of all units
must be read to count what both keep: in milliseconds a unit of 65,536 rows, by one thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residual_saes.data.rows import summary
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.rounds import KeptRows
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, training_units
from residual_saes.data.site import HookPoint
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.store.unit import prepare
from residual_saes.data.text.packing import Cursor
from tests.bench.outcome import finish
from tests.bench.reader_speed import reader_speed
from tests.bench.write_path import synthetic
from tests.conftest import make_manifest

CONTEXT, CHUNK = 1024, 1024
POINTS = [HookPoint.of(name) for name in ("21", "27", "mlp_in_21", "mlp_out_21")]
STREAMS = {"sae": ["21"], "transcoder": ["mlp_in_21", "mlp_out_21"], "crosscoder": ["21", "27"]}
OUTLIERS = 4  # of each chunk


def make_store(path: Path, units: int, unit: int, width: int) -> Store:
    sizes = {"tokens": unit * units, "context": CONTEXT, "unit": unit, "chunk": CHUNK}
    store = Store.open_or_create(path, make_manifest(width, codec="none", **sizes))
    shape = unit // CONTEXT, CONTEXT
    for number in range(units):
        tokens = np.full(shape, 7, np.uint32)
        document = np.arange(shape[0], dtype=np.uint32)[:, None] + 0 * tokens
        store.commit_spine(number, tokens, document, Cursor(number, 0, None))
    store.close_spine(SpineEnd(unit * units // CONTEXT, ended_early=False))
    rows, rng = synthetic(unit, width), np.random.default_rng(0)
    starts = store.piece_starts(0).ravel()
    for number in range(units):
        prepared = {}
        for point in POINTS:
            long = torch.from_numpy(rng.choice(unit, OUTLIERS * unit // CHUNK, replace=False))
            here = rows.clone()
            here[long] *= 100
            order = store.permutation(number)
            prepared[point] = prepare(here, order, starts, store.arrays.rows(point))
        store.commit_residuals(number, prepared)
    for point in POINTS:
        summary.write(store, point)
    return Store.open(path)


def readers(store: Store, batch: int, window: int) -> dict[str, Reader]:
    made = {}
    for name, points in STREAMS.items():
        sources = [Source.of(store, point) for point in points]
        made[name] = Reader(sources, batch=batch, seed=0, policy=Policy(), window=window)
    return made


# -- bytes -----------------------------------------------------------------------------------------


def forget(store: Store) -> None:
    """Have the page cache give up the rows of a store."""
    for path in Path(store.name).rglob("c.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def io_counts() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def bytes_read(store: Store, streams: Sequence[Reader]) -> tuple[float, float]:
    """Bytes asked for and bytes from the disk of a pass, by those of one array's training units."""
    forget(store)
    before = io_counts()
    steps = min(reader.rows // reader.batch for reader in streams)
    with ExitStack() as stack:
        feeds: list[Iterator[torch.Tensor]] = []
        for reader in streams:
            feeds.append(stack.enter_context(closing(reader.batches(0))))  # type: ignore[type-var]
        for _ in range(steps):
            for feed in feeds:
                next(feed)
    after = io_counts()
    array = store.arrays.rows(POINTS[0])
    units = training_units(store)
    whole = sum((Path(store.name) / array.key(unit)).stat().st_size for unit in units)
    asked = (after["rchar"] - before["rchar"]) / whole
    return asked, (after["read_bytes"] - before["read_bytes"]) / whole


# -- times -----------------------------------------------------------------------------------------


def speeds(one: Reader, two: Reader, rounds: int) -> dict[str, float]:
    """GB of rows by the second and by the CPU second, of one source and of two in turn."""
    found: dict[str, list[tuple[float, float]]] = {"one_source": [], "two_sources": []}
    for number in range(rounds + 1):
        for name, reader in zip(found, (one, two), strict=True):
            measured = reader_speed(reader, passes=2)
            if number:  # the first fills the page cache
                found[name].append(measured)
    figures = {}
    for name, pairs in found.items():
        of_wall, of_cpu = zip(*pairs, strict=True)
        figures[f"{name}_GB_per_s"] = statistics.median(of_wall) / 1e9
        figures[f"{name}_GB_per_cpu_s"] = statistics.median(of_cpu) / 1e9
    return figures


def counting_ms(store: Store, rounds: int) -> float:
    """Milliseconds to count the rows of 65,536 tokens that two sources keep, by one thread."""
    sources = [Source.of(store, point) for point in STREAMS["crosscoder"]]
    units = training_units(store)
    times = []
    for _ in range(rounds):
        kept = KeptRows(sources, Policy())
        times.append(timed(lambda: [kept.counted([unit]) for unit in units]))  # noqa: B023
    return 1000 * statistics.median(times) / (len(units) * store.unit_tokens / 65_536)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.side_by_side")
    parser.add_argument("--folder", type=Path, help="on a disk; default: the temporary one")
    defaults = {"units": 6, "rows": 16_384, "width": 2560, "window": 32, "batch": 4096, "rounds": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out, where = shape.pop("out"), shape.pop("folder")
    folder = Path(tempfile.mkdtemp(dir=where))
    figures: dict[str, Any] = {}
    try:
        store = make_store(folder / "s.zarr", shape["units"], shape["rows"], shape["width"])
        streams = readers(store, shape["batch"], shape["window"])
        for name, reader in streams.items():
            figures[f"{name}_asked"], figures[f"{name}_disk"] = bytes_read(store, [reader])
        together = list(streams.values())
        figures["together_asked"], figures["together_disk"] = bytes_read(store, together)
        figures |= speeds(streams["sae"], streams["crosscoder"], shape["rounds"])
        figures["counting_ms_per_65536_rows"] = counting_ms(store, shape["rounds"])
    finally:
        shutil.rmtree(folder)
    finish(shape, figures, out)


if __name__ == "__main__":
    main()
