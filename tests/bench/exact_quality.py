"""What training makes of the exact way: `python -m tests.bench.exact_quality --activations minilm`.

The default recipe, trained on rows of tests.bench.real_rows with the float32 product (torch) and
with exact top k from a bf16 product, over the same seeds. Held-out variance explained should differ
by no more than seeds do. On a CPU without bf16 products they are emulated: ten times slower, with
the same rounding.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from unittest import mock

from residual_saes.train import product
from tests.bench.outcome import finish
from tests.bench.peer_trainers import Task, work
from tests.bench.peers import Figures

WAYS = ("torch", "bf16")


def trained(task: Task, way: str) -> Figures:
    """Figures of one run whose encoder product goes one way."""
    with mock.patch.object(product, "_multiplies_bf16", return_value=True):
        product.unpin()
        product.pin(task.d, task.d_sae, "cpu", way)
        figures = work(task)
    kept = ("variance_explained", "dead_share")
    return {name: figures[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--activations", required=True, help="folder of tests.bench.real_rows")
    parser.add_argument("--ours", nargs="*", default=["sae=rows_batchtopk_32k"])
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in (("d", 384), ("d_sae", 4096), ("k", 32), ("tokens", 307_200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    shape = {"ours": asked.ours, "lr": asked.lr, "tokens": asked.tokens}
    shape |= {name: getattr(asked, name) for name in ("d", "d_sae", "k")}
    figures: Figures = {way: [] for way in WAYS}
    for seed in asked.seeds:
        size = {name: getattr(asked, name) for name in ("d", "d_sae", "k", "tokens", "lr")}
        run = {"activations": asked.activations, "quality": True, "ours": tuple(asked.ours)}
        task = Task(trainer="ours", batch=2048, seed=seed, **size, **run)
        for way in WAYS:
            figures[way].append(trained(task, way))
            print(seed, way, figures[way][-1], flush=True)
    explained = {way: [run["variance_explained"] for run in figures[way]] for way in WAYS}
    pairs = zip(explained["bf16"], explained["torch"], strict=True)
    figures["gain_by_seed"] = [round(exact - plain, 5) for exact, plain in pairs]
    figures["spread_of_seeds"] = statistics.pstdev(explained["torch"])
    finish(shape, figures, asked.out)


if __name__ == "__main__":
    main()
