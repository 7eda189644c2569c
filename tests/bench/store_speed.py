"""Our reading and writing of one shard over zarr-python's: `python -m tests.bench.store_speed
[--out FILE]`.

The same file, the same codec, whole inner chunks, from the page cache and into it, in alternating
rounds of one process. Ours is one thread here; zarr-python uses its own threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.shard import Shard, UnitArray
from residual_saes.data.store.zarr_bfloat16 import to_bits
from tests.bench.outcome import finish


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(
    codec: str, rows: NDArray[np.uint16], chunk: int, rounds: int, root: Path
) -> dict[str, float]:
    """GB/s of ours, and the ratio to zarr-python's, for writing and reading a shard of `rows`."""
    array = UnitArray(codec, "bfloat16", len(rows), rows.shape[1:], len(rows), codec, chunk)
    place = LocalPlace(root)
    (root / codec).mkdir()
    (root / codec / "zarr.json").write_text(json.dumps(array.metadata()))
    theirs = zarr.open_array(root / codec, mode="r+")
    out = np.empty((chunk, *rows.shape[1:]), np.uint16)
    chunks = range(len(rows) // chunk)

    def write() -> None:
        with (root / array.key(0)).open("wb") as file:
            file.writelines(array.encode(rows))

    def read() -> None:
        with Shard(array, place, 0) as shard:
            for number in chunks:
                shard.read(number, out)

    def their_write() -> None:
        theirs[:] = rows

    def their_read() -> None:
        for number in chunks:
            theirs[number * chunk : (number + 1) * chunk]

    times = [
        [seconds(action) for action in (write, read, their_write, their_read)]
        for _ in range(rounds + 1)
    ][1:]
    ours_w, ours_r, zarr_w, zarr_r = zip(*times, strict=True)
    return {
        f"{codec}_write_GB_per_s": rows.nbytes / 1e9 / statistics.median(ours_w),
        f"{codec}_write_ratio": statistics.median(
            b / a for a, b in zip(ours_w, zarr_w, strict=True)
        ),
        f"{codec}_read_GB_per_s": rows.nbytes / 1e9 / statistics.median(ours_r),
        f"{codec}_read_ratio": statistics.median(
            b / a for a, b in zip(ours_r, zarr_r, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.store_speed")
    for name, default in (("rows", 16_384), ("width", 2560), ("chunk", 1024), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out = shape.pop("out")
    rows = to_bits(
        np.random.default_rng(0).normal(size=(shape["rows"], shape["width"])).astype(np.float32)
    )
    root = Path(tempfile.mkdtemp())
    try:
        figures = {}
        for codec in ("none", "blosc"):
            figures |= measure(codec, rows, shape["chunk"], shape["rounds"], root)
    finally:
        shutil.rmtree(root)
    finish(shape, figures, out)


if __name__ == "__main__":
    main()
