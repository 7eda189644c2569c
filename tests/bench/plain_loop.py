"""A training step beside a plain loop of torch's best pieces: `python -m tests.bench.plain_loop
[--out FILE]`.

The loop is what a TopK step needs and nothing else: addmm into one buffer, top k in two stages,
embedding_bag for decoding and both weight gradients after one sort, embedding_bag's own backward
for the kept values, torch's fused Adam, and the decoder's projection. It has no AuxK, counters,
figures or basis. Both alternate in one process, on the same rows in memory. Figures are CPU ms per
step, so a machine that others use slows neither alone; `ratio` is the loop's over ours, by block.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from residual_saes.train import kernels
from residual_saes.train.sae import initial
from tests.bench.outcome import finish
from tests.bench.train_phases import Shape, arguments, asked_shape
from tests.bench.train_speed import InMemory

STEPS = 4  # a block


def plain(shape: Shape) -> Callable[[Tensor], object]:
    """One step of the loop."""
    n, k, F = shape.batch, shape.k, shape.d_sae
    sae = initial(shape.config().sae, torch.zeros(shape.d), 0)
    weights = [sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec]
    adam = torch.optim.Adam(weights, lr=1e-4, eps=6.25e-10, fused=True)
    pre, starts = torch.empty(n, F), torch.arange(0, n * k, k)
    rows = torch.arange(n).repeat_interleave(k)

    def step(batch: Tensor) -> None:
        x = batch.float() - sae.b_dec
        torch.addmm(sae.b_enc, x, sae.encoder.T, out=pre)
        values, indices = kernels.topk(pre, k)
        values, latents = values.relu_().view(-1), indices.view(-1)
        error = x - embedding_bag(latents, sae.W_dec, starts, mode="sum", per_sample_weights=values)
        error.square().mean().item()
        upstream = error.mul_(-2 / error.numel())
        slopes: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            upstream, sae.W_dec, latents, starts, rows, 0
        )
        slopes *= values > 0
        ordered, order = latents.to(torch.int32).sort(stable=True)
        bags = torch.searchsorted(ordered, torch.arange(F, dtype=torch.int32))
        mine = rows[order]
        for weight, source, factors in (
            (sae.encoder, x, slopes),
            (sae.W_dec, upstream, values),
        ):
            weight.grad = embedding_bag(
                mine, source, bags, mode="sum", per_sample_weights=factors[order]
            )
        sae.b_enc.grad = slopes.new_zeros(F).scatter_add_(0, latents, slopes)
        sae.b_dec.grad = upstream.sum(0) - sae.encoder.T @ sae.b_enc.grad
        adam.step()
        sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True))

    return step


@torch.no_grad()
def measure(shape: Shape, blocks: int) -> dict[str, Any]:
    """Alternate blocks of both."""
    reader = InMemory(shape.d, shape.batch)
    rows = reader.batches(0)
    steps = {"plain": plain(shape), "ours": shape.trainer(reader).step_}  # type: ignore[arg-type]
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(blocks + 1):
        for name, step in steps.items():
            began = time.process_time()
            for _ in range(STEPS):
                step(next(rows))
            took[name].append((time.process_time() - began) / STEPS * 1e3)
    warm = {name: ms[1:] for name, ms in took.items()}  # the first warmed caches and the allocator
    ratios = [loop / ours for loop, ours in zip(warm["plain"], warm["ours"], strict=True)]
    medians = {f"{name}_ms": statistics.median(ms) for name, ms in warm.items()}
    return {**medians, "ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    asked = arguments("plain_loop").parse_args()
    torch.set_num_threads(asked.threads)
    shape = asked_shape(asked)
    finish({**asdict(shape), "blocks": asked.blocks}, measure(shape, asked.blocks), asked.out)


if __name__ == "__main__":
    main()
