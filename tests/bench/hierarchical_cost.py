"""What HierarchicalTopK's loss costs: `python -m tests.bench.hierarchical_cost [--out FILE]`.

CPU seconds of the losses and gradients of a batch, the least of a few rounds, over TopK's: of
halvings of k, as sae=hierarchical_32k has them, and of every j up to k, as arXiv 2505.24473 has it.
Left out: AuxK, the optimizer, GPUs. `MiB` is the largest float32 tensor that the nested
reconstructions need, of which the backward pass holds four.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from residual_saes.train import objective
from residual_saes.train.objectives.hierarchical import Hierarchical
from residual_saes.train.objectives.topk import TopK
from residual_saes.train.parallel import Group
from residual_saes.train.sae import SAEConfig, initial
from tests.bench.outcome import finish
from tests.bench.variants import Full


def cpu_seconds(kind: TopK, x: torch.Tensor, rounds: int) -> float:
    """The least of `rounds`."""
    sae = kind.started(initial(kind.config, torch.zeros(x.shape[1]), 0))
    none = torch.zeros(0, dtype=torch.int64)
    spans = []
    for _ in range(rounds):
        began = time.process_time()
        objective.losses(kind, sae, x, x, none, 1.0, Group())
        spans.append(time.process_time() - began)
    return min(spans)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rows", 512), ("d", 2560), ("d_sae", 8192), ("k", 128), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(asked.rows, asked.d, generator=torch.Generator().manual_seed(0))
    config = SAEConfig(d_sae=asked.d_sae, k=asked.k)
    bare = cpu_seconds(TopK(config), x, asked.rounds)
    kinds: dict[str, Hierarchical] = {}
    for nested in (2, 4, 6):
        kinds[f"{nested} values of k"] = Hierarchical(replace(config, nested=nested))
    kinds["every j"] = Full(config)
    over = {}
    for name, kind in kinds.items():
        seconds = cpu_seconds(kind, x, asked.rounds)
        largest = len(kind.budgets()) * x.numel() * 4 / 2**20
        over[name] = {"over_topk": seconds / bare, "MiB": largest}
    shape = {name: getattr(asked, name) for name in ("rows", "d", "d_sae", "k", "rounds")}
    finish(shape, {"topk_cpu_s": bare, "losses": over}, asked.out)


if __name__ == "__main__":
    main()
