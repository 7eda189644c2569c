"""Where a training step's time goes: `python -m tests.bench.train_phases [--device cuda] [--out
FILE]`.

The functions that train.trainer.Trainer.step_ calls are wrapped, and the step is cut where one of
them begins or ends: every moment is of exactly one phase. `other` is what none of them is: the wait
for the loss, the schedule, the step's own lines. Blocks of ten steps, one of which has the log's
figures, alternate with blocks without clocks; figures are medians over the blocks, so the phases'
sum falls short of the step by what a busy machine took, now here, now there. On CUDA a cut is an
event, so that nothing waits for it; a phase then has the time that the GPU waited for its launch.

`limit` is what the same run's large copy and large square product would take, on the same threads:
the bytes that the phase must move over the copy's bandwidth or its operations over the product's
rate, whichever is more. `of limit` is limit over time, 1 is best. Gathers count every pair's row of
float32; of a table that fits into a cache they move faster than the copy, so that theirs may be
above 1. The others count what they must read and write once.

Rows are normal ones in memory, so all latents fire about equally often: the worst case for caches.
With --store they are a store's, read as by `python -m train`: d is the store's, and the wait for
data is real. Left out: AuxK and resampling, as no latent is dead within so few steps; evaluation,
checkpoints. `--sae rows_32k --optim rows` rotates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast
from unittest import mock

import torch

from residual_saes.data.rows.copy import to_device
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.store.store import Store
from residual_saes.train import objective
from residual_saes.train.blocks import Matmul
from residual_saes.train.optim import OptimConfig
from residual_saes.train.stream import first_rows
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.bench.outcome import finish
from tests.bench.precision import as_in_training, settings
from tests.bench.train_speed import InMemory, seconds

PHASES = [
    "data wait",
    "scaling, centring",
    "rotation",
    "encoder product",
    "top k",
    "decode",
    "error, loss",
]
PHASES += [
    "gradient of kept values",
    "sort",
    "weight gradients",
    "b_dec, b_enc gradients",
    "Adam",
    "projection",
]
PHASES += ["AuxK", "resampling", "counters", "figures to log", "other"]
# By function: the phase inside; and by the phase that it is called in, the one after, if that is
# another.
WATCHED: dict[str, tuple[str, dict[str, str]]] = {
    "residual_saes.train.dead.dead_latents": ("counters", {"scaling, centring": "other"}),
    "residual_saes.train.objective.losses": ("scaling, centring", {}),
    "torch.autograd.grad": ("b_dec, b_enc gradients", {}),
    "residual_saes.train.product.encode": ("top k", {}),
    "residual_saes.train.product.encode_above": ("top k", {}),
    "residual_saes.train.product.encode_batch": ("top k", {}),
    "residual_saes.train.objective.auxk": ("AuxK", {}),
    "residual_saes.train.kernels.decode": ("decode", {}),
    "residual_saes.train.kernels.values_gradient": ("gradient of kept values", {}),
    "residual_saes.train.kernels.group_by_latent": ("sort", {}),
    "residual_saes.train.kernels.weight_gradient": ("weight gradients", {}),
    "residual_saes.train.optim.Adam.step_": ("Adam", {}),
    "residual_saes.train.dead.firings": ("counters", {}),
    "residual_saes.train.dead.count_": ("counters", {}),
    "residual_saes.train.view.View._turned": ("rotation", {}),
    "residual_saes.train.sae.SAE.project_": ("projection", {}),
    "residual_saes.train.trainer.Trainer.resample_": ("resampling", {}),
    "residual_saes.train.trainer.Trainer._record": ("figures to log", {}),
}
for name in objective.names():
    WATCHED[f"residual_saes.train.objectives.{name}.OBJECTIVE.main"] = ("error, loss", {})
BLOCK = 10  # steps


@dataclass(frozen=True)
class Shape:
    """What is trained, and where."""

    d: int
    d_sae: int
    k: int
    batch: int
    sae: str  # a file of conf/sae
    optim: str  # a file of conf/optim
    matmul: Matmul
    device: str
    threads: int

    def config(self) -> TrainConfig:
        given = settings("sae", self.sae, d_sae=self.d_sae, k=self.k)
        given["k_aux"] = given["k_aux"] or 4 * self.k  # as train/recipe.py
        sae = objective.find(given["activation"]).settings(**given)
        optim = OptimConfig(**settings("optim", self.optim))
        return TrainConfig(
            layer=0, batch=self.batch, matmul=self.matmul, log_every=BLOCK, sae=sae, optim=optim
        )

    def trainer(self, reader: Reader) -> Trainer:
        """One that has begun, under train.loop's own rules."""
        as_in_training(True)
        trainer = Trainer(self.config(), reader, torch.device(self.device))
        if trainer.rows_to_begin:
            trainer.begin_(first_rows(reader, trainer.rows_to_begin))
        return trainer


class Clock:
    """Time from cut to cut, each piece of the phase that its first cut names."""

    def __init__(self, cuda: bool) -> None:
        self.phase, self._cuda, self._cuts = "other", cuda, list[tuple[str, Any]]()

    def cut(self, phase: str) -> None:
        self.phase = phase
        if self._cuda:
            self._cuts.append((phase, event := torch.cuda.Event(enable_timing=True)))  # type: ignore[no-untyped-call]
            event.record()
        else:
            self._cuts.append((phase, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """A step's of each phase, in the block of steps since this was asked last."""
        if self._cuda:
            torch.cuda.synchronize()
        found = dict.fromkeys(PHASES, 0.0)
        for (phase, began), (_, ended) in pairwise(self._cuts):
            found[phase] += (
                began.elapsed_time(ended) if self._cuda else (ended - began) * 1e3
            ) / BLOCK
        self._cuts.clear()
        return found

    def within(self, phase: str, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Make a call, with a cut before and one behind."""
        before = self.phase
        self.cut(phase)
        result = call(*given, **named)
        self.cut(before)
        return result

    def around(self, target: str) -> Callable[..., Any]:
        """The function that a name of WATCHED stands for, with its cuts."""
        function, (inside, behind) = resolve_name(target), WATCHED[target]

        def call(*given: Any, **named: Any) -> Any:
            before = self.phase
            result = self.within(inside, function, *given, **named)
            if before in behind:
                self.cut(behind[before])
            return result

        return call


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Cut steps by their functions within the block."""
    blocks = resolve_name("residual_saes.train.blocks.pre_activations")

    def product(
        *given: Any,
    ) -> Iterator[Any]:  # a generator: what counts is the time to its next block
        return iter(
            partial(clock.within, "encoder product", partial(next, blocks(*given), None)), None
        )

    with ExitStack() as stack:
        for target in WATCHED:
            stack.enter_context(mock.patch(target, clock.around(target)))
        stack.enter_context(mock.patch("residual_saes.train.blocks.pre_activations", product))
        yield


def limits(device: torch.device, precisions: set[str]) -> dict[str, float]:
    """Bytes that a copy moves in a ms, and operations that a square product makes in it, by
    precision.
    """
    cuda, setting = device.type == "cuda", torch.backends.cuda.matmul
    before = setting.fp32_precision

    def fastest(call: Callable[[], object]) -> float:
        wait: Callable[[], object] = torch.cuda.synchronize if cuda else lambda: None
        return 1e3 * min(
            seconds(lambda: (call(), wait()), 1) for _ in range(4)
        )  # the first warms up

    source = torch.randn(1 << (28 if cuda else 26), device=device)
    found = {"copy": 2 * source.nbytes / fastest(partial(torch.empty_like(source).copy_, source))}
    for name in precisions:
        kind, side = torch.bfloat16 if name == "bf16" else torch.float32, 8192 if cuda else 2048
        a = torch.randn(side, side, device=device).to(kind)
        setting.fp32_precision = "tf32" if name == "tf32" else "ieee"
        found[name] = 2 * side**3 / fastest(partial(torch.mm, a, a, out=torch.empty_like(a)))
    setting.fp32_precision = before
    return found


def needs(shape: Shape) -> dict[str, tuple[float, float, str]]:
    """Of each phase, per step: bytes that must move, operations, and their precision."""
    n, d, F, every = shape.batch, shape.d, shape.d_sae, shape.config().optim.project_every
    pairs, table, rows, gathered = n * shape.k, 4.0 * F * d, 4.0 * n * d, 4.0 * n * shape.k * d
    return {
        "scaling, centring": (1.5 * rows, 0, "fp32"),  # bfloat16 in, float32 out
        "rotation": (2 * rows, 2.0 * n * d * d, "fp32"),
        "encoder product": (rows + table + 4.0 * n * F, 2.0 * n * d * F, shape.matmul),
        "top k": (4.0 * n * F, 0, "fp32"),
        "decode": (gathered + rows, 0, "fp32"),
        "error, loss": (4 * rows, 0, "fp32"),  # x, x_hat; e, its gradient
        "gradient of kept values": (gathered + rows, 0, "fp32"),
        "sort": (16.0 * pairs, 0, "fp32"),
        "weight gradients": (2 * (gathered + table), 0, "fp32"),
        "b_dec, b_enc gradients": (
            rows + 12.0 * pairs + table,
            0,
            "fp32",
        ),  # b_dec's other path reads W_enc
        "Adam": (2 * 7 * table, 0, "fp32"),
        "projection": (2 * table / every, 0, "fp32"),
        "counters": (12.0 * pairs + 24.0 * F, 0, "fp32"),
        "figures to log": (2 * rows / BLOCK, 0, "fp32"),
    }


def tabled(
    took: Mapping[str, float], required: Mapping[str, Any], limit: Mapping[str, float]
) -> dict[str, Any]:
    """A row for each phase that took time."""
    found: dict[str, Any] = {}
    for phase in (phase for phase in PHASES if took[phase]):
        found[phase] = {"ms": took[phase], "share": took[phase] / sum(took.values())}
        if phase in required:
            nbytes, operations, precision = required[phase]
            least, by = max(
                (nbytes / limit["copy"], "copy"),
                (operations / limit[precision], f"{precision} product"),
            )
            found[phase] |= {"limit_ms": least, "of_limit": least / took[phase], "limited_by": by}
    return found


@torch.no_grad()
def phases(shape: Shape, store: Path | None, layer: int, blocks: int) -> dict[str, Any]:
    """Alternate blocks of steps with clocks and without."""
    device, reader = torch.device(shape.device), cast("Reader", InMemory(shape.d, shape.batch))
    if store:
        how: Any = {"batch": shape.batch, "policy": Policy(), "pinned": device.type == "cuda"}
        reader = Reader([Source.of(Store.open(store), layer)], seed=0, **how)
        shape = replace(shape, d=sum(reader.widths))
    trainer, clock, precisions = (
        shape.trainer(reader),
        Clock(device.type == "cuda"),
        {"fp32", str(shape.matmul)},
    )
    with closing(to_device(reader.batches(0), device)) as feed:  # type: ignore[type-var]

        def block() -> dict[str, float]:
            for _ in range(BLOCK):
                clock.cut("data wait")
                batch = next(feed)
                clock.cut("scaling, centring")
                trainer.step_(batch)
            clock.cut("other")
            return clock.milliseconds()

        block()  # warms caches and the allocator
        every, plain, measured = list[dict[str, float]](), list[float](), list[dict[str, float]]()
        for _ in range(blocks):
            measured.append(limits(device, precisions))
            with watched(clock):
                every.append(block())
            plain.append(sum(block().values()))
    took, limit = medians(every), medians(measured)
    found = {
        "sum_ms": sum(took.values()),
        "step_ms": statistics.median(sum(one.values()) for one in every),
    }
    found |= {
        "step_without_clocks_ms": statistics.median(plain),
        "copy_GB_per_s": limit["copy"] / 1e6,
    }
    found |= {f"{name}_GFLOP_per_s": limit[name] / 1e6 for name in sorted(precisions)}
    return {"phases": tabled(took, needs(shape), limit), **found}


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def show_phases(figures: dict[str, Any]) -> None:
    print(f"{'':>24}  {'ms':>9}  {'share':>6}  {'limit ms':>9}  {'of limit':>8}")
    for phase, row in figures["phases"].items():
        known = (
            "  {limit_ms:9.3f}  {of_limit:8.2f}  {limited_by}".format(**row)
            if "limit_ms" in row
            else ""
        )
        print(f"{phase:>24}  {row['ms']:9.3f}  {row['share']:6.1%}{known}")
    for name in ("sum_ms", "step_ms", "step_without_clocks_ms"):
        print(f"{name:>24}  {figures[name]:9.3f}  {figures[name] / figures['step_ms']:6.1%}")
    print(
        "  ".join(
            f"{name} {value:,.1f}" for name, value in figures.items() if name.endswith("_per_s")
        )
    )


def arguments(prog: str) -> argparse.ArgumentParser:
    """A command line that names a shape."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.bench.{prog}")
    for name, default in {
        "d": 384,
        "d_sae": 4096,
        "k": 32,
        "batch": 2048,
        "threads": 1,
        "blocks": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--sae", default="scaled_32k", help="a file of conf/sae; d_sae and k are this command's"
    )
    parser.add_argument("--optim", default="scaled", help="a file of conf/optim")
    parser.add_argument("--matmul", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="write it there")
    return parser


def asked_shape(asked: argparse.Namespace) -> Shape:
    return Shape(**{name: getattr(asked, name) for name in Shape.__dataclass_fields__})


def main() -> None:
    parser = arguments("train_phases")
    parser.add_argument("--store", type=Path, help="take --layer of it")
    parser.add_argument("--layer", type=int, default=21)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shape = asked_shape(asked)
    figures = phases(shape, asked.store, asked.layer, asked.blocks)
    show_phases(figures)
    with redirect_stdout(None):  # the table has it
        finish(
            {**asdict(shape), "store": str(asked.store), "blocks": asked.blocks}, figures, asked.out
        )


if __name__ == "__main__":
    main()
