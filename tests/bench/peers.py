"""Our TopK trainer against SAELens', sparsify's and dictionary_learning's, on one CPU core.

    # real activations, d 384; then quality and speed, about an hour; then speed at width 2560
    python -m tests.bench.real_rows --text FILES... --rows 1300000 --out minilm
    python -m tests.bench.peers --activations minilm --out peers.json
    python -m tests.bench.peers --speed-only --d 2560 --d_sae 8192 --k 64 --speed-steps 24 \\
        --out peers_wide.json

The peers, from PyPI, go together in one environment (Python 3.11):

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 sae-lens==6.54.12
        eai-sparsify==1.3.3 \\ dictionary-learning==0.1.0
    python -m tests.bench.peers --peers-python peers/bin/python ...

With a CPU build of torch, `pip uninstall torchvision` afterwards: what nnsight pulls in is built
for CUDA, and transformers cannot be imported beside it ("operator torchvision::nms does not
exist"). A peer that an interpreter lacks is skipped, and said so. `--saelens-python`,
`--sparsify-python`, `--dictionary-learning-python` name one for each.

Every run is a process of its own with one thread and glibc's allocator told to keep what it has:
untuned, SAELens and sparsify lose a third of their speed, dictionary_learning a fifth. Three parts,
on tests.bench.peer_trainers:

- search: each trainer at each learning rate of one grid, on few tokens. The two best by held-out
  variance explained go on, since the best on few tokens may not be the best on all.
- quality: each trainer at those rates, on all tokens; the better counts. Held-out variance
  explained, centred per dimension; share of latents that fire on none of the last 100,000 training
  tokens; peak memory beyond the rows and the imported modules.
- speed: rounds of short runs, in which the order of the trainers rotates. Tokens per CPU second of
  training steps, after warm-up. The machine is shared, so the bare encoder product is timed in
  turns in the same process, and what counts is the share of it; a ratio is of the medians over the
  rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.bench.outcome import finish
from tests.bench.peer_trainers import TRAINERS, Task, work

KEEP = str(4 << 30)  # bytes: glibc maps nothing anew, and gives nothing back
ENVIRONMENT = {
    **{name: KEEP for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")},
    "MALLOC_TOP_PAD_": str(64 << 20),
    **{name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
    "CUDA_VISIBLE_DEVICES": "",
    "SPARSIFY_DISABLE_TRITON": "1",  # it has no CPU kernels
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
}
Figures = dict[str, Any]


def ask(python: str, task: Task) -> Figures:
    """What one run in a process of its own measured.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [python, "-m", "tests.bench.peers", "--worker", json.dumps(asdict(task))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT}
    )
    if done.returncode:
        said = [
            line[:300] for line in done.stderr.splitlines() if "registered at" not in line
        ]  # torch lists backends
        raise RuntimeError(f"{task.trainer} failed:\n" + "\n".join(said[-30:]))
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    shown = "  ".join(f"{name} {value:,.4g}" for name, value in answer.items())
    print(
        f"{task.trainer} lr {task.lr:g} seed {task.seed} {task.tokens:,} tokens:  {shown}",
        file=sys.stderr,
        flush=True,
    )
    return answer


def missing(python: str, trainer: str) -> str | None:
    """Why this interpreter cannot run a trainer, in one line, or None; and never a download."""
    command = [python, "-c", f"import {TRAINERS[trainer][0]}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT}
        )
    except OSError as error:
        return str(error)
    return (
        (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None
    )


def search(pythons: dict[str, str], task: Task, rates: list[float]) -> Figures:
    """Held-out variance explained at each learning rate, by trainer."""
    found: Figures = {name: {} for name in pythons}
    for rate in rates:
        for name, python in pythons.items():
            found[name][f"{rate:g}"] = ask(python, replace(task, trainer=name, lr=rate))
    return found


def best_rates(found: Figures, count: int) -> dict[str, list[float]]:
    """The learning rates with the highest variance explained, best first, by trainer."""
    return {
        name: [
            float(rate)
            for rate in sorted(by_rate, key=lambda rate: -by_rate[rate]["variance_explained"])[
                :count
            ]
        ]
        for name, by_rate in found.items()
    }


def qualities(
    pythons: dict[str, str], task: Task, rates: dict[str, list[float]], seeds: list[int]
) -> Figures:
    """Each trainer at the best of its rates: means over the seeds, and the variance explained of
    each seed and rate.
    """
    figures: Figures = {}
    for name, python in pythons.items():
        tried = {}
        for rate in rates[name]:
            answers = [
                ask(python, replace(task, trainer=name, lr=rate, seed=seed)) for seed in seeds
            ]
            tried[rate] = {key: [one[key] for one in answers] for key in answers[0]}
        best = max(tried, key=lambda rate: statistics.mean(tried[rate]["variance_explained"]))
        by_rate = {f"{rate:g}": columns["variance_explained"] for rate, columns in tried.items()}
        means = {key: statistics.mean(column) for key, column in tried[best].items()}
        figures[name] = {"lr": best, **means, "variance_explained_by_rate": by_rate}
    return figures


def speeds(pythons: dict[str, str], task: Task, rates: dict[str, float], rounds: int) -> Figures:
    """Medians over rounds of short runs, and ours over each peer."""
    names, answers = list(pythons), []
    for number in range(rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        answers.append(
            {
                name: ask(pythons[name], replace(task, trainer=name, lr=rates[name]))
                for name in order
            }
        )
    figures: Figures = {
        name: {
            key: statistics.median(one[name][key] for one in answers) for key in answers[0][name]
        }
        for name in names
    }
    peers = [name for name in names if name != "ours"]
    if "ours" not in names or not peers:
        return figures
    for key in ("tokens_per_cpu_s", "share_of_encoder_limit"):
        best = max(peers, key=lambda name: figures[name][key])
        per_round = [one["ours"][key] / one[best][key] for one in answers]
        figures[f"ours_over_best_peer_{key}"] = {
            "peer": best,
            "ratio": figures["ours"][key] / figures[best][key],
            "lowest": min(per_round),
            "highest": max(per_round),
        }
    return figures


def available(asked: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each trainer that can run; the others are named."""
    pythons = {"dictionary_learning": asked.dictionary_learning_python}
    pythons |= dict.fromkeys(("ours", "reference"), sys.executable)
    for name in TRAINERS:
        if name.startswith(("saelens", "sparsify")):
            pythons[name] = getattr(asked, f"{name.split('-')[0]}_python")
    chosen = {}
    for name in asked.trainers:
        python = pythons[name] or asked.peers_python
        if reason := missing(python, name):
            print(
                f"skipped: {python} cannot run {name} ({reason}); "
                "see --help for another interpreter"
            )
        else:
            chosen[name] = python
    return chosen


def measure(asked: argparse.Namespace) -> Figures:
    """All that was asked for."""
    pythons = available(asked)
    if not pythons:
        return {"skipped": "no trainer can run"}
    task = Task(
        trainer="",
        d=asked.d,
        d_sae=asked.d_sae,
        k=asked.k,
        batch=asked.batch,
        tokens=asked.search_tokens,
        lr=asked.speed_lr,
        seed=asked.seeds[0],
        activations=str(asked.activations) if asked.activations else None,
        quality=True,
        ours=tuple(asked.ours),
    )
    figures: Figures = {}
    rates = dict.fromkeys(pythons, asked.speed_lr)
    if not asked.speed_only:
        figures["search"] = search(pythons, task, asked.lrs)
        finalists = best_rates(figures["search"], asked.finalists)
        figures["quality"] = qualities(
            pythons, replace(task, tokens=asked.tokens), finalists, asked.seeds
        )
        rates = {name: found["lr"] for name, found in figures["quality"].items()}
    short = replace(task, tokens=asked.speed_steps * task.batch, quality=False)
    return {**figures, "speed": speeds(pythons, short, rates, asked.rounds) if asked.rounds else {}}


def show(figures: Figures) -> None:
    """A line of each trainer in each part; the JSON has all."""
    for part in ("search", "quality", "speed"):
        for name, values in figures.get(part, {}).items():
            if part == "search":
                values = {rate: found["variance_explained"] for rate, found in values.items()}
            line = "  ".join(
                f"{key} {value:,.4g}" for key, value in values.items() if isinstance(value, float)
            )
            print(f"{part:>8}  {name:>19}  {line}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers")
    for name, default in (("d", 384), ("d_sae", 4096), ("k", 32), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--activations", type=Path, help="folder with train.npy and heldout.npy; else planted rows"
    )
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 6e-3, 1e-2])
    parser.add_argument(
        "--finalists", type=int, default=2, help="learning rates that go on to all tokens"
    )
    parser.add_argument("--search-tokens", type=int, default=300_000)
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=3, help="of the speed measurement; 0: none")
    parser.add_argument("--speed-steps", type=int, default=64)
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--speed-lr", type=float, default=3e-3, help="where no search says better")
    parser.add_argument(
        "--ours", nargs="*", default=[], help="settings of ours, as optim.lr_floor=1e-4"
    )
    parser.add_argument(
        "--peers-python", default=sys.executable, help="an interpreter that has all the peers"
    )
    for name in ("saelens", "sparsify", "dictionary-learning"):
        parser.add_argument(f"--{name}-python", help=f"an interpreter that has {name}")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    asked = arguments().parse_args()
    if asked.worker:
        print(json.dumps(work(Task(**json.loads(asked.worker)))))
        return
    if asked.activations:
        asked.activations = asked.activations.absolute()
    figures = measure(asked)
    hidden = ("out", "worker", "activations", "peers_python")
    shape = {name: value for name, value in vars(asked).items() if name not in hidden}
    activations = asked.activations.name if asked.activations else None
    finish({**shape, "activations": activations}, figures, asked.out)
    show(figures)


if __name__ == "__main__":
    main()
