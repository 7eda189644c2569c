"""Training steps: their speed, their memory, and how their time is spent.

Rows are random ones in the GPU's memory: reading them from a store is not part of it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cache
from itertools import cycle
from typing import Any

import torch

from residual_saes.train import objective
from residual_saes.train.trainer import Trainer
from tests.bench.dense import dense_loss, dense_weights
from tests.bench.gpu_check.arithmetic import RUN, TOY, Size, Way, pinned, ways_on
from tests.bench.gpu_check.notes import Notes
from tests.bench.precision import as_in_training
from tests.bench.train_phases import Shape, phases
from tests.bench.train_speed import InMemory

AIM = 500_000  # tokens/s
# SmallMelon-L/FlashSAE's stored timings of d 4,096, 32,768 latents, k 128, 4,096 rows: forward and
# backward without the optimizer, on a GPU that it does not name.
STORED = Size(4096, 32_768, 128, 4096)
TINY = {"part": {"size": TOY, "stored": Size(24, 128, 4, 32), "steps": 2}}
_SPARSE, _DENSE = "FlashSAE: 32.9, GPU unnamed", "FlashSAE's dense pass: 108.7, GPU unnamed"
_SAME_LOSS = {"bf16": 1e-3}  # share of fp32's; others 1e-4


def shape_of(size: Size, way: Way, device: torch.device, sae: str = "topk_32k") -> Shape:
    """What is trained: one of conf/sae, with sizes of its own."""
    optim = "adam" if sae == "topk_32k" else "scaled"
    return Shape(*size, sae, optim, way.matmul, device.type, torch.get_num_threads())


@cache
def _reader(d: int, batch: int, device: str) -> tuple[Any, list[torch.Tensor]]:
    """Random rows, and their batches on the device."""
    reader = InMemory(d, batch)
    return reader, [rows.to(device) for rows in reader.every]


def begun(shape: Shape) -> tuple[Trainer, Callable[[], torch.Tensor]]:
    """A trainer before its first step, and what gives its next batch, which is on the device."""
    reader, rows = _reader(shape.d, shape.batch, shape.device)
    batches = cycle(rows)
    return shape.trainer(reader), lambda: next(batches)


@torch.no_grad()
def part(
    device: torch.device,
    notes: Notes,
    size: Size = RUN,
    stored: Size = STORED,
    steps: int = 20,
) -> None:
    """Steps at a run's size, each way; then at the size of the stored timings."""
    losses: dict[str, float] = {}
    for name, way in ways_on(device).items():
        with notes.piece(f"steps, {name}"), pinned(way, size, device):
            losses[name] = _steps(size, name, way, device, notes, steps, aim=AIM)
            off = abs(losses[name] / losses["fp32"] - 1)
            said = f"{off:.1e} from fp32's, as a share"
            held = off <= _SAME_LOSS.get(name, 1e-4)
            notes.check(f"first loss, {name}", None if held else said, said)
    for name, way in ways_on(device).items():
        with notes.piece(f"steps, d {stored.d}, {name}"), pinned(way, stored, device):
            _steps(stored, name, way, device, notes, steps, passes=True)
    with notes.piece("dense pass"):
        _dense(stored, device, notes, steps)
    for name, way in ways_on(device).items():
        if name in ("tf32", "exact"):
            with notes.piece(f"phases, {name}"), pinned(way, size, device):
                _phases(size, name, way, device, notes)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean of one call, the device's work included, after three that warm up."""
    for number in range(3 + repeats):
        if number == 3:
            _wait(device)
            began = time.perf_counter()
        call()
    _wait(device)
    return 1e3 * (time.perf_counter() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps(
    size: Size,
    name: str,
    way: Way,
    device: torch.device,
    notes: Notes,
    steps: int,
    aim: float | None = None,
    passes: bool = False,
) -> float:
    """Speed and memory of whole steps, and of forward and backward alone; the first loss."""
    cuda = device.type == "cuda"
    if cuda:
        gc.collect()  # the trainer before this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer, batch = begun(shape_of(size, way, device))
    first = trainer.step_(batch())
    assert first is not None
    ms = milliseconds(lambda: trainer.step_(batch()), device, steps)
    where = f"training, d {size.d}, {name}"
    notes.figure(f"{where}: a step", ms, "ms")
    notes.figure(f"{where}: speed", 1e3 * size.batch / ms, "tokens/s", aim)
    if cuda:
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        notes.figure(f"{where}: peak memory", peak, "GB")
    if passes:
        ms = milliseconds(lambda: _passed(trainer, batch()), device, steps)
        notes.figure(f"{where}: forward and backward", ms, "ms", elsewhere=_SPARSE)
    return float(first["loss"])


def _passed(trainer: Trainer, batch: torch.Tensor) -> objective.Losses:
    """Losses and gradients of a batch, without the optimizer."""
    x, y = trainer.columns.split(trainer.columns.scaled(batch))
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    given = trainer.objective, trainer.state.sae, x, y, none, trainer.mean_variance, trainer.group
    return objective.losses(*given)


def _dense(size: Size, device: torch.device, notes: Notes, steps: int) -> None:
    """Forward and backward done densely by autograd, as most do it."""
    shape = shape_of(size, ways_on(device)["fp32"], device)
    weights = dense_weights(shape)
    x = _reader(size.d, size.batch, device.type)[1][0].float()

    def passed() -> None:
        with torch.enable_grad():
            torch.autograd.grad(dense_loss(weights, x, size.k), [*weights.values()])

    as_in_training(deterministic=False)
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    for name, precision in {"fp32": "ieee", "tf32": "tf32"}.items():
        setting.fp32_precision = precision
        ms = milliseconds(passed, device, steps)
        what = f"training, d {size.d}, {name}: forward and backward, dense"
        notes.figure(what, ms, "ms", elsewhere=_DENSE)
    setting.fp32_precision = before
    as_in_training()


def _phases(size: Size, name: str, way: Way, device: torch.device, notes: Notes) -> None:
    found = phases(shape_of(size, way, device), None, 0, blocks=1)["phases"]
    lines = [f"{phase:<24}{row['ms']:10.3f} ms {row['share']:7.1%}" for phase, row in found.items()]
    notes.table(f"phases of a step, {name}", lines)
