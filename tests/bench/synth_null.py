"""study=synth where there is nothing to find: how often equal arms are told apart.

    python -m tests.bench.synth_null --kept sets.jsonl --out synth_null.json

Every null data set has its own worlds and, on each, arms of one objective that differ in their
start alone. So an arm that "finds more" than another, or a disagreement, is false. The worlds are
small, so that hundreds of data sets take minutes. `redrawn` are data sets of three worlds drawn
from all of them, with the arms of each world in an order of its own. `unequal` draws normal tables
in which arms have equal means and those of each k the spread that they have in a run (--of).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.studies.synth import scores, training
from residual_saes.analyze.studies.synth.baselines import of_sae
from residual_saes.analyze.studies.synth.planted import CHOICE, HELD_OUT
from residual_saes.analyze.studies.synth.study import Options
from residual_saes.analyze.studies.synth.training import Dictionary
from residual_saes.analyze.studies.synth.verdict import (
    differences,
    disagreements,
    half_width,
    log_explained,
)
from residual_saes.train import sae_file
from residual_saes.train.arm import Arm
from tests.bench.outcome import finish

WORLDS = 3
ARMS = 4
KEYS = ("variance_explained", "f1")
OPTIONS = Options(
    n_features=32, d_model=14, d_sae=32, k=3, l1=1.0, active=2.5, tokens=10_240, rows=2_048
)
Floats = NDArray[np.float64]


def null_set(number: int, objective: str) -> Floats:
    """(figures, arms, worlds) of one null data set."""
    table = np.zeros((len(KEYS), ARMS, WORLDS))
    for place in range(WORLDS):
        seed = 1_000 + number * WORLDS + place
        world = OPTIONS.world(seed)
        stream = training.stream_of(world, OPTIONS.tokens)
        choice = world.draw(CHOICE, 0, OPTIONS.rows)
        held_out = world.draw(HELD_OUT, 0, OPTIONS.rows)
        config = OPTIONS.config(Dictionary(objective, 3), seed)
        with tempfile.TemporaryDirectory() as folder:
            arms = []
            for arm in range(ARMS):
                # Random directions: a start from rows is the same for all arms of a world.
                own = replace(config.sae, init="random")
                started = replace(config, sae=own, seed=seed * ARMS + arm)
                arms.append(Arm(started, stream, Path(folder) / str(arm)))
            if failed := training.train_all(arms):
                raise failed
            for arm, made in enumerate(arms):
                encode = of_sae(sae_file.load(made.folder / sae_file.FILE))
                found = scores.scores(world, choice, held_out, encode(choice.x), encode(held_out.x))
                table[:, arm, place] = [found[key] for key in KEYS]
    table[0] = log_explained(table[0])
    return table


def judged(tables: list[Floats]) -> dict[str, float]:
    """Share of the data sets with any pair told apart, by each figure, and with a disagreement."""
    told = {key: 0 for key in KEYS}
    disagree = 0
    for table in tables:
        for key, values in zip(KEYS, table, strict=True):
            told[key] += bool(np.abs(differences(values)).max() > half_width(values))
        disagree += bool(disagreements(*table))
    shares = {f"told_apart_by_{key}": count / len(tables) for key, count in told.items()}
    return {**shares, "disagree": disagree / len(tables)}


def redrawn(tables: list[Floats], sets: int) -> list[Floats]:
    """Data sets of three worlds of all that there are, the arms of each in an order of its own."""
    worlds = np.concatenate(tables, axis=2)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(sets):
        columns = []
        for world in rng.choice(worlds.shape[2], WORLDS, replace=False):
            columns.append(worlds[:, rng.permutation(ARMS), world])
        drawn.append(np.stack(columns, 2))
    return drawn


def unequal(path: Path, sets: int) -> dict[str, float]:
    """Normal tables with the spreads that the arms of each k have in a run, and no difference."""
    figures = json.loads(path.read_text())["figures"]
    k_of = np.array([name.rpartition(" ")[2] for name in figures["compared"]])
    rng = np.random.default_rng(0)
    spreads = []
    for key in KEYS:
        values = np.array([figures["arms"][name][key]["by_seed"] for name in figures["compared"]])
        values = log_explained(values) if key == KEYS[0] else values
        squares = np.square(values - values.mean(1, keepdims=True) - values.mean(0) + values.mean())
        spread = np.ones(len(values))
        for k in set(k_of):
            spread[k_of == k] = np.sqrt(squares[k_of == k].mean())
        spreads.append(spread[:, None])
    tables = []
    for _ in range(sets):
        tables.append(
            np.stack([spread * rng.normal(size=(len(k_of), WORLDS)) for spread in spreads])
        )
    found = judged(tables)
    for key, spread in zip(KEYS, spreads, strict=True):
        found[f"largest_spread_over_least_{key}"] = float(spread.max() / spread.min())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--objective", default="topk")
    parser.add_argument("--kept", type=Path, required=True, help="file of finished data sets")
    parser.add_argument("--of", type=Path, help="synth.json of a run")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    lines = asked.kept.read_text().splitlines() if asked.kept.exists() else []
    tables = [np.array(json.loads(line)) for line in lines[: asked.sets]]
    for number in range(len(tables), asked.sets):
        tables.append(null_set(number, asked.objective))
        with asked.kept.open("a") as file:
            file.write(json.dumps(tables[-1].tolist()) + "\n")
    found = {"null": judged(tables), "redrawn": judged(redrawn(tables, 2_000))}
    if asked.of:
        found["unequal"] = unequal(asked.of, 5_000)
    shape = {"sets": len(tables), "worlds": WORLDS, "arms": ARMS, "objective": asked.objective}
    finish(shape, found, asked.out)


if __name__ == "__main__":
    main()
