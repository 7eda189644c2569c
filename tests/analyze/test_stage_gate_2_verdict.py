"""Stage gate 2 passes what is planted and nothing that is worthless, at the level that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from residual_saes.analyze.studies.stage_gate_2.verdict import (
    ACCURACY,
    LENIENT,
    Cell,
    Harm,
    detectable,
    difference,
    judge,
    planned,
)

REWARD = "reward of R1"
LENGTH = Harm("length", 1, ".1f")
Outcomes = NDArray[np.float64]
LOW, HIGH = 1e-6, 3e-6


class World(NamedTuple):
    """How right answers come about, in log odds; of size like the embedded model's arms."""

    seeds: int = 3
    questions: int = 200
    ease: float = 1.5  # spread of the questions
    own: float = 0.7  # spread of one training's answer to one question
    by_seed: float = 0.1  # spread of a training's accuracy
    by_arm: float = 0.3  # spread of what an arm makes of a question, whatever the seed


def outcomes(
    rng: np.random.Generator, world: World, effects: Mapping[Cell, float]
) -> dict[Cell, Outcomes]:
    """(S, Q) of each arm, whose accuracy moves by `effects`."""
    ease = rng.normal(0.5, world.ease, world.questions)
    found = {}
    for cell, effect in effects.items():
        by_arm = rng.normal(0, world.by_arm, world.questions)
        by_seed = rng.normal(0, world.by_seed, (world.seeds, 1))
        own = rng.normal(0, world.own, (world.seeds, world.questions))
        found[cell] = (ease + by_arm + by_seed + own + effect > 0).astype(np.float64)
    return found


def cells(rates: tuple[float, ...] = (LOW, HIGH), levels: tuple[str, ...] = ("trajectory",)):
    """The arms of a table, without effects."""
    made = {}
    for rate in rates:
        made[Cell("R0", "trajectory", rate)] = 0.0
        for level in levels:
            for reward in ("R1", "R2", "R3"):
                made[Cell(reward, level, rate)] = 0.0
    return made


def judged(arms: Mapping[Cell, Outcomes], lenient: Mapping[Cell, Outcomes] | None = None):
    """The verdict on right answers, with everything else the same in all policies."""
    shape = next(iter(arms.values())).shape
    table = {ACCURACY: arms, LENIENT: lenient or arms}
    for name in (REWARD, LENGTH.name):
        table[name] = dict.fromkeys(arms, np.zeros(shape))
    untrained = dict.fromkeys(table, np.zeros((1, shape[1])))
    return judge(table, untrained, [LENGTH], REWARD)


def r1(rate: float = HIGH, level: str = "trajectory") -> Cell:
    return Cell("R1", level, rate)


# -- what is planted -------------------------------------------------------------------------------


def test_a_planted_gain_passes_and_r2_is_named() -> None:
    arms = outcomes(np.random.default_rng(0), World(seeds=4), cells() | {r1(): 1.5})
    found = judged(arms)
    assert found["verdict"] == "pass"
    own = found["levels"]["trajectory"]
    assert own["lr"] == HIGH and own["missing"] == [] and own["p_holm"] < 0.05
    assert all(own["beside"][reward][ACCURACY]["interval"][0] > 0 for reward in ("R0", "R2", "R3"))
    other = Cell("R2", "trajectory", HIGH)
    as_good = judged(
        outcomes(np.random.default_rng(0), World(seeds=4), cells() | {r1(): 1.5, other: 1.5})
    )
    assert as_good["verdict"] == "pass"  # what R2 has is said, and decides nothing
    assert as_good["levels"]["trajectory"]["beside"]["R2"][ACCURACY]["interval"][0] <= 0


# -- what is worthless -----------------------------------------------------------------------------


def test_one_lucky_seed_does_not_pass() -> None:
    arms = outcomes(np.random.default_rng(1), World(by_seed=0, by_arm=0, own=0.3), cells((HIGH,)))
    arms[r1()][0] = 1.0
    found = judged(arms)["levels"]["trajectory"]
    gap = found["beside"]["R0"][ACCURACY]
    assert gap["value"] > 0.08 and found["verdict"] == "fail"
    assert gap["interval"][0] < 0 < gap["interval"][1]
    # Questions alone would have called it certain.
    assert (
        stats.ttest_rel(arms[r1()].mean(0), arms[Cell("R0", "trajectory", HIGH)].mean(0)).pvalue
        < 1e-4
    )


def test_a_higher_learning_rate_alone_does_not_pass() -> None:
    effects = cells()
    for cell in effects:
        effects[cell] = 1.5 * (cell.lr == HIGH)
    found = judged(outcomes(np.random.default_rng(2), World(), effects))
    low, high = (found["candidates"][index] for index in (0, 1))
    assert high["accuracy"] > low["accuracy"] + 0.15 and found["verdict"] == "fail"
    # Nor a rate at which R0 breaks down, where R0 at the other rate is as good.
    effects = cells() | {Cell("R0", "trajectory", HIGH): -1.5, Cell("R3", "trajectory", HIGH): -1.5}
    effects[Cell("R0", "trajectory", LOW)] = 0.3
    (own,) = [
        entry
        for entry in judged(outcomes(np.random.default_rng(2), World(), effects))["candidates"]
        if entry["lr"] == HIGH
    ]
    assert own["verdict"] == "fail" and own["better_r0"] == [LOW]
    assert own["beside"]["R0"][ACCURACY]["interval"][0] > 0


def test_random_latents_that_do_as_well_fail_it() -> None:
    effects = cells() | {r1(): 1.5, Cell("R3", "trajectory", HIGH): 1.5}
    found = judged(outcomes(np.random.default_rng(3), World(), effects))
    own = next(entry for entry in found["candidates"] if entry["lr"] == HIGH)
    assert own["verdict"] == "fail" and own["missing"] == ["more right answers than R3"]


def test_form_alone_fails_it() -> None:
    rng = np.random.default_rng(4)
    lenient = outcomes(rng, World(), cells((HIGH,)))
    parsed = {cell: rng.random(values.shape) < 0.7 for cell, values in lenient.items()}
    arms = {cell: values * parsed[cell] for cell, values in lenient.items()}
    arms[r1()] = lenient[r1()]
    found = judged(arms, lenient)["levels"]["trajectory"]
    assert found["verdict"] == "fail" and found["beside"]["R0"][ACCURACY]["interval"][0] > 0.1
    assert [name for name in found["missing"] if "form" in name]


@pytest.mark.parametrize("effect", [0.0, -1.5])
def test_a_reward_that_rises_while_accuracy_does_not_is_named(effect: float) -> None:
    rng = np.random.default_rng(5)
    arms = outcomes(rng, World(), cells((HIGH,)) | {r1(): effect})
    risen = {
        cell: rng.normal(3.0 * (cell == r1()), 1, values.shape) for cell, values in arms.items()
    }
    longer = {
        cell: rng.normal(20 + 5 * (cell == r1()), 3, values.shape) for cell, values in arms.items()
    }
    untrained = {
        ACCURACY: arms[Cell("R0", "trajectory", HIGH)][:1],
        REWARD: rng.normal(0, 1, (1, 200)),
        LENGTH.name: rng.normal(20, 3, (1, 200)),
    }
    table = {ACCURACY: arms, LENIENT: arms, REWARD: risen, LENGTH.name: longer}
    found = judge(table, untrained, [LENGTH], REWARD)["levels"]["trajectory"]
    assert found["verdict"] == "fail"
    named = [(alarm["what"], alarm["than"]) for alarm in found["alarms"]]
    word = "falls" if effect else "does not rise"
    assert (f"its own reward rises while accuracy {word}", "the untrained model") in named
    assert (LENGTH.name, "R0") in named and (LENGTH.name, "the untrained model") in named


def test_too_few_seeds_and_missing_arms_decide_nothing() -> None:
    arms = outcomes(np.random.default_rng(6), World(seeds=2), cells((HIGH,)) | {r1(): 9.0})
    assert judged(arms)["verdict"] == "undecided"
    arms = outcomes(np.random.default_rng(6), World(), cells((HIGH,)) | {r1(): 9.0})
    del arms[Cell("R3", "trajectory", HIGH)]
    assert judged(arms)["verdict"] == "undecided"
    arms = outcomes(np.random.default_rng(6), World(seeds=1), cells((HIGH,)))
    gap = judged(arms)["levels"]["trajectory"]["beside"]["R0"][ACCURACY]
    assert gap["interval"] is None and np.isnan(gap["p"])
    del arms[r1()]
    assert judged(arms) | {"rule": ""} == {
        "verdict": "undecided",
        "rule": "",
        "levels": {},
        "candidates": [],
    }


# -- levels ----------------------------------------------------------------------------------------


def test_the_difference_is_that_of_an_analysis_of_variance() -> None:
    """Without questions that an arm makes easier, the error is that of the seeds' means."""
    rng = np.random.default_rng(7)
    first, second = rng.normal(size=(2, 4, 30))
    first = first - first.mean(0)  # what is left: questions differ by nothing
    second = second - second.mean(0)
    first += rng.normal(size=(4, 1))
    second += rng.normal(size=(4, 1))
    gap = difference(first, second)
    welch = stats.ttest_ind(first.mean(1), second.mean(1), equal_var=False)
    assert gap.p == pytest.approx(welch.pvalue) and gap.df == pytest.approx(welch.df)
    assert gap.interval == pytest.approx(tuple(welch.confidence_interval()))
    # One policy each way leaves the questions alone: the paired t test.
    row, other = rng.normal(size=(2, 1, 50))
    gap = difference(np.repeat(row, 3, 0), other)
    paired = stats.ttest_rel(row[0], other[0])
    assert gap.p == pytest.approx(paired.pvalue) and gap.df == pytest.approx(49)


def test_a_difference_as_large_as_detectable_is_found_as_often_as_said() -> None:
    error, df = 0.02, 6.0
    least = detectable(error, df)
    rng = np.random.default_rng(0)
    t = (least / error + rng.normal(size=20_000)) / np.sqrt(rng.chisquare(df, 20_000) / df)
    assert np.mean(t > stats.t.isf(0.025, df)) == pytest.approx(0.8, abs=0.01)
    assert planned(3, 200) > planned(5, 200) > planned(5, 1000)


def rates(world: World, effect: float, sets: int) -> tuple[float, float]:
    """Share of sets in which R1 - R0 at a rate is called different from 0, and of those that pass.

    Args:
        effect: of R1, at both rates and levels, in log odds.
    """
    differ = 0
    passed = 0
    for number in range(sets):
        effects = cells(levels=("trajectory", "token"))
        for cell in effects:
            effects[cell] = effect * (cell.reward == "R1")
        found = judged(outcomes(np.random.default_rng([number, 1]), world, effects))
        differ += found["candidates"][0]["beside"]["R0"][ACCURACY]["p"] < 0.05
        passed += found["verdict"] == "pass"
    return differ / sets, passed / sets


@pytest.mark.long
def test_false_positives_are_at_the_level() -> None:
    differ, passed = rates(World(), 0.0, 200)
    assert 0 < differ <= 0.09  # P(more | 5 %) = 0.005
    assert passed <= 0.05
