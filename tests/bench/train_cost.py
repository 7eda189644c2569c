"""What a step costs against d_sae and k, beside the dense way: `python -m tests.bench.train_cost
[--picture F.svg]`.

ms per step and memory, beside a dense TopK step by autograd: x @ W_enc, topk, scatter, dense @
W_dec, backward, torch's fused Adam, unit norm every tenth step, no counters. Both alternate in one
process. Memory is each one's peak beyond its rows in a process of its own, on a GPU its tensors',
after 20 and after 200 steps: what it gains between is growth with tokens. state_MB is
train.sweep.arm_bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from residual_saes.train.arm import Arm
from residual_saes.train.stream import Stream
from residual_saes.train.sweep import arm_bytes
from tests.bench.dense import dense_loss, dense_weights
from tests.bench.outcome import finish
from tests.bench.precision import as_in_training
from tests.bench.sweep_speed import memory
from tests.bench.train_phases import BLOCK, Shape, arguments, asked_shape, medians
from tests.bench.train_speed import InMemory, seconds


def dense(shape: Shape) -> Callable[[Tensor], object]:
    """A step of it; like ours it waits for its loss."""
    weights = dense_weights(shape)
    adam, taken = torch.optim.Adam(weights.values(), lr=1e-3, fused=True), count(1)

    def step(batch: Tensor) -> None:
        as_in_training(False)
        with torch.enable_grad():
            loss = dense_loss(weights, batch.to(shape.device).float(), shape.k)
            loss.backward()  # type: ignore[no-untyped-call]
        loss.item()
        adam.step()
        adam.zero_grad()
        if next(taken) % BLOCK == 0:
            weights["W_dec"].div_(torch.linalg.vector_norm(weights["W_dec"], dim=1, keepdim=True))
        as_in_training(True)

    return step


SIDES = {"ours": lambda shape: shape.trainer(InMemory(shape.d, shape.batch)).step_, "dense": dense}


@torch.no_grad()
def peaks(side: str, shape: Shape, after: list[int]) -> dict[str, float]:
    """Peak MB of this fresh process after so many steps, beyond what it had before the first."""
    torch.set_num_threads(shape.threads)
    rows, cuda, found = (
        InMemory(shape.d, shape.batch).batches(0),
        shape.device == "cuda",
        dict[str, float](),
    )
    SIDES[side](replace(shape, d=8, d_sae=64, k=2))(
        next(InMemory(8, 16).batches(0))
    )  # imports what torch imports late
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    peak = torch.cuda.max_memory_allocated if cuda else partial(memory, "VmHWM")
    base, step = (0 if cuda else memory("VmRSS")), SIDES[side](shape)
    for number in range(1, max(after) + 1):
        step(next(rows))
        if number in after:
            found[f"{side}_peak_MB_{number}"] = (peak() - base) / 1e6
    return found


@torch.no_grad()
def speeds(shape: Shape, blocks: int) -> dict[str, float]:
    """ms per step of both, in turns; of the ratio dense / ours the range too."""
    torch.set_num_threads(shape.threads)
    rows, steps = (
        InMemory(shape.d, shape.batch).batches(0),
        {name: make(shape) for name, make in SIDES.items()},
    )
    took = []
    for _ in range(blocks + 1):
        ms = {
            f"{name}_ms": seconds(lambda step=step: step(next(rows)), BLOCK) * 1e3
            for name, step in steps.items()
        }  # type: ignore[misc]
        took.append({**ms, "ratio": ms["dense_ms"] / ms["ours_ms"]})
    ratios = [one["ratio"] for one in took[1:]]  # the first warmed caches and the allocator
    return {**medians(took[1:]), "ratio_lowest": min(ratios), "ratio_highest": max(ratios)}


def grid(shape: Shape, sizes: list[Shape], after: list[int], blocks: int) -> list[dict[str, float]]:
    """A row for each size; every measurement in a process of its own."""
    rows, stream = [], Stream("", InMemory(shape.d, 1), lambda: iter(()))
    for one in dict.fromkeys(sizes):
        row = {
            "d_sae": one.d_sae,
            "k": one.k,
            "state_MB": arm_bytes(Arm(one.config(), stream, Path())) / 1e6,
        }
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            for task in (
                partial(speeds, one, blocks),
                *(partial(peaks, side, one, after) for side in SIDES),
            ):
                row |= pool.submit(task).result()
        rows.append(row)
        print("  ".join(f"{name} {value:,.4g}" for name, value in row.items()), flush=True)
    return rows


def picture(rows: list[dict[str, float]], shape: Shape, path: Path) -> None:
    """ms per step against d_sae and against k, and memory against d_sae, as SVG."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "grid",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    peak = next(
        name.removeprefix("ours_") for name in reversed(rows[0]) if name.startswith("ours_peak")
    )
    with mpl.rc_context({**style, "font.size": 10, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        for axes, (x, y) in zip(
            figure.subplots(1, 3), (("d_sae", "ms"), ("k", "ms"), ("d_sae", peak)), strict=True
        ):
            fixed = "k" if x == "d_sae" else "d_sae"
            points = sorted(
                (row for row in rows if row[fixed] == getattr(shape, fixed)), key=lambda row: row[x]
            )
            lines = {
                "ours": f"ours_{y}",
                "dense": f"dense_{y}",
                **({"state": "state_MB"} if y == peak else {}),
            }
            for (name, key), colour in zip(
                lines.items(), ("#2563eb", "#d97706", "#059669"), strict=False
            ):
                axes.plot(
                    [p[x] for p in points],
                    [p[key] for p in points],
                    "o-",
                    label=name,
                    color=colour,
                    lw=1.5,
                )
            axes.set(
                xlabel=f"{x} ({fixed} {getattr(shape, fixed):,})",
                ylabel="MB" if y == peak else "ms per step",
            )
            axes.set(ylim=(0, None), xticks=[p[x] for p in points])
            axes.legend(frameon=False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def main() -> None:
    parser = arguments("train_cost")
    for name, sizes in (
        ("grid_d_sae", [2048, 4096, 8192]),
        ("grid_k", [16, 32, 64]),
        ("memory_steps", [20, 200]),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=sizes)
    parser.add_argument("--picture", type=Path, help="draw it there")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shape = asked_shape(asked)
    wanted = [
        *(replace(shape, d_sae=n) for n in asked.grid_d_sae),
        *(replace(shape, k=n) for n in asked.grid_k),
    ]
    rows = grid(shape, wanted, asked.memory_steps, asked.blocks)
    if asked.picture:
        picture(rows, shape, asked.picture)
    with redirect_stdout(None):  # the lines have it
        finish({**asdict(shape), "blocks": asked.blocks}, {"grid": rows}, asked.out)


if __name__ == "__main__":
    main()
