"""Features that imply others, planted: which dictionary finds both the general and the special.

    python -m tests.bench.planted_hierarchy --folder planted --out planted_hierarchy.json

20 parents fire independently, each on 15 % of the rows. Where a parent fires, one of its three
children fires on three quarters of the rows. A sparse dictionary gains by absorption: a latent of a
child that writes the parent's direction too saves the parent's latent. So a parent's latent is
silent where a child fires, and no latent is the parent any more. SynthSAEBench (arXiv 2602.14687)
plants such trees at a larger scale.

A feature's score is the F1 of the latent that tells best on which held-out rows it fires; that
latent is found on other rows, those on which the rate is chosen. Figures are means over the parents
and over the children, of three seeds.

Shapes: n rows, d 64, features P + 3 P.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from residual_saes.train.sae import SAE
from tests.bench.method import Runs, chosen, judged
from tests.bench.outcome import finish
from tests.bench.peer_trainers import Task, load
from tests.bench.peers import Figures
from tests.bench.variants import RECIPE, finished, judge

PARENTS, CHILDREN, D = 20, 3, 64
OFTEN = 0.15  # of the rows a parent fires on
WITH_CHILD = 0.75  # of those, a child fires too
_NOISE = 0.02  # of a row, per dimension
_SEED = 1_000_003  # none that an SAE has: equal seeds would draw equal directions
_PARTS = {"train": 200_000, "choice": 16_384, "heldout": 16_384}
# By name: what the variants change, and settings beside it. In so short a run AuxK of the scaled
# recipe would never act: its latents are dead after 10e6 tokens.
RECIPES: dict[str, tuple[Sequence[str], tuple[str, ...]]] = {
    "rows": (RECIPE, ()),
    "scaled": (["sae=scaled_32k", "optim=scaled"], ("sae.dead_after=null",)),
}
NAMES = ("topk", "batchtopk", "matryoshka")


class Planted(NamedTuple):
    """Rows and on which of them each feature fires."""

    rows: Tensor  # (n, d)
    fires: Tensor  # (n, features) bool, the parents first


def planted(count: int, draw: torch.Generator, directions: Tensor) -> Planted:
    """Rows of trees: an active feature adds its direction times 1 +- .2."""
    parents = torch.rand(count, PARENTS, generator=draw) < OFTEN
    child = torch.randint(CHILDREN, (count, PARENTS, 1), generator=draw)
    with_child = parents & (torch.rand(count, PARENTS, generator=draw) < WITH_CHILD)
    children = (torch.arange(CHILDREN) == child) & with_child.unsqueeze(2)
    fires = torch.cat([parents, children.view(count, -1)], 1)
    amounts = 1 + 0.2 * torch.randn(fires.shape, generator=draw)
    noise = _NOISE * torch.randn(count, D, generator=draw)
    return Planted((fires * amounts) @ directions + noise, fires)


def write(folder: Path) -> None:
    """The three parts, each with what fires."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(_SEED)
    features = PARENTS * (1 + CHILDREN)
    directions = torch.nn.functional.normalize(torch.randn(features, D, generator=draw), dim=1)
    for name, count in _PARTS.items():
        part = planted(count, draw, directions)
        np.save(folder / f"{name}.npy", part.rows.numpy())
        np.save(folder / f"{name}_fires.npy", part.fires.numpy())


@torch.no_grad()
def scores(sae: SAE, x: Tensor, fires: Tensor) -> Tensor:
    """(features, F) F1 of each latent as a sign of each feature."""
    kept = sae.encode(x)
    active = torch.zeros(len(x), sae.d_sae)
    active[kept.rows, kept.indices] = (kept.values > 0).float()
    truth = fires.float()
    both = truth.T @ active
    return 2 * both / (truth.sum(0)[:, None] + active.sum(0)).clamp_min(1)


def recovered(sae: SAE, folder: Path) -> Figures:
    """Mean F1 of parents and of children."""
    parts = []
    for name in ("choice", "heldout"):
        rows = torch.from_numpy(np.load(folder / f"{name}.npy"))
        parts.append(scores(sae, rows, torch.from_numpy(np.load(folder / f"{name}_fires.npy"))))
    best = parts[0].argmax(1, keepdim=True)
    found = parts[1].gather(1, best).view(-1)
    return {
        "f1_parents": float(found[:PARENTS].mean()),
        "f1_children": float(found[PARENTS:].mean()),
    }


def make(recipe: Sequence[str], task: Task) -> Figures:
    """One run's figures."""
    rows = load(task)
    sae = finished(task, rows, recipe)
    assert task.activations is not None
    figures = {**judge(sae, rows), **recovered(sae, Path(task.activations))}
    print(task.trainer, f"lr {task.lr:g} seed {task.seed}", figures, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the rows and the runs")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--recipe", choices=RECIPES, default="rows")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    if not (asked.folder / "heldout.npy").exists():
        write(asked.folder)
    recipe, settings = RECIPES[asked.recipe]
    runs = Runs(asked.folder / "runs.jsonl", partial(make, recipe))
    folder = str(asked.folder.absolute())
    task = Task("", D, 128, asked.k, 512, 200_000, 0.0, 0, folder, True, settings)
    found: Figures = {}
    for name in NAMES:
        lr, tried = chosen(runs, replace(task, trainer=name))
        found[name] = {"lr": lr, "choice_by_rate": tried}
        found[name] |= judged(runs, replace(task, trainer=name, lr=lr))
    finish(
        {"recipe": asked.recipe, "k": asked.k, "d_sae": 128, "tokens": 200_000}, found, asked.out
    )


if __name__ == "__main__":
    main()
