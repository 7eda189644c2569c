"""How much of the encoder product's speed training keeps: `python -m tests.bench.train_speed [--out
FILE]`.

Training needs at least the product of its rows with W_enc. So the figure is a share: tokens/s of
whole training steps (scaling, top k, losses, all gradients, Adam, projection, dead counters,
logging) over tokens/s of that product alone into a preallocated output, same shapes, same threads,
in alternating blocks of one process, so that a busy machine slows both. Reading is not part of it:
batches are in memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residual_saes.train.sae import SAEConfig
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.bench.outcome import finish

_STEPS = 1_000_000  # the schedule's length; the bench ends long before
_BATCHES = 4  # that are different


class InMemory:
    """Normal rows: the surface of data.rows.reader.Reader."""

    def __init__(self, d: int, batch: int, widths: list[int] | None = None) -> None:
        """Args:
        widths: of the sources, d together; None: there is one.
        """
        draw = torch.Generator().manual_seed(0)
        self.every = [torch.randn(batch, d, generator=draw).bfloat16() for _ in range(_BATCHES)]
        self.rows = _STEPS * batch
        self.widths = widths or [d]
        parts = self.every[0].float().split(self.widths, 1)
        self.mean_norms = [float(part.norm(dim=1).mean()) for part in parts]
        self.mean, self.variance = np.zeros(d), np.ones(d)

    def batches(self, start: int) -> Iterator[Tensor]:
        yield from cycle(self.every)


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Mean seconds of one `step`."""
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


@torch.no_grad()
def measure(d: int, d_sae: int, k: int, batch: int, blocks: int, steps: int) -> dict[str, Any]:
    """Alternate blocks of training steps and of bare products."""
    reader = InMemory(d, batch)
    trainer = Trainer(
        TrainConfig(layer=0, batch=batch, sae=SAEConfig(d_sae=d_sae, k=k)),
        reader,
        torch.device("cpu"),
    )
    rows, x, out = reader.batches(0), next(reader.batches(0)).float(), torch.empty(batch, d_sae)

    def train_step() -> None:
        trainer.step_(next(rows))

    def product() -> None:
        torch.mm(x, trainer.state.sae.W_enc, out=out)

    seconds(train_step, 2), seconds(product, 2)  # warm caches and the allocator
    pairs = [(seconds(train_step, steps), seconds(product, steps)) for _ in range(blocks)]
    return {
        "train_tokens_per_s": batch / statistics.median(whole for whole, _ in pairs),
        "encoder_tokens_per_s": batch / statistics.median(bare for _, bare in pairs),
        "share": statistics.median(bare / whole for whole, bare in pairs),
        "share_lowest": min(bare / whole for whole, bare in pairs),
        "share_highest": max(bare / whole for whole, bare in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train_speed")
    for name, default in (
        ("d", 384),
        ("d_sae", 4096),
        ("k", 32),
        ("batch", 2048),
        ("blocks", 7),
        ("steps", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's choice")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    given = vars(parser.parse_args())
    out, threads = given.pop("out"), given.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    finish(given, measure(**given), out)


if __name__ == "__main__":
    main()
