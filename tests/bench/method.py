"""Our trainers and the peers' where neither was designed: what docs/method.md's table says.

    python -m tests.bench.real_rows --model smollm2 --text FILES... --rows 300000 --out smollm2
    python -m tests.bench.method --activations smollm2 --peers-python peers/bin/python \\
        --runs runs.jsonl --out method.json

The rows lie in three parts that share no document. Each trainer is trained on train.npy.

- The rate is chosen on choice.npy, with seed 0: 4e-3, 8e-3 and 1.6e-2, then on by factors of 2
  until the best one has a worse rate on either side.
- The figures are of heldout.npy, at that rate, with three other seeds: mean, least and most.

`ours-auto` chooses nothing: its rate is optim.lr=auto's. Runs are kept in --runs one by one, and
those that are there are not made again. The peers' environment and their settings are those of
tests.bench.peers and tests.bench.peer_trainers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.outcome import finish
from tests.bench.peer_trainers import TRAINERS, Task
from tests.bench.peers import Figures, ask

AUTO = "ours-auto"
NAMES = ("ours", AUTO, "reference", "sparsify-adam", "dictionary_learning", "saelens")
SEEDS = (1, 2, 3)  # of the figures; rates are chosen with seed 0
_MOST_RUNS = 16  # of one choice
# What a run says of its speed, which is not this table's subject.
_OF_SPEED = {
    "tokens_per_cpu_s",
    "tokens_per_wall_s",
    "encoder_tokens_per_cpu_s",
    "share_of_encoder_limit",
    "peak_growth_MiB",
}


def rate(step: int) -> float:
    """The grid: 1e-3 at step 0, and twice as much at each step after it."""
    return float(f"{1e-3 * 2**step:.2g}")


@dataclass(frozen=True)
class Runs:
    """Finished runs, kept as lines of a file."""

    file: Path
    make: Callable[[Task], Figures]

    def measured(self, task: Task) -> Figures:
        """A run's figures; it is made unless the file has it."""
        key = {name: value for name, value in asdict(task).items() if name != "activations"}
        key["ours"] = list(task.ours)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        for line in lines:
            run = json.loads(line)
            if run["task"] == key:
                known: Figures = run["figures"]
                return known
        figures = self.make(task)
        with self.file.open("a") as file:
            file.write(json.dumps({"task": key, "figures": figures}) + "\n")
        return figures


def chosen(runs: Runs, task: Task, first: Sequence[int] = (2, 3, 4)) -> tuple[float, Figures]:
    """The rate that explains most of choice.npy, and what each rate tried explains of it.

    Args:
        first: steps of the grid to begin with; by default 4e-3, 8e-3, 1.6e-2.
    """
    tried: dict[int, float] = {}

    wanted = set(first)
    while len(tried) < _MOST_RUNS and not wanted <= tried.keys():
        for step in sorted(wanted - tried.keys()):
            answer = runs.measured(replace(task, lr=rate(step), judged="choice"))
            tried[step] = answer["variance_explained"]
        best = max(tried, key=lambda step: tried[step])
        wanted = {best - 1, best + 1}
    return rate(best), {f"{rate(step):g}": tried[step] for step in sorted(tried)}


def figures(runs: Runs, name: str, task: Task) -> Figures:
    """A trainer's row of the table."""
    if name == AUTO:
        task = replace(task, trainer="ours", lr=0.0, ours=("optim.lr=auto",))
        return {"lr": "auto", **judged(runs, task)}
    task = replace(task, trainer=name)
    lr, tried = chosen(runs, task)
    return {"lr": lr, "choice_by_rate": tried, **judged(runs, replace(task, lr=lr))}


def judged(runs: Runs, task: Task) -> Figures:
    """Means over the seeds of the held-out figures, and each seed's."""
    answers = [runs.measured(replace(task, seed=seed)) for seed in SEEDS]
    found: Figures = {}
    for key in answers[0]:
        if key not in _OF_SPEED:
            values = [answer[key] for answer in answers]
            found[key] = statistics.mean(values)
            found[f"{key}_by_seed"] = values
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activations", type=Path, required=True, help="folder of the three parts")
    for name, default in (("d_sae", 2048), ("k", 32), ("batch", 2048), ("tokens", 300_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--trainers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--runs", type=Path, required=True, help="finished runs, a line each")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    own = [name for name in TRAINERS if TRAINERS[name][0] == "residual_saes.train.trainer"]
    pythons = {name: sys.executable if name in own else asked.peers_python for name in TRAINERS}
    runs = Runs(asked.runs, lambda task: ask(pythons[task.trainer], task))
    task = Task(
        trainer="",
        d=np.load(asked.activations / "train.npy", mmap_mode="r").shape[1],
        d_sae=asked.d_sae,
        k=asked.k,
        batch=asked.batch,
        tokens=asked.tokens,
        lr=0.0,
        seed=0,
        activations=str(asked.activations.absolute()),
        quality=True,
    )
    table: dict[str, Any] = {}
    for name in asked.trainers:
        table[name] = figures(runs, name, task)
        print(name, table[name], flush=True)
    shape = {"activations": asked.activations.name}
    shape |= {name: getattr(asked, name) for name in ("d_sae", "k", "batch", "tokens")}
    finish(shape, {"quality": table}, asked.out)


if __name__ == "__main__":
    main()
