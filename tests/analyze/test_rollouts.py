"""Best of n is what its subsets say, and no worthless reward passes for what it picks."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.latents.chosen import ChosenFeatures
from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.analyze.studies.contrast.study import DEFINITION as CONTRAST
from residual_saes.analyze.studies.rollouts.study import DEFINITION, by_contrast
from residual_saes.analyze.studies.stage_gate import best_of
from residual_saes.analyze.studies.stage_gate.best_of import MAJORITY, ORACLE, RANDOM, Pool
from residual_saes.analyze.studies.stage_gate.study import DEFINITION as GATE
from residual_saes.analyze.studies.stage_gate.words import SCORE
from residual_saes.data.errors import PipelineError
from tests.analyze.test_stage_gate import first_input, judged, made, verdict, with_firings

# -- the estimator ---------------------------------------------------------------------------------


def by_hand(n: int, worth: list[float], correct: list[bool]) -> float:
    """Mean over all subsets of n of the share right among those of the highest worth."""
    found = []
    for subset in combinations(range(len(worth)), n):
        best = max(worth[index] for index in subset)
        found.append(np.mean([correct[index] for index in subset if worth[index] == best]))
    return float(np.mean(found))


def votes_by_hand(n: int, number: list[str], correct: list[bool]) -> float:
    found = []
    for subset in combinations(range(len(number)), n):
        given = [number[index] for index in subset if number[index]]
        most = max((given.count(own) for own in given), default=0)
        wins = [i for i in subset if not most or (number[i] and given.count(number[i]) == most)]
        found.append(np.mean([correct[index] for index in wins]))
    return float(np.mean(found))


def small(seed: int, questions: int = 6, samples: int = 7) -> Means:
    rng = np.random.default_rng(seed)
    means = made(rng, questions, samples=samples)
    number = np.where(means.correct, "1", rng.choice(["2", "3", ""], len(means.correct)))
    return means._replace(number=number)


@pytest.mark.parametrize("seed", range(4))
def test_every_picker_is_its_mean_over_all_subsets(seed: int) -> None:
    means = small(seed)
    worth = np.random.default_rng(seed).integers(0, 4, len(means.correct)).astype(float)
    pool = Pool.of(means, np.arange(len(worth)))
    assert pool.sizes == [1, 2, 4, 7] and pool.left_out == 0
    voted = pool.voted()
    assert voted is not None
    for question, rows in enumerate(pool.rows):
        assert len(set(means.question[rows])) == 1
        correct = means.correct[rows].tolist()
        for column, n in enumerate(pool.sizes):
            picked = by_hand(n, worth[rows].tolist(), correct)
            assert pool.picked(worth)[question, column] == pytest.approx(picked)
            vote = votes_by_hand(n, means.number[rows].tolist(), correct)
            assert voted[question, column] == pytest.approx(vote)
            any_right = by_hand(n, [float(right) for right in correct], correct)
            assert pool.any_right()[question, column] == pytest.approx(any_right)
    np.testing.assert_allclose(pool.picked(means.correct + 0.0), pool.any_right())
    np.testing.assert_allclose(pool.picked(np.zeros(len(worth))), pool.at_random())


def test_votes_of_many_answers_are_drawn_and_near_the_mean_over_all() -> None:
    rng = np.random.default_rng(0)
    number = rng.integers(0, 3, (1, 14))
    pool = Pool(np.arange(14)[None], number == 0, number, 0)
    voted = pool.voted()
    assert voted is not None and math.comb(14, 4) > 500
    exact = votes_by_hand(4, [str(value) for value in number[0]], pool.correct[0].tolist())
    assert voted[0, pool.sizes.index(4)] == pytest.approx(exact, abs=0.08)


def test_questions_with_fewer_answers_than_most_are_left_out() -> None:
    means = small(1)
    keep = np.ones(len(means.correct), bool)
    keep[[0, 1, 9]] = False
    rows = np.flatnonzero(keep)
    pool = Pool.of(means, rows)
    assert pool.rows.shape == (4, 7) and pool.left_out == 2
    assert not {0, 1, 9} & set(pool.rows.ravel())


# -- comparisons -----------------------------------------------------------------------------------


def compared(pickers: dict[str, NDArray[np.float64]], draws: int = 400) -> dict:
    pool = Pool(np.zeros((len(pickers[RANDOM]), 8), int), np.zeros((60, 8), bool), None, 0)
    return best_of.measured(pool, pickers, (RANDOM,), draws, 0)


def test_few_questions_that_differ_tell_nothing() -> None:
    """Resampling would put an interval of four gains out of 60 above 0."""
    base = np.full((60, 1), 0.5)
    for gains, significant in ((4, False), (6, True)):
        better = base.copy()
        better[:gains] = 1.0
        (own,) = compared({SCORE: better, RANDOM: base}, 4000)["ahead"][SCORE][RANDOM]
        assert own["value"] == pytest.approx(gains / 120) and own["interval"].low > 0
        assert (own["p"] < 0.05) == significant
        assert own["p"] == pytest.approx(2 / 2**gains, rel=0.2)
    (same,) = compared({SCORE: base, RANDOM: base})["ahead"][SCORE][RANDOM]
    assert same["p"] == 1 and same["interval"] == (0, 0)


def false_positives(
    sets: int,
    questions: int = 50,
    right: float = 0.6,
    worth: float = 0.0,
    seed: int = 0,
    draws: int = 400,
) -> dict[str, float]:
    """How often p < .05 for the best of 8 by two rewards of the same worth, or by one of none.

    Args:
        right: share of right answers to a question of middling difficulty.
        worth: by how much right answers have a higher reward, in standard deviations of its noise.
    """
    others = ["another reward"] + [RANDOM, MAJORITY] * (worth == 0)
    counts = dict.fromkeys([*others, "verdict"], 0)
    for number in range(sets):
        rng = np.random.default_rng([seed, number])
        n = 8 * questions
        ease = np.repeat(rng.normal(size=questions), 8) + math.log(right / (1 - right))
        correct = rng.random(n) < 1 / (1 + np.exp(-ease))
        rewards = worth * correct + rng.normal(size=(2, n))
        numbers = rng.integers(0, 3, (questions, 8))  # of which a vote learns nothing
        pool = Pool(np.arange(n).reshape(questions, 8), correct.reshape(questions, 8), numbers, 0)
        voted = pool.voted()
        assert voted is not None
        pickers = {RANDOM: pool.at_random(), MAJORITY: voted}
        pickers |= {SCORE: pool.picked(rewards[0]), "another reward": pool.picked(rewards[1])}
        ahead = best_of.measured(pool, pickers, others, draws, number)["ahead"][SCORE]
        for other in others:
            counts[other] += ahead[other][-1]["p"] < 0.05
        means = made(rng, questions, samples=8)._replace(correct=correct, number=None)
        counts["verdict"] += judged(means, rewards[0])[0] == "pass"
    return {name: count / sets for name, count in counts.items()}


def test_rewards_of_the_same_worth_are_told_apart_by_chance_alone() -> None:
    found = false_positives(60, 40, draws=100)
    assert found.pop("verdict") == 0
    assert max(found.values()) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


# -- worthless rewards -----------------------------------------------------------------------------


def of_writing(seed: int, what: str) -> tuple[Means, NDArray[np.float64]]:
    """Answers that are wrong for how they are written, and a reward that reads this alone."""
    rng = np.random.default_rng(seed)
    means = made(rng, 120)
    n = len(means.correct)
    formed = rng.random(n) < 0.6
    correct = formed & (rng.random(n) < 0.7)
    number = np.where(formed, np.where(correct, "1", "2"), "")
    if what == "number":
        means = means._replace(correct=correct, number=number)
    else:
        means = means._replace(correct=correct, finished=formed, number=np.full(n, "1"))
    return means, formed + 0.1 * rng.normal(size=n)


@pytest.mark.parametrize("what", ["number", "finished"])
def test_a_reward_that_reads_how_an_answer_is_written_fails(what: str) -> None:
    means, reward = of_writing(0, what)
    word, own, _ = judged(means, reward)
    assert own["rho"]["value"] > 0.3 and own["p"] < 0.05 and word == "fail"
    blind = means._replace(number=None, finished=np.ones(len(reward), bool))
    assert judged(blind, reward)[0] == "pass"  # by what it was caught


def test_a_choice_that_fits_the_discovery_answers_alone_fails() -> None:
    """Of 2,000 latents of noise some tell any labels apart."""
    rng = np.random.default_rng(3)
    means = made(rng, 60)
    shape = (len(means.correct), 2000)
    x = rng.exponential(size=shape) * (rng.random(shape) < 0.1)
    means = with_firings(means._replace(features=sparse.csr_array(x.astype(np.float32))))
    found = verdict(means, fit_probe=first_input)
    assert found["helpful"][0]["g"] > 0.3 and found["verdict"] == "fail"
    assert found["best_of"]["ahead"][SCORE][RANDOM][-1]["p"] > 0.05


def test_a_reward_whose_highest_values_are_wrong_fails() -> None:
    """It orders most pairs, and still an answer that is wrong has the highest value of all."""
    rng = np.random.default_rng(4)
    means = made(rng, 120, samples=8)
    correct = rng.permuted(np.tile(np.arange(8) < 4, (120, 1)), axis=1).ravel()
    reward = correct + 0.3 * rng.normal(size=960)
    wrong = np.flatnonzero(~correct).reshape(120, 4)
    reward[wrong[:, 0]] += 10
    word, own, _ = judged(means._replace(correct=correct, number=None), reward)
    assert own["auroc"]["value"] > 0.7 and own["p"] < 0.05 and word == "fail"


def test_a_planted_reward_picks_more_right_answers_than_all_that_costs_less() -> None:
    found = verdict(made(np.random.default_rng(0), effect=3.0))
    assert found["verdict"] == "pass"
    best = found["best_of"]
    assert best["n"] == [1, 2, 4, 6] and best["questions"] == found["validation"]["questions"]
    curve = [point["value"] for point in best["accuracy"][SCORE]]
    assert curve == sorted(curve)
    for other, points in best["ahead"][SCORE].items():
        assert points[-1]["p"] < 0.05 and points[-1]["value"] > 0, other
        assert points[-1]["interval"].low > 0
    assert curve[-1] <= best["accuracy"][ORACLE][-1]["value"]
    chance = found["random_latents"]["accuracy"][-1]
    assert chance["p"] < 0.05 and chance["interval"].high < curve[-1]


# -- the study -------------------------------------------------------------------------------------

ASKED = {"questions": 40, "samples": 4, "temperature": 1.5, "new_tokens": 40, "batch": 160}
OPTIONS = {"discovery": 0.5, "min_firing": 5, "draws": 40, "layer": 2}


def test_rollouts_and_the_gate_agree_and_contrast_stands_beside(tiny_study) -> None:
    options = {"discovery": 0.5, "permutations": 19, "min_firing": 5, "seed": 0}
    tiny_study("contrast", answers=ASKED, **options).perform(CONTRAST)
    study = tiny_study("rollouts", answers=ASKED, **OPTIONS)
    outcome = study.perform(DEFINITION)
    found = json.loads(dumped(outcome.figures))
    of = tiny_study("stage_gate", answers=ASKED, **OPTIONS)
    gate = of.perform(GATE)
    of_gate = json.loads(dumped(gate.figures))
    assert of_gate["verdict"] in gate.summary[0]
    assert sum(of_gate[side]["questions"] for side in ("discovery", "validation")) == 40
    assert of_gate["layer"] == 2 and of_gate["layer_of_features"] == of.subject.layer
    assert gate.pictures["auroc"].svg.startswith("<svg")
    pack = json.loads((of.folder / "reasoning_pack.json").read_bytes())
    assert pack["validation"]["verdict"] == of_gate["verdict"].upper()

    # The same verdict, by the same figures; the features by contrast are one candidate more.
    assert set(found["scores"]) - set(of_gate["scores"]) == {"features by contrast"}
    assert found["verdict"] in ("pass", "weak", "fail")
    assert outcome.summary[0] == gate.summary[0]
    for name in set(of_gate) - {"scores", "best_of"}:
        assert found[name] == of_gate[name], name
    for name, score in of_gate["scores"].items():
        assert found["scores"][name]["within"]["auroc"] == score["within"]["auroc"]
        assert found["scores"][name]["within"]["p"] == score["within"]["p"]
        assert found["best_of"]["accuracy"][name] == of_gate["best_of"]["accuracy"][name]

    chosen = ChosenFeatures.read(study.place / "rollouts.json")
    of_the_gate = ChosenFeatures.read(study.place.parent / "stage_gate" / "stage_gate.json")
    assert chosen[1:-1] == of_the_gate[1:-1] and chosen.verdict == found["verdict"]

    assert found["drawn"] == {"samples": 4, "temperature": 1.5, "seed": 0}
    assert set(outcome.pictures) == {"best_of_n", "auroc"} and found["left_out"] == []
    table = pq.read_table(study.place / "rollouts.parquet").to_pydict()
    assert len(table["question"]) == 160 - found["empty"] and set(table["sample"]) == {0, 1, 2, 3}
    right = [found[side]["right"] for side in ("discovery", "validation")]
    assert sum(table["correct"]) == sum(right)
    with pytest.raises(PipelineError, match="study=contrast"):  # whose questions would judge
        by_contrast(study, set(found["discovery"]["ids"]))
