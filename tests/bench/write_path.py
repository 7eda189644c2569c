"""The write path over a plain write of the same bytes: `python -m tests.bench.write_path --folder
DIR [--out FILE]`.

One unit of 65,536 rows of width 2560, 335 MB. Ours is `Store.commit_residuals`: checksums of the
inner chunks, digest, write, sync, rename, sync of the folder, for the rows, norms, kinds and
moments, then the record. The plain write puts just as many bytes, out of the same memory in the
same pieces, into one file of the same folder, and syncs it: what it leaves to that sync ours has
told the disk to begin on, so that ours can be the faster. `prepare_and_write` has before it what a
harvest on a CPU does: permutation, norms, kinds and moments. `blosc` is compared with the bytes it
comes to.

Rounds alternate in one process and nothing is deleted while the clock runs. A ratio is of a round's
two times; the median of all rounds and their range are given, and CPU seconds, which a busy machine
changes less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.store.unit import Prepared, prepare
from residual_saes.data.text.packing import Cursor
from tests.bench.outcome import finish
from tests.conftest import make_manifest, make_spine

CODECS = ("none", "blosc")
LAYER, CONTEXT, CHUNK = 21, 1024, 1024


class Spent(NamedTuple):
    """What an action took."""

    wall: float  # seconds
    cpu: float  # seconds, of all threads


def spent(action: Callable[[], object]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def synthetic(rows: int, width: int) -> torch.Tensor:
    """(rows, width) bfloat16, whose channels differ in scale and mean."""
    generator = torch.Generator().manual_seed(0)
    scale, mean = torch.rand(2, width, generator=generator)
    return (torch.randn(rows, width, generator=generator) * scale + mean).bfloat16()


def make_store(path: Path, codec: str, rows: int, width: int, units: int) -> Store:
    """A store whose spine is whole and that has no residuals."""
    sizes = {"tokens": rows * units, "context": CONTEXT, "unit": rows, "chunk": CHUNK}
    store = Store.open_or_create(path, make_manifest(width, codec=codec, **sizes))
    tokens, document = make_spine(rows // CONTEXT, CONTEXT, np.random.default_rng(0))
    for unit in range(units):
        store.commit_spine(unit, tokens, document, Cursor(unit, 0, None))
    store.close_spine(SpineEnd(rows * units // CONTEXT, ended_early=False))
    return store


def objects_of(store: Store, unit: int) -> list[Path]:
    arrays = store.arrays
    written = [arrays.rows, arrays.norms, arrays.kinds, arrays.moments]
    return [Path(store.name) / array(LAYER).key(unit) for array in written]


def plain(path: Path, rows: Prepared, nbytes: int) -> None:
    """Write `nbytes`: a unit's rows in inner chunks, as often as it takes, or less of them."""
    data, step = memoryview(rows.bits.reshape(-1).view(np.uint8)), CHUNK * rows.bits.shape[1] * 2
    with path.open("wb") as file:
        for at in range(0, min(len(data), nbytes), step):
            file.write(data[at : min(at + step, nbytes)])
        file.write(
            data[: max(0, nbytes - len(data))]
        )  # statistics and the record, 0.2 % of the whole
        file.flush()
        os.fsync(file.fileno())


def measure(codec: str, rows: torch.Tensor, rounds: int, folder: Path) -> list[dict[str, Spent]]:
    """What each way of writing a unit took, a round each."""
    store = make_store(folder / codec, codec, len(rows), rows.shape[1], 2 * (rounds + 1))
    array, starts = (
        store.arrays.rows(LAYER),
        store.piece_starts(0).ravel(),
    )  # the same in all units

    def prepared(unit: int) -> Prepared:
        return prepare(rows, store.permutation(unit), starts, array)

    once, runs, other = prepared(0), [], folder / "plain"
    for unit in range(0, store.units, 2):
        taken = {"write": spent(lambda unit=unit: store.commit_residuals(unit, {LAYER: once}))}
        nbytes = sum(path.stat().st_size for path in objects_of(store, unit))
        taken["plain"] = spent(lambda nbytes=nbytes: plain(other, once, nbytes))
        taken["prepare_and_write"] = spent(
            lambda unit=unit + 1: store.commit_residuals(unit, {LAYER: prepared(unit)})
        )
        for path in [*objects_of(store, unit), *objects_of(store, unit + 1), other]:
            path.unlink()
        os.sync()  # a round pays for its own writes only
        runs.append(taken)
    return runs[1:]  # the first warmed caches and the allocator


def summarise(codec: str, runs: list[dict[str, Spent]], nbytes: int) -> dict[str, Any]:
    """GB/s of rows, and speed over the plain write's."""
    figures: dict[str, Any] = {}
    for name in ("write", "prepare_and_write"):
        ratios = [run["plain"].wall / run[name].wall for run in runs]
        figures |= {
            f"{codec}_{name}_GB_per_s": nbytes / 1e9 / min(run[name].wall for run in runs),
            f"{codec}_{name}_ratio": statistics.median(ratios),
            f"{codec}_{name}_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            f"{codec}_{name}_ratio_of_bests": min(r["plain"].wall for r in runs)
            / min(r[name].wall for r in runs),
            f"{codec}_{name}_cpu_s": min(run[name].cpu for run in runs),
        }
    figures[f"{codec}_plain_s"] = min(run["plain"].wall for run in runs)
    figures[f"{codec}_plain_cpu_s"] = min(run["plain"].cpu for run in runs)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.write_path")
    parser.add_argument(
        "--folder", type=Path, help="on the file system to be measured; default: the temporary one"
    )
    for name, default in (("rows", 65_536), ("width", 2560), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out, where = shape.pop("out"), shape.pop("folder")
    rows = synthetic(shape["rows"], shape["width"])
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        figures = {}
        for codec in CODECS:
            figures |= summarise(codec, measure(codec, rows, shape["rounds"], folder), rows.nbytes)
    finally:
        shutil.rmtree(folder)
    finish(shape, figures, out)


if __name__ == "__main__":
    main()
