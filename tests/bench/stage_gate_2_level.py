"""False positives and power of stage gate 2's verdict, on simulated tables of arms.

    python -m tests.bench.stage_gate_2_level [--sets N] [--out FILE]

Tables are those of tests/analyze/test_stage_gate_2_verdict.py: R0 to R3, both levels, two rates.
Null tables have no arm that is better, with seeds that move accuracy by nothing up to 6 points and
arms that suit other questions. In power tables R1 is better at every rate and level.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tests.analyze.test_stage_gate_2_verdict import World, cells, outcomes, r1, rates
from tests.bench.outcome import finish

EFFECTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # log odds


def null_rates(sets: int) -> list[dict[str, float]]:
    """Of each world: differences and passes that are false."""
    found = []
    for seeds in (3, 5):
        for by_seed in (0.0, 0.1, 0.3):
            for by_arm in (0.0, 0.3):
                world = World(seeds=seeds, by_seed=by_seed, by_arm=by_arm)
                differ, passed = rates(world, 0.0, sets)
                found.append({**world._asdict(), **spread(world), "differ": differ, "pass": passed})
    return found


def powers(sets: int) -> list[dict[str, float]]:
    """Of each effect, number of seeds and of questions: passes that are right."""
    found = []
    for seeds, questions in ((3, 200), (3, 600), (5, 200), (5, 600)):
        for effect in EFFECTS:
            world = World(seeds=seeds, questions=questions)
            _, passed = rates(world, effect, sets)
            found.append({**world._asdict(), "gain": gain(world, effect), "pass": passed})
    return found


def spread(world: World) -> dict[str, float]:
    """Standard deviation of a training's accuracy by its seed, and disagreement of two seeds."""
    large = world._replace(seeds=200, questions=2000)
    own = outcomes(np.random.default_rng(0), large, cells((3e-6,)))[r1()]
    apart = float(np.mean(own[::2] != own[1::2]))
    return {"seed_sd": float(own.mean(1).std()), "disagreement": apart}


def gain(world: World, effect: float) -> float:
    """Share of the answers that an effect gains."""
    large = world._replace(seeds=20, questions=20_000, by_seed=0.0, by_arm=0.0)
    arms = outcomes(np.random.default_rng(0), large, {r1(): effect, r1(1e-6): 0.0})
    return float(arms[r1()].mean() - arms[r1(1e-6)].mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=400)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    shape = {"sets": asked.sets, "sets of power": asked.sets // 2}
    figures = {"null": null_rates(asked.sets), "power": powers(asked.sets // 2)}
    finish(shape, figures, asked.out)


if __name__ == "__main__":
    main()
