"""The stage gate passes what is planted and nothing that is worthless in GRPO.

It chooses nothing on the questions that judge.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy import stats as reference
from scipy.stats import rankdata

from residual_saes.analyze import probe, stats
from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.questions import answering
from residual_saes.analyze.questions.split import in_discovery
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.analyze.studies.stage_gate import best_of, within
from residual_saes.analyze.studies.stage_gate.discrimination import (
    Scored,
    measured,
    permuted,
    resampled,
    three,
)
from residual_saes.analyze.studies.stage_gate.features import choose
from residual_saes.analyze.studies.stage_gate.judgement import Options, judge, notes
from residual_saes.analyze.studies.stage_gate.judgement import verdict as verdict_of
from residual_saes.analyze.studies.stage_gate.scores import log_probabilities
from residual_saes.analyze.studies.stage_gate.study import stage_gate
from residual_saes.analyze.studies.stage_gate.words import SCORE, summary, tables
from residual_saes.data.errors import SettingError, StopRequest

OPTIONS = Options(discovery=0.5, min_firing=5, draws=100)
F = 60
SAMPLES = 6


def made(
    rng: np.random.Generator,
    questions: int = 80,
    effect: float = 0.0,
    samples: int = SAMPLES,
    through_length: bool = False,
) -> Means:
    """Answers of which latents 0 to 9 fire more in right ones, 10 to 19 more in wrong ones."""
    n = questions * samples
    question = np.repeat(np.arange(questions), samples)
    length = rng.integers(20, 120, n)
    longer = (length - 20) / 100
    ease = rng.normal(size=questions)[question]
    right = longer if through_length else 1 / (1 + np.exp(-ease - 0.3))
    correct = rng.random(n) < right
    features = rng.exponential(size=(n, F)) * (rng.random((n, F)) < 0.3)
    sign = (longer if through_length else correct)[:, None]
    features[:, :10] += effect * sign * rng.random((n, 10))
    features[:, 10:20] += effect * (1 - sign) * rng.random((n, 10))
    hidden = rng.normal(size=(n, 2, 6)).astype(np.float32)
    names = np.array([f"q{number}" for number in question])
    number = np.where(correct, "1", np.where(np.arange(n) % 2, "2", "3"))
    return with_firings(
        Means(
            hidden,
            sparse.csr_array(features.astype(np.float32)),
            length,
            length > 0,
            correct,
            names,
            number=number,
        )
    )


def with_firings(means: Means) -> Means:
    """With latents that fire on one token of each answer in which they fire."""
    firings = means.features.copy()
    firings.data = np.ones(len(firings.data), np.int32)
    return means._replace(firings=firings)


def verdict(means: Means, options: Options = OPTIONS, fit_probe=probe.cross_validated) -> dict:
    log_probability = np.random.default_rng(9).normal(size=len(means.correct))
    with StopRequest() as stop:
        return judge(means, log_probability, 1, options, stop, fit_probe).figures


def first_input(*_: object):
    """A probe that is not fitted, where the fit would be slow and no part of the test."""
    return lambda x: x[:, 0]


def test_planted_features_pass() -> None:
    found = verdict(made(np.random.default_rng(0), effect=2.0))
    assert found["verdict"] == "pass" and found["missing"] == found["notes"] == []
    assert {feature["feature"] for feature in found["helpful"]} == set(range(10))
    assert {feature["feature"] for feature in found["harmful"]} == set(range(10, 20))
    own = found["scores"][SCORE]
    for figures in (own, own["within"]):
        assert figures["auroc"]["interval"].low > 0.8 and figures["p"] == 1 / 101
    assert own["within"]["rho"]["value"] <= own["within"]["cap"] < 1
    assert own["rho"]["value"] <= found["cap"]
    assert found["random_latents"]["auroc"]["p"] < 0.05
    for name, score in found["scores"].items():
        assert name == SCORE or score["within"]["behind"]["interval"].low > 0.1
    assert not set(found["discovery"]["ids"]) & set(found["validation"]["ids"])


def null_verdicts(sets: int, draws: int = 40) -> Counter[str]:
    """Verdicts on planted features whose labels were permuted inside questions."""
    verdicts: Counter[str] = Counter()
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        means = made(rng, 40, effect=2.0)
        labels = rng.permuted(means.correct.reshape(-1, SAMPLES), axis=1).ravel()
        means = means._replace(correct=labels, number=None)
        verdicts[verdict(means, Options(0.5, 5, draws), first_input)["verdict"]] += 1
    return verdicts


def test_labels_permuted_inside_questions_do_not_pass() -> None:
    verdicts = null_verdicts(12, 20)
    assert set(verdicts) <= {"pass", "weak", "fail"}
    assert 12 - verdicts["fail"] <= 2  # P(more | 5 %) = 0.020; the rule asks more


# -- what is worthless in GRPO ---------------------------------------------------------------------


def judged(means: Means, reward: NDArray[np.float64]) -> tuple[str, dict, list[str]]:
    """The verdict on a reward of all answers, its figures and what is said of it."""
    rows = np.arange(len(means.correct))
    groups = within.Groups.of(means, rows)
    pool = best_of.Pool.of(means, rows)
    pickers = {SCORE: pool.picked(reward), best_of.RANDOM: pool.at_random()}
    picked = best_of.measured(pool, pickers, (best_of.RANDOM,), 200, 0)
    with StopRequest() as stop:
        own = within.measured(groups, {SCORE: reward}, SCORE, 200, 0, stop)[SCORE]
    ahead = picked["ahead"][SCORE][best_of.RANDOM][-1]
    return verdict_of(own, ahead)[0], own, notes(own, len(groups.sizes), groups.names)


def test_a_reward_that_reads_the_questions_difficulty_fails() -> None:
    rng = np.random.default_rng(0)
    ease = np.repeat(rng.normal(size=150), 4)
    correct = rng.random(600) < 1 / (1 + np.exp(-1.5 * ease))
    load = rng.normal(size=200) * 0.6
    x = np.maximum(0, 1 + load * ease[:, None] + np.repeat(rng.normal(size=(150, 200)), 4, 0))
    hidden = np.repeat(rng.normal(size=(150, 2, 8)), 4, 0).astype(np.float32)
    hidden[:, 1, 0] += ease
    question = np.repeat([f"q{number}" for number in range(150)], 4)
    length = rng.integers(80, 200, 600)
    features = sparse.csr_array(x.astype(np.float32))
    means = with_firings(Means(hidden, features, length, length > 0, correct, question))
    found = verdict(means)
    assert found["verdict"] == "fail" and found["notes"]
    assert stats.auroc(ease, correct) > 0.75  # which passed across questions
    for reward, said in ((ease, True), (ease + 0.3 * rng.normal(size=600), False)):
        word, own, why = judged(means, reward)
        assert word == "fail" and bool(why) == said
        assert own["auroc"]["value"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shape", ["longer", "middling"])
def test_a_reward_that_reads_the_length_fails(shape: str) -> None:
    rng = np.random.default_rng(1)
    means = made(rng, 150)
    length = means.length / 120.0
    reads = length if shape == "longer" else -((length - 0.6) ** 2) * 4
    means = means._replace(correct=rng.random(len(reads)) < 1 / (1 + np.exp(-6 * reads + 3)))
    if shape == "middling":
        means = means._replace(correct=rng.random(len(reads)) < 1 / (1 + np.exp(-8 * reads - 2)))
    for reward in (reads, reads + 0.05 * rng.normal(size=len(reads))):
        word, own, _ = judged(means, reward)
        assert own["auroc"]["interval"].low > 0.5 and own["p"] < 0.05
        assert word == "fail"
    found = verdict(made(np.random.default_rng(1), 150, effect=3.0, through_length=True))
    assert found["verdict"] == "fail"
    assert set(found["missing"]) == {"rho given length >= 0.30", "rho given length above 0"}


def test_a_reward_that_knows_who_wrote_an_answer_fails() -> None:
    rng = np.random.default_rng(2)
    means = made(rng, 150, samples=4)
    writer = np.tile(np.arange(4), 150)
    correct = rng.random(600) < np.array([0.2, 0.4, 0.6, 0.8])[writer]
    means = means._replace(correct=correct, source=np.array(list("abcd"))[writer])
    for reward in (writer * 1.0, writer + 0.5 * rng.normal(size=600)):
        word, own, _ = judged(means, reward)
        assert own["auroc"]["interval"].low > 0.6 and own["rho"]["value"] > 0.3
        assert word == "fail"
    assert judged(means, writer * 1.0)[2]  # it says why
    # What little it knows beside the writer does not make it pass by the writer's rho.
    word, own, _ = judged(means, writer + 0.3 * rng.normal(size=600) + 0.25 * correct)
    assert word == "weak" and own["rho"]["value"] > 0.3


def test_one_lucky_question_does_not_make_a_reward() -> None:
    rng = np.random.default_rng(3)
    means = made(rng, 40)
    many = rng.random(500) < 0.5  # and a question with many answers counts once
    means = means._replace(
        correct=np.concatenate([means.correct, many]),
        question=np.concatenate([means.question, np.full(500, "lucky")]),
        length=np.concatenate([means.length, rng.integers(20, 120, 500)]),
        finished=np.ones(740, bool),
        number=None,
    )
    lucky = means.question == "lucky"
    word, own, _ = judged(means, np.where(lucky, means.correct, 0.0))
    assert word == "fail" and own["auroc"]["value"] < 0.52 and own["questions"] == 1
    few = means._replace(correct=np.where(lucky, np.arange(740) == 739, means.correct))
    word, own, said = judged(few, np.where(np.arange(740) > 736, few.correct, 0.0))
    assert word == "fail"
    two = means.question == means.question[means.correct][0]
    three_of = np.flatnonzero(two)[:3]
    word, own, said = judged(means, np.isin(np.arange(740), three_of) * rng.random(740))
    assert word == "fail" and said and own["least_p"] > 0.05


def test_a_constant_reward_and_one_with_the_wrong_sign_fail() -> None:
    means = made(np.random.default_rng(4))
    word, own, said = judged(means, np.full(len(means.correct), 3.0))
    assert word == "fail" and own["p"] is None and said
    word, own, _ = judged(means, -1.0 * means.correct)
    assert word == "fail" and own["auroc"]["value"] == 0 and own["p"] == 1
    word, own, _ = judged(means, means.correct + 0.0)
    assert word == "pass" and own["rho"]["value"] == pytest.approx(own["cap"])


# -- what cannot be decided ------------------------------------------------------------------------


def test_one_answer_to_a_question_decides_nothing() -> None:
    found = verdict(made(np.random.default_rng(5), 400, effect=3.0, samples=1))
    assert found["verdict"] == "undecided" and "answers.samples" in found["notes"][0]
    assert found["within"] is None and found["scores"][SCORE]["within"] is None
    assert found["scores"][SCORE]["auroc"]["interval"].low > 0.8  # as the reference
    assert found["random_latents"]["auroc"]["p"] < 0.05
    said = summary(json.loads(dumped(found)))
    assert "answers.samples=8" in said[0]


@pytest.mark.parametrize("mixed", [0, 1, 15])
def test_too_few_questions_with_both_decide_nothing(mixed: int) -> None:
    means = made(np.random.default_rng(6))
    number = np.arange(len(means.correct)) // SAMPLES
    labels = np.where(number < mixed, means.correct, number % 2 == 0)
    found = verdict(means._replace(correct=labels))
    assert found["verdict"] == "undecided" and "questions have both" in found["notes"][0]
    json.loads(dumped(found))
    assert "undecided" in summary(found)[0] and tables(found)


def test_the_labels_of_random_features_come_from_discovery_too() -> None:
    """Where all features follow one nuisance, ten chosen ones are no better than any ten."""
    p = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        means = made(rng, 100, samples=4)
        nuisance = rng.normal(size=400) + means.correct
        x = np.maximum(0, rng.choice([-1, 1], 200) * nuisance[:, None] / 2 + 1.5)
        x += rng.normal(size=(400, 200)) * (rng.random((400, 200)) < 0.5)
        x = sparse.csr_array(np.maximum(x, 0).astype(np.float32))
        means = with_firings(means._replace(features=x))
        found = verdict(means, Options(0.5, 5, 40), first_input)
        p.append(found["random_latents"]["auroc"]["p"])
    assert np.median(p) > 0.1


# -- the rule and the split ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected", "missing"),
    [
        ({}, "pass", []),
        ({"rho": 0.29}, "weak", ["rho >= 0.30"]),
        ({"p": 0.05}, "fail", ["p < 0.05"]),
        ({"p": None}, "fail", ["p < 0.05"]),
        ({"auroc": 0.5}, "fail", ["AUROC above 0.5"]),
        ({"given": 0.29}, "weak", ["rho given length >= 0.30"]),
        ({"rho_given_length": 0.0}, "fail", ["rho given length above 0"]),
        (
            {"given": float("nan"), "rho_given_length": float("nan")},
            "fail",
            ["rho given length >= 0.30", "rho given length above 0"],
        ),
        ({"rho": float("nan")}, "weak", ["rho >= 0.30"]),
        ({"picked_p": 0.05}, "fail", ["best of n above a random pick"]),
        ({"ahead": -0.1}, "fail", ["best of n above a random pick"]),
    ],
)
def test_the_verdict_follows_its_rule(change: dict, expected: str, missing: list[str]) -> None:
    """`change` gives values of rho and p, and lower ends of the other two's intervals."""
    values = {"rho": 0.30, "p": 0.049, "auroc": 0.51, "rho_given_length": 0.01, "given": 0.3}
    values |= change
    ahead = {"value": values.pop("ahead", 0.1), "p": values.pop("picked_p", 0.049)}
    found = {
        name: {"value": value, "interval": stats.Interval(value, 1.0)}
        for name, value in values.items()
        if name not in ("p", "given")
    }
    found["rho_given_length"]["value"] = values["given"]
    assert verdict_of({**found, "p": values["p"]}, ahead) == (expected, missing)


def test_validation_answers_choose_nothing() -> None:
    means = made(np.random.default_rng(2), effect=1.0)
    discovery = in_discovery(means.question, 0.5)
    assert 0.3 < discovery.mean() < 0.7
    changed = means._replace(correct=np.where(discovery, means.correct, ~means.correct))
    first, second = verdict(means), verdict(changed)
    assert dumped(first) == dumped(verdict(means))
    assert first["helpful"] == second["helpful"] and first["harmful"] == second["harmful"]
    for name in first["scores"]:  # so every score is the same, and tells the opposite
        for one, other in (
            (first["scores"][name], second["scores"][name]),
            (first["scores"][name]["within"], second["scores"][name]["within"]),
        ):
            assert one["auroc"]["value"] == pytest.approx(1 - other["auroc"]["value"])
    assert second["verdict"] == "fail"


def test_with_parts_the_train_questions_choose() -> None:
    means = made(np.random.default_rng(2), effect=1.0)
    part = np.where(np.arange(len(means.correct)) < 50 * SAMPLES, "train", "test")
    found = verdict(means._replace(part=part), fit_probe=first_input)
    assert set(found["discovery"]["ids"]) == {f"q{number}" for number in range(50)}
    assert set(found["validation"]["ids"]) == {f"q{number}" for number in range(50, 80)}


def test_a_question_has_one_side_whatever_else_is_asked() -> None:
    question = np.array([f"q{number // 4}" for number in range(400)])
    side = in_discovery(question, 0.3)
    assert all(len(set(side[question == number])) == 1 for number in np.unique(question))
    assert side.mean() == pytest.approx(0.3, abs=0.12)
    np.testing.assert_array_equal(in_discovery(question[40:80], 0.3), side[40:80])


def test_features_are_those_of_largest_effect_that_fire_enough() -> None:
    rng = np.random.default_rng(3)
    x = rng.random((50, 30)) * (rng.random((50, 30)) < 0.5)
    correct = rng.random(50) < 0.5
    x[:, 7] = 0
    x[np.flatnonzero(correct)[:4], 7] = 9  # large, in four answers
    chosen = choose(sparse.csr_array(x), correct, 5)
    g = np.array([stats.hedges_g(x[:, [feature]], correct)[0] for feature in range(30)])
    g[7] = 0
    assert chosen.helpful.tolist() == [feature for feature in np.argsort(-g)[:10] if g[feature] > 0]
    assert chosen.harmful.tolist() == [feature for feature in np.argsort(g)[:10] if g[feature] < 0]
    assert 7 not in chosen.eligible
    # Within questions, what follows the question alone is not chosen.
    question = np.repeat(np.arange(10), 5)
    correct = np.tile([True, False, True, False, question[0] == 0], 10)
    x[:, 3] = question
    assert choose(sparse.csr_array(x), correct, 5, question).g[3] == 0


# -- figures within questions ----------------------------------------------------------------------


def small(seed: int = 0, questions: int = 12) -> Means:
    rng = np.random.default_rng(seed)
    means = made(rng, questions, samples=5)
    keep = rng.permutation(len(means.correct))[: 4 * questions]
    fields = {name: getattr(means, name)[keep] for name in means._fields[:6]}
    return Means(**fields)


def test_figures_within_questions_are_their_definitions() -> None:
    means = small()
    reward = np.random.default_rng(1).integers(0, 4, len(means.correct)).astype(float)
    shares, caps, ranks, labels, weights = [], [], [], [], []
    for name in np.unique(means.question):
        own = means.question == name
        right, score = means.correct[own], reward[own]
        if right.all() or not right.any():
            continue
        shares.append(stats.auroc(score, right))
        rank = (rankdata(score) - rankdata(score).mean()) / own.sum()
        caps.append(np.sort(rank)[::-1][: right.sum()].sum() * own.sum() / right.sum())
        caps[-1] /= (~right).sum()
        ranks.append(rank)
        labels.append(right - right.mean())
        weights.append(np.full(own.sum(), own.sum() / right.sum() / (~right).sum()))
    w, z, y = (np.concatenate(part) for part in (weights, ranks, labels))
    scale = np.sqrt((w @ z**2) * (w @ y**2))
    _, own, _ = judged(means, reward)
    assert own["auroc"]["value"] == pytest.approx(np.mean(shares))
    assert own["rho"]["value"] == pytest.approx(w @ (z * y) / scale)
    assert own["cap"] == pytest.approx(np.sum(caps) / scale)
    perfect = judged(means, means.correct + 0.0)[1]
    assert perfect["auroc"]["value"] == 1 and perfect["rho"]["value"] == pytest.approx(1)


def test_rho_given_covariates_is_a_partial_correlation() -> None:
    means = small(3, 40)
    reward = np.random.default_rng(2).normal(size=len(means.correct)) + means.correct
    groups = within.Groups.of(means, np.arange(len(reward)))
    root = np.sqrt(groups.weights)
    label = groups.correct - (groups.right / groups.sizes)[groups.question]
    design = groups.covariates * root[:, None]
    rest = []
    for values in (groups.ranks(reward[groups.rows]) * root, label * root):
        rest.append(values - design @ np.linalg.lstsq(design, values)[0])
    expected = rest[0] @ rest[1] / np.sqrt((rest[0] @ rest[0]) * (rest[1] @ rest[1]))
    found = judged(means, reward)[1]["rho_given_length"]["value"]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("sets", [120, pytest.param(250, marks=pytest.mark.long)])
def test_p_within_questions_is_right_also_where_wrong_answers_spread_more(sets: int) -> None:
    p = []
    for seed in range(sets):
        rng = np.random.default_rng([seed, 1])
        correct = np.tile([True, True, True, True, True, False], 40)
        reward = rng.normal(size=240) * np.where(correct, 1, 20)
        means = made(rng, 40)._replace(correct=correct)
        groups = within.Groups.of(means, np.arange(240))
        with StopRequest() as stop:
            p.append(within.measured(groups, {"x": reward}, "x", 60, seed, stop)["x"]["p"])
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * (0.05 * 0.95 / sets) ** 0.5
    assert 0.4 < np.mean(p) < 0.6


def passing(auroc: float, questions: int, sets: int, seed: int = 0) -> float:
    """The share of rewards of this AUROC within questions that pass on so many with both."""
    count = 0
    for number in range(sets):
        rng = np.random.default_rng([seed, number])
        means = made(rng, questions, samples=8)
        correct = rng.permuted(np.tile(np.arange(8) % 2 == 0, (questions, 1)), axis=1).ravel()
        reward = rng.normal(size=len(correct)) + np.sqrt(2) * stats_of_normal(auroc) * correct
        count += judged(means._replace(correct=correct), reward)[0] == "pass"
    return count / sets


def stats_of_normal(share: float) -> float:
    return float(reference.norm.ppf(share))


def test_a_good_reward_passes_and_one_without_worth_does_not() -> None:
    assert passing(0.8, 40, 10) == 1
    assert passing(0.5, 40, 20) == 0


# -- figures across questions ----------------------------------------------------------------------


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Rank correlation of what a regression on the ranks of `given` leaves."""
    design = np.c_[np.ones(len(x)), rankdata(given)]
    rest = []
    for ranks in (rankdata(x), rankdata(y)):
        coefficients = np.linalg.lstsq(design, ranks)[0]
        rest.append(ranks - design @ coefficients)
    return float(np.corrcoef(*rest)[0, 1])


def test_three_figures_are_their_definitions() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        values = rng.integers(0, 6, (3, 30)).astype(float)
        correct, length = rng.random(30) < 0.4, rng.integers(0, 5, 30)
        expected = []
        for score in values:
            given_length = partial_spearman(score, correct, length)
            expected.append(
                [stats.auroc(score, correct), stats.spearman(score, correct), given_length]
            )
        np.testing.assert_allclose(three(values, correct, length), expected, rtol=1e-9)
    constant = np.zeros((1, 30))
    np.testing.assert_array_equal(three(constant, correct, length), [[0.5, np.nan, np.nan]])
    assert np.isnan(three(values, correct | True, length)).all()
    same = three(values, correct, np.full(30, 7))
    np.testing.assert_allclose(same[:, 2], same[:, 1])


def test_permutations_keep_questions_whole() -> None:
    question = np.array([0, 1, 0, 2, 3, 3, 4, 5, 6, 6, 6])
    correct = np.array([1, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1], bool)
    labels = permuted(correct, question, 500, 0)
    pairs = {(tuple(row[question == 0]), tuple(row[question == 3])) for row in labels}
    assert pairs == {((True, False), (True, True)), ((True, True), (True, False))}
    assert (labels[:, 8:] == correct[8:]).all()  # no other question has three answers
    single = labels[:, [1, 3, 6, 7]]
    assert (single.sum(1) == 2).all() and len(np.unique(single, axis=0)) == 6
    for cases in resampled(question, 50, 0):
        counts = np.bincount(cases, minlength=11)
        assert all(len(set(counts[question == number])) == 1 for number in range(7))


def test_answers_to_one_question_do_not_make_p_small() -> None:
    """Scores and labels that are the same for all answers to a question, and else unrelated."""
    p = []
    for seed in range(30):  # of which a third would be found if answers were shuffled one by one
        rng = np.random.default_rng(seed)
        question = np.repeat(np.arange(30), 12)
        correct, score = (rng.random(30) < 0.5)[question], rng.normal(size=30)[question]
        of = Scored({SCORE: score}, correct, rng.integers(1, 9, 360), question)
        with StopRequest() as stop:
            p.append(measured(of, SCORE, 40, 0, stop)[SCORE]["p"])
    assert np.mean(np.array(p) < 0.05) <= 0.14
    assert 0.3 < np.mean(p) < 0.7


def test_a_score_without_spread_is_not_significant() -> None:
    of = Scored({SCORE: np.zeros(20)}, np.arange(20) % 2 == 0, np.arange(20), np.arange(20))
    with StopRequest() as stop:
        assert measured(of, SCORE, 40, 0, stop)[SCORE]["p"] is None
    lone = Scored(
        {SCORE: np.arange(6.0)}, np.arange(6) < 3, np.arange(6), np.repeat([0, 1, 2], [1, 2, 3])
    )
    with StopRequest() as stop:  # no question has as many answers as another
        assert measured(lone, SCORE, 40, 0, stop)[SCORE]["p"] is None


# -- the study -------------------------------------------------------------------------------------


def test_a_layer_that_is_not_there_is_refused(tiny_study) -> None:
    """The study as a whole is in test_rollouts.py."""
    with pytest.raises(SettingError, match=r"study\.layer"):
        stage_gate(tiny_study("stage_gate", answers={"questions": 40}, layer=99))


def test_log_probabilities_are_the_models(tiny_study) -> None:
    study = tiny_study("stage_gate", answers={"questions": 2, "samples": 3, "new_tokens": 24})
    with StopRequest() as stop:
        answers = answering.answers(study, stop)
        found = log_probabilities(study, answers, stop)
        for answer, value in zip(answers, found, strict=True):
            with torch.inference_mode():
                logits = (
                    study.lm.causal(input_ids=torch.tensor([answer.sequence]), use_cache=False)
                    .logits[0]
                    .double()
                )
            steps = [
                float(logits[at - 1].log_softmax(0)[answer.sequence[at]])
                for at in range(len(answer.prompt_ids), len(answer.sequence))
            ]
            assert value == pytest.approx(np.mean(steps), abs=1e-4)
        np.testing.assert_array_equal(log_probabilities(study, answers, stop), found)


@pytest.mark.parametrize(("name", "value"), [("discovery", 0.0), ("draws", 5), ("min_firing", 0)])
def test_settings_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"study.{name}"):
        Options(**{name: value})


def test_too_little_to_judge() -> None:
    means = made(np.random.default_rng(7), 100, samples=1)
    with pytest.raises(SettingError, match=r"answers\.questions"):
        verdict(means._replace(correct=np.ones(100, bool)))
    with pytest.raises(SettingError, match=r"study\.min_firing"):
        verdict(means, Options(0.5, 101, 100))
