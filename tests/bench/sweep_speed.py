"""Eight arms on one read of the store over the same eight alone: `python -m tests.bench.sweep_speed
[--out FILE]`.

The arms are four learning rates times AuxK on and off, on one store. Together: one process opens
the store and calls train.sweep.train_sweep with all arms, as `python -m train -m` does. Alone:
eight processes, one after another, each of which opens the store and calls train.loop.train with
one arm, as eight commands do. Every process is fresh, so that no arm finds a reader, window, buffer
or warm allocator of another's; its clock runs from opening the store to the last sae_final.pt.
Starting Python, importing torch and what torch imports when it first trains (each process trains a
tiny SAE in memory beforehand) are left out: `start_up_s`, which eight commands pay eight times,
would flatter the sweep, as runs are short here. Rounds alternate. Ratios are alone / together, so
that above 1 the sweep is the cheaper.

CPU seconds are of all threads: reading has threads of its own, which on idle cores cost no wall
time. What one pass over the store costs by itself, with nobody working on the batches, is
`read_once`: the most that an arm can save.

Bytes read are counted where the store reads them, by an object around every file that
data.place.LocalPlace opens: exactly what was asked of the store, through the page cache or not.
/proc/self/io's rchar would count checkpoints, code and /proc besides. The page cache is warm on
both sides, as the store has just been written.

After each round all sae_final.pt must be the same bytes on both sides, or the bench fails. Memory
per arm is what train.sweep.arm_bytes plans with; beside it is what another arm really added to the
peak of the process.

Rows are normal ones about a mean, whose principal axes weigh 1, 1/2, 1/3, ... as those of
activations fall off; the same in all units. Arms learn little from them, but latents along weak
axes die, so that with a small --dead_after AuxK acts. `different_arms` says how many final files
differ from each other: 8 if it did in all.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

import torch

from residual_saes.data.durable import Buffer
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, held_out
from residual_saes.data.store.place import Blob, LocalPlace
from residual_saes.data.store.store import Store
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import SAEConfig
from residual_saes.train.sae_file import FILE
from residual_saes.train.stream import Stream
from residual_saes.train.sweep import arm_bytes, train_sweep
from residual_saes.train.trainer import TrainConfig
from tests.bench.outcome import finish
from tests.bench.reader_speed import LAYER, SEED, make_store
from tests.bench.train_speed import InMemory

RATES, AUX = (1e-3, 2e-3, 4e-3, 8e-3), (0.0, 1 / 32)
ARMS = list(product(RATES, AUX))
_CPU = torch.device("cpu")


class Side(NamedTuple):
    """What a process took; of several, the sums, but the highest peak."""

    wall_s: float
    cpu_s: float
    bytes_read: int  # from the store
    peak_bytes: int  # resident, beyond what there was before the clock ran
    start_up_s: float  # before the clock ran


@dataclass(frozen=True)
class Job:
    """Some arms that one process trains, or, if there are none, a pass over the store."""

    store: Path
    folder: Path
    arms: tuple[int, ...]
    d_sae: int
    k: int
    batch: int
    tokens: int | None
    dead_after: int
    threads: int


class Counted:
    """A file whose reads are counted."""

    def __init__(self, blob: Blob, note: Count) -> None:
        self._blob, self._note, self.size = blob, note, blob.size

    def __enter__(self) -> Self:
        self._blob.__enter__()
        return self

    def __exit__(self, *why: object) -> None:
        self._blob.__exit__(*why)

    def read(self, offset: int, nbytes: int) -> Buffer:
        data = self._blob.read(offset, nbytes)
        self._note.add(memoryview(data).nbytes)
        return data


class Count:
    """Bytes, added up by several threads."""

    def __init__(self) -> None:
        self.bytes, self._lock = 0, threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.bytes += nbytes


@contextmanager
def counted() -> Iterator[Count]:
    """Count what is read of folders that are stores, by whatever thread."""
    count, opened = Count(), LocalPlace.open
    with mock.patch.object(
        LocalPlace, "open", lambda place, key: Counted(opened(place, key), count)
    ):
        yield count


def arms_of(job: Job, stream: Stream) -> list[Arm]:
    found = []
    for number in job.arms:
        rate, aux = ARMS[number]
        sae = SAEConfig(
            d_sae=job.d_sae, k=job.k, aux_coef=aux, aux_norm="variance", dead_after=job.dead_after
        )
        optim = OptimConfig(lr=rate, lr_floor=0.0)
        config = TrainConfig(layer=LAYER, batch=job.batch, tokens=job.tokens, sae=sae, optim=optim)
        found.append(Arm(config, stream, job.folder / str(number)))
    return found


def memory(field: str) -> int:
    """Bytes that /proc/self/status says: VmRSS, or VmHWM for the peak. Not getrusage's, which a
    child inherits.
    """
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def realistic(rows: int, width: int) -> torch.Tensor:
    """(rows, width) bfloat16 whose variances along their axes fall off like 1/i."""
    draw = torch.Generator().manual_seed(0)
    axes = (
        torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
        / torch.arange(1, width + 1).sqrt()
    )
    found: torch.Tensor = torch.randn(rows, width, generator=draw) @ axes.T + torch.randn(
        width, generator=draw
    )
    return found.bfloat16()


def warm_up(folder: Path) -> None:
    """Train a tiny SAE, so that all is imported that torch imports late."""
    rows = InMemory(8, 16)
    stream = Stream("warm", rows, lambda: islice(rows.batches(0), 1))
    config = TrainConfig(layer=0, batch=16, tokens=32, sae=SAEConfig(d_sae=64, k=2))
    with tempfile.TemporaryDirectory(dir=folder) as run, redirect_stderr(io.StringIO()):
        train(Arm(config, stream, Path(run)), _CPU)


def work(job: Job, before: float) -> Side:
    """Do a job in this process, which is fresh and was asked for at `before`, by time.time."""
    torch.set_num_threads(job.threads)
    warm_up(job.folder.parent)
    started = time.time() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    rss = memory("VmRSS")
    with counted() as count, redirect_stderr(io.StringIO()):
        began, cpu = time.perf_counter(), time.process_time()
        store = Store.open(job.store)
        reader = Reader([Source.of(store, LAYER)], batch=job.batch, seed=SEED, policy=Policy())
        stream = Stream(
            store.identity, reader, lambda: held_out([Source.of(store, LAYER)], Policy(), job.batch)
        )
        arms = arms_of(job, stream)
        if not arms:
            with closing(reader.batches(0)) as batches:  # type: ignore[type-var]
                for _ in islice(batches, (job.tokens or reader.rows) // job.batch):
                    pass
        outcomes = [train(arms[0], _CPU)] if len(arms) == 1 else train_sweep(arms, _CPU)
        took = time.perf_counter() - began, time.process_time() - cpu
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return Side(*took, count.bytes, memory("VmHWM") - rss, started)


def asked(job: Job) -> Side:
    """Do a job in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, job, time.time()).result()


def total(sides: list[Side]) -> Side:
    peak = max(side.peak_bytes for side in sides)
    return Side(*map(sum, zip(*sides, strict=True)))._replace(peak_bytes=peak)


def digests(folder: Path) -> list[str]:
    """Of the arms' final files, in their order."""
    return [
        hashlib.sha256((folder / str(n) / FILE).read_bytes()).hexdigest() for n in range(len(ARMS))
    ]


def measure(store: Path, folder: Path, rounds: int, given: dict[str, Any]) -> dict[str, Any]:
    """Rounds of both sides, in turns."""
    together, alone, reading, kinds = list[Side](), list[Side](), list[Side](), 0
    every = tuple(range(len(ARMS)))
    for number in range(rounds):
        here = {name: folder / f"{name}_{number}" for name in ("together", "alone")}

        def job(name: str, arms: tuple[int, ...], here: dict[str, Path] = here) -> Job:
            return Job(store, here[name], arms, **given)

        for name in sorted(here, reverse=number % 2 == 0):  # each is first in every second round
            if name == "together":
                together.append(asked(job(name, every)))
            else:
                alone.append(total([asked(job(name, (arm,))) for arm in every]))
        reading.append(asked(job("together", ())))
        found = digests(here["alone"])
        if digests(here["together"]) != found:
            sys.exit(f"an arm that was trained with others differs from itself alone: see {folder}")
        kinds = len(set(found))
        for path in here.values():
            shutil.rmtree(path)
    return {**figures(together, alone, reading), "byte_identical": True, "different_arms": kinds}


def figures(together: list[Side], alone: list[Side], reading: list[Side]) -> dict[str, Any]:
    """Medians over the rounds, the ratios' ranges, and memory."""
    found: dict[str, Any] = {}
    for name in ("wall_s", "cpu_s", "bytes_read"):
        pairs = [(getattr(a, name), getattr(t, name)) for a, t in zip(alone, together, strict=True)]
        ratios = [one / other for one, other in pairs]
        found |= {
            f"alone_{name}": statistics.median(one for one, _ in pairs),
            f"together_{name}": statistics.median(other for _, other in pairs),
            f"read_once_{name}": statistics.median(getattr(one, name) for one in reading),
            f"ratio_{name}": statistics.median(ratios),
            f"ratio_{name}_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    peaks = {"together": together, "alone": alone}
    for name, sides in peaks.items():
        found[f"{name}_peak_MB"] = statistics.median(side.peak_bytes for side in sides) / 1e6
    found["another_arm_adds_MB"] = (found["together_peak_MB"] - found["alone_peak_MB"]) / (
        len(ARMS) - 1
    )
    found["start_up_s"] = statistics.median(side.start_up_s for side in together)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sweep_speed")
    parser.add_argument(
        "--folder", type=Path, help="where store and runs are made; default: the temporary one"
    )
    sizes = {"units": 8, "rows": 65_536, "width": 384, "d_sae": 1024, "k": 16, "batch": 2048}
    for name, default in {**sizes, "dead_after": 50_000, "rounds": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--tokens", type=int, help="to train each arm on; default: one pass over the store"
    )
    parser.add_argument("--codec", choices=("none", "blosc", "int8"), default="blosc")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out, where = shape.pop("out"), shape.pop("folder")
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        path = folder / "store.zarr"
        store = make_store(
            path, shape["codec"], realistic(shape["rows"], shape["width"]), shape["units"]
        )
        given = {
            name: shape[name] for name in ("d_sae", "k", "batch", "tokens", "dead_after", "threads")
        }
        found = measure(path, folder, shape["rounds"], given)
        reader = Reader([Source.of(store, LAYER)], batch=shape["batch"], seed=SEED, policy=Policy())
        stream = Stream("", reader, lambda: iter(()))
        (arm,) = arms_of(Job(path, folder, (0,), **given), stream)
        found |= {"arm_MB": arm_bytes(arm) / 1e6, "steps": arm.config.steps(reader.rows)}
    finally:
        shutil.rmtree(folder)
    finish(shape, found, out)


if __name__ == "__main__":
    main()
