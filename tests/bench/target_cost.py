"""What a step of a transcoder or a crosscoder costs beside an SAE's: `python -m
tests.bench.target_cost [--device cuda]`.

A step is a training step with all of its parts (tests.bench.train_speed), on rows in memory. Each
pair does as many products of a row with a weight matrix:

    transcoder    d to d, over an SAE of width d
    skip          the same with W_skip, which has products of its own
    crosscoder    two hook points of width d, over an SAE of width 2 d
    per_target    the same, over two SAEs of width d

All take turns in one process, block by block. Times are of the process's CPU, on a GPU of the
clock; a ratio is the median over the rounds, beside the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from residual_saes.train import objective
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.bench.outcome import finish
from tests.bench.precision import as_in_training
from tests.bench.train_speed import InMemory

_BLOCK = 10  # steps, of which one is logged and one projects
RATIOS = {
    "transcoder": ("transcoder", ("sae",)),
    "skip": ("skip", ("sae",)),
    "crosscoder": ("crosscoder", ("wide_sae",)),
    "per_target": ("crosscoder", ("sae", "sae")),
}


def steps(widths: list[int], asked: argparse.Namespace, **kind: Any) -> Callable[[], object]:
    """Training step after training step on normal rows."""
    reader = InMemory(sum(widths), asked.batch, widths)
    sae = objective.find(asked.activation).settings(
        activation=asked.activation, d_sae=asked.d_sae, k=asked.k, **kind
    )
    layer = (0, 1) if sae.kind == "crosscoder" else 0
    site = "mlp_in" if sae.kind == "transcoder" else "resid_post"
    config = TrainConfig(layer=layer, site=site, batch=asked.batch, sae=sae, matmul=asked.matmul)
    trainer = Trainer(config, reader, torch.device(asked.device))  # type: ignore[arg-type]
    rows = reader.batches(0)
    return lambda: trainer.step_(next(rows))


def block_ms(step: Callable[[], object], cuda: bool) -> float:
    """Milliseconds of one step, the mean of a block."""
    clock = time.perf_counter if cuda else time.process_time
    began = clock()
    for _ in range(_BLOCK):
        step()
    if cuda:
        torch.cuda.synchronize()
    return (clock() - began) / _BLOCK * 1e3


@torch.no_grad()
def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each, and the ratios."""
    as_in_training()
    d = asked.d
    made = {
        "sae": steps([d], asked),
        "transcoder": steps([d, d], asked, kind="transcoder"),
        "skip": steps([d, d], asked, kind="transcoder", skip=True),
        "wide_sae": steps([2 * d], asked),
        "crosscoder": steps([d, d], asked, kind="crosscoder"),
    }
    cuda = asked.device == "cuda"
    rounds = []
    for _ in range(asked.rounds + 1):
        rounds.append({name: block_ms(step, cuda) for name, step in made.items()})
    rounds = rounds[1:]  # the first warmed caches and the allocator
    found: dict[str, Any] = {}
    for name in made:
        found[f"{name}_ms"] = statistics.median(one[name] for one in rounds)
    for name, (own, others) in RATIOS.items():
        ratios = [one[own] / sum(one[other] for other in others) for one in rounds]
        found[name] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"d": 384, "d_sae": 4096, "k": 32, "batch": 2048, "rounds": 7, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--activation", default="topk", help="a file of train/objectives")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--matmul", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shape = {name: value for name, value in vars(asked).items() if name != "out"}
    finish(shape, measure(asked), asked.out)


if __name__ == "__main__":
    main()
