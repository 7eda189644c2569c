"""The reader over a plain read of the same files, and its mixing: `python -m
tests.bench.reader_speed [--out FILE]`.

Rows of width 2560 in units of 65,536, as large a store as stays in the page cache: 8 units, 2.7 GB,
one of them held out. Ours is `Reader.batches` with nobody working on the batches: inner chunks
found by their index, checked, decoded, shuffled, cut. The plain read is `readinto` of the same
units' whole files, one after another, into one buffer of a file's size on a page's border (16 bytes
off it, Zen 3 copies at a quarter of the speed): by one thread, as files are read in sequence, and
by as many as the reader has, a file each.

Rounds alternate in one process. The reader's clock runs from the first batch of its second pass to
that of a later one, so that as much is read ahead when it starts as when it stops. Ratios are of
bytes per second: of compressed stores the reader's are those of the rows, the plain read's those of
the files. CPU seconds are given beside them, of all threads: on a busy machine two threads get no
more than one.

Mixing is counted, not estimated: effective documents are 1 / P(two rows of a batch share a
document), over all batches of a pass of the store, whose rows say which document they are of; and
over whole windows in the reader's order of stores too large to make here, all with documents of
1,024 tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.rows import summary
from residual_saes.data.rows.reader import WINDOW, Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, training_units
from residual_saes.data.store import scales
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.store.unit import Prepared, prepare
from residual_saes.data.text.packing import Cursor
from tests.bench.outcome import finish
from tests.bench.write_path import synthetic
from tests.conftest import make_manifest

CODECS = ("none", "blosc", "int8")
LAYER, CONTEXT, CHUNK, DOCUMENT, SEED = 21, 1024, 1024, 1024, 0
PAGE = 4096
SCALES = {  # units, tokens of a unit, rows of a chunk, chunks of a window
    "default_1e9": (15_259, 65_536, 1024, WINDOW),
    "window_128": (15_259, 65_536, 1024, 128),
    "chunk_256": (15_259, 65_536, 256, WINDOW),
    "unit_262144_window_128": (3_815, 262_144, 1024, 128),
}


# -- the store -------------------------------------------------------------------------------------


def make_store(path: Path, codec: str, rows: torch.Tensor, units: int) -> Store:
    """A whole store of documents of 1,024 tokens, whose rows begin with their document's number."""
    unit, width = rows.shape
    sizes = {"tokens": unit * units, "context": CONTEXT, "unit": unit, "chunk": CHUNK}
    store = Store.open_or_create(path, make_manifest(width, codec=codec, **sizes))
    shape = unit // CONTEXT, CONTEXT
    for number in range(units):
        # Shifted, so that documents do not end where rows do.
        document = (np.arange(unit).reshape(shape) + number * unit + 333) // DOCUMENT
        tokens = np.full(shape, 7, np.uint32)
        store.commit_spine(number, tokens, document.astype(np.uint32), Cursor(number, 0, None))
    store.close_spine(SpineEnd(unit * units // CONTEXT, ended_early=False))
    starts = store.piece_starts(0).ravel()
    if codec == "int8":
        scales.freeze(store.place, LAYER, rows, torch.from_numpy(starts))
    # The same rows in all units, and their kinds.
    once = prepare(rows, store.permutation(0), starts, store.arrays.rows(LAYER))
    for number in range(units):
        store.commit_residuals(number, {LAYER: numbered(once, store, number)})
    summary.write(store, LAYER)
    return Store.open(path)


def numbered(rows: Prepared, store: Store, unit: int) -> Prepared:
    """The rows with their document's number, below 2¹⁶, as the bits of the first channel."""
    rows.bits[:, 0] = store.document(unit).ravel()[store.permutation(unit)]
    return rows


def numbers(batch: torch.Tensor) -> NDArray[np.uint16]:
    """(n,) which document each row is of."""
    return batch[:, 0].view(torch.uint16).numpy()


# -- speed -----------------------------------------------------------------------------------------


def paged(nbytes: int) -> NDArray[np.uint8]:
    """Memory that begins on a page's border, and is there."""
    memory = np.zeros(nbytes + PAGE, np.uint8)
    memory[::PAGE] = 1
    first = -memory.ctypes.data % PAGE
    return memory[first : first + nbytes]


def plain(paths: Iterable[Path], buffer: NDArray[np.uint8]) -> int:
    """Bytes of some files, read whole."""
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            view, got = memoryview(buffer), 1
            while got:
                got = file.readinto(view)
                view, total = view[got:], total + got
    return total


def plain_speed(paths: list[Path], buffers: list[NDArray[np.uint8]]) -> float:
    """Bytes per second, by as many threads as there are buffers; as long as the reader's round."""
    shares = [paths[at :: len(buffers)] for at in range(len(buffers))]
    with ThreadPoolExecutor(len(buffers)) as pool:
        began = time.perf_counter()
        total = sum(pool.map(plain, shares, buffers))
        return total / (time.perf_counter() - began)


def reader_speed(reader: Reader, passes: int) -> tuple[float, float]:
    """Bytes of rows per second and per CPU second, of some passes behind the first."""
    per_pass = reader.rows // reader.batch
    with closing(reader.batches(0)) as batches:
        for _ in islice(batches, per_pass + 1):
            pass
        began, cpu = time.perf_counter(), time.process_time()
        rows = sum(len(batch) for batch in islice(batches, passes * per_pass))
        took, spent = time.perf_counter() - began, time.process_time() - cpu
    nbytes = rows * sum(reader.widths) * 2
    return nbytes / took, nbytes / spent


def measure(store: Store, codec: str, rounds: int, passes: int, batch: int) -> dict[str, Any]:
    """GB/s of both, and their ratios."""
    reader = Reader([Source.of(store, LAYER)], batch=batch, seed=SEED, policy=Policy())
    array = store.arrays.rows(LAYER)
    paths = [Path(store.name) / array.key(unit) for unit in training_units(store)]
    threads = min(16, os.cpu_count() or 1)
    buffers = [paged(max(path.stat().st_size for path in paths)) for _ in range(threads)]
    found: dict[str, list[float]] = {"plain_1": [], "plain_n": [], "reader": [], "reader_cpu": []}
    for number in range(rounds + 1):
        one, several = plain_speed(paths * 2, buffers[:1]), plain_speed(paths * 2, buffers)
        ours, ours_cpu = reader_speed(reader, passes)
        if number:  # the first fills the page cache
            for name, value in zip(found, (one, several, ours, ours_cpu), strict=True):
                found[name].append(value / 1e9)
    figures: dict[str, Any] = {
        f"{codec}_{name}_GB_per_s": statistics.median(values) for name, values in found.items()
    }
    for name in ("plain_1", "plain_n"):
        ratios = [ours / theirs for ours, theirs in zip(found["reader"], found[name], strict=True)]
        figures[f"{codec}_ratio_to_{name}"] = figures[
            f"{codec}_reader_GB_per_s"
        ] / statistics.median(found[name])
        figures[f"{codec}_ratio_to_{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return figures


# -- mixing ----------------------------------------------------------------------------------------


def effective(batches: Iterable[NDArray[Any]]) -> float:
    """1 / P(two rows of a batch share a document), for the (n,) documents of the rows of some
    batches.
    """
    shared, pairs = 0, 0
    for documents in batches:
        counts = np.unique(documents, return_counts=True)[1]
        shared += int((counts * (counts - 1)).sum())
        pairs += len(documents) * (len(documents) - 1)
    return pairs / max(shared, 1)


def simulated(
    units: int, unit: int, chunk: int, window: int, batch: int, windows: int
) -> Iterator[NDArray[np.int64]]:
    """(batch,) documents of the rows of a pass's first windows, batch by batch, by the reader's
    functions.
    """
    per_unit = unit // chunk
    training = np.setdiff1d(np.arange(units), order.held_out(units, SEED))
    chunks = order.permutation(len(training) * per_unit, SEED, 0)
    for number in range(windows):
        rows = []
        for at in chunks[number * window : (number + 1) * window].tolist():
            number_of, part = int(training[at // per_unit]), at % per_unit
            tokens = order.permutation(unit, SEED, number_of)[part * chunk : (part + 1) * chunk]
            rows.append((number_of * unit + 333 + tokens) // DOCUMENT)
        mixed = np.concatenate(rows)[order.permutation(window * chunk, SEED, 0, number)]
        yield from np.split(mixed, range(batch, len(mixed), batch))


def mixing(store: Store, batch: int) -> dict[str, Any]:
    """Effective documents of a pass over the store, and of stores as they are harvested."""
    reader = Reader([Source.of(store, LAYER)], batch=batch, seed=SEED, policy=Policy())
    documents = sum(len(np.unique(store.document(unit))) for unit in training_units(store))
    with closing(reader.batches(0)) as batches:
        here = effective(numbers(one).copy() for one in islice(batches, reader.rows // batch))
    figures: dict[str, Any] = {"documents": documents, "effective_documents": here}
    for name, (units, unit, chunk, window) in SCALES.items():
        figures[f"effective_{name}"] = effective(
            simulated(units, unit, chunk, window, batch, 4 * WINDOW // window)
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reader_speed")
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made; default: the temporary one"
    )
    defaults = {"units": 8, "rows": 65_536, "width": 2560, "rounds": 7, "passes": 2, "batch": 4096}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=CODECS)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out, where = shape.pop("out"), shape.pop("folder")
    rows = synthetic(shape["rows"], shape["width"])
    folder = Path(tempfile.mkdtemp(dir=where))
    figures: dict[str, Any] = {}
    try:
        for codec in shape["codecs"]:
            store = make_store(folder / codec, codec, rows, shape["units"])
            figures |= measure(store, codec, shape["rounds"], shape["passes"], shape["batch"])
            if codec == "none":
                figures |= mixing(store, shape["batch"])
            shutil.rmtree(folder / codec)
    finally:
        shutil.rmtree(folder)
    finish(shape, figures, out)


if __name__ == "__main__":
    main()
