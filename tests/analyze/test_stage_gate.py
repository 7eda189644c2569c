"""The stage gate passes what is planted and fails what is chance.

It chooses nothing on the questions that judge.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import optimize, sparse
from scipy.stats import rankdata

from analyze import answering, stats
from analyze.outcome import dumped
from analyze.studies.contrast.means import Means
from analyze.studies.stage_gate import probe
from analyze.studies.stage_gate.discrimination import Scored, measured, permuted, resampled, three
from analyze.studies.stage_gate.study import (
    SCORE,
    Options,
    choose,
    in_discovery,
    judge,
    log_probabilities,
    stage_gate,
)
from analyze.studies.stage_gate.study import verdict as verdict_of
from data.errors import SettingError, StopRequest

OPTIONS = Options(discovery=0.5, min_firing=5, draws=100)
F = 60


def made(
    rng: np.random.Generator,
    n: int = 400,
    effect: float = 0.0,
    each: int = 1,
    through_length: bool = False,
) -> Means:
    """Answers of which latents 0 to 9 fire more in right ones, 10 to 19 more in wrong ones."""
    length = rng.integers(20, 120, n)
    longer = (length - 20) / 100
    correct = rng.random(n) < (longer if through_length else 0.6)
    features = rng.exponential(size=(n, F)) * (rng.random((n, F)) < 0.3)
    sign = (longer if through_length else correct)[:, None]
    features[:, :10] += effect * sign * rng.random((n, 10))
    features[:, 10:20] += effect * (1 - sign) * rng.random((n, 10))
    question = np.array([f"q{number // each}" for number in range(n)])
    hidden = rng.normal(size=(n, 2, 6)).astype(np.float32)
    return Means(
        hidden, sparse.csr_array(features.astype(np.float32)), length, length > 0, correct, question
    )


def verdict(means: Means, options: Options = OPTIONS, fit_probe=probe.cross_validated) -> dict:
    log_probability = np.random.default_rng(9).normal(size=len(means.correct))
    with StopRequest() as stop:
        return judge(means, log_probability, 1, options, stop, fit_probe)


def test_planted_features_pass() -> None:
    found = verdict(made(np.random.default_rng(0), effect=2.0))
    assert found["verdict"] == "pass" and found["missing"] == []
    assert {feature["feature"] for feature in found["helpful"]} == set(range(10))
    assert {feature["feature"] for feature in found["harmful"]} == set(range(10, 20))
    own = found["scores"][SCORE]
    assert own["auroc"]["interval"].low > 0.8 and own["p"] == 1 / 101
    held = found["validation"]
    assert found["cap"] == stats.spearman_cap(held["right"] / held["answers"])
    assert own["rho"]["value"] <= found["cap"] + 1 / held["answers"]
    assert found["random_features"]["p"] < 0.05
    assert found["random_features"]["median"] == pytest.approx(0.5, abs=0.1)
    for name in ("length", "mean log-probability", "raw direction (CAA)", "logistic probe"):
        assert found["scores"][name]["behind"]["interval"].low > 0.1
    assert not set(found["discovery"]["ids"]) & set(found["validation"]["ids"])


def first_input(*_: object):
    """A probe that is not fitted, where the fit would be slow and no part of the test."""
    return lambda x: x[:, 0]


def test_shuffled_labels_pass_no_more_often_than_the_level() -> None:
    verdicts = []
    for seed in range(60):
        means = made(np.random.default_rng(seed), n=120, effect=2.0)
        shuffled = np.random.default_rng(1000 + seed).permutation(means.correct)
        means = means._replace(correct=shuffled)
        verdicts.append(verdict(means, Options(0.5, 5, 40), first_input)["verdict"])
    assert verdicts.count("pass") <= 3  # 5 % of 60; the rule asks for more than p
    assert verdicts.count("pass") + verdicts.count("weak") <= 8  # P(more | 5 %) = 0.003


def test_what_only_tells_length_does_not_pass() -> None:
    found = verdict(made(np.random.default_rng(1), n=1000, effect=3.0, through_length=True))
    own = found["scores"][SCORE]
    assert own["rho"]["value"] > 0.3 and own["p"] < 0.05
    assert own["rho_given_length"]["interval"].low < 0 < own["rho_given_length"]["interval"].high
    assert found["verdict"] == "weak" and found["missing"] == ["rho given length above 0"]


@pytest.mark.parametrize(
    ("change", "expected", "missing"),
    [
        ({}, "pass", []),
        ({"rho": 0.29}, "weak", ["rho >= 0.30"]),
        ({"p": 0.05}, "fail", ["p < 0.05"]),
        ({"auroc": 0.5}, "weak", ["AUROC above 0.5"]),
        ({"rho_given_length": 0.0}, "weak", ["rho given length above 0"]),
        ({"rho_given_length": float("nan")}, "weak", ["rho given length above 0"]),
    ],
)
def test_the_verdict_follows_its_rule(change: dict, expected: str, missing: list[str]) -> None:
    """`change` gives values of rho and p, and lower ends of the other two's intervals."""
    values = {"rho": 0.30, "p": 0.049, "auroc": 0.51, "rho_given_length": 0.01, **change}
    found = {
        name: {"value": value, "interval": stats.Interval(value, 1.0)}
        for name, value in values.items()
    }
    assert verdict_of({**found, "p": values["p"]}) == (expected, missing)


def test_validation_answers_choose_nothing() -> None:
    means = made(np.random.default_rng(2), effect=1.0)
    discovery = in_discovery(means.question, 0.5)
    assert 0.4 < discovery.mean() < 0.6
    changed = means._replace(correct=np.where(discovery, means.correct, ~means.correct))
    first, second = verdict(means), verdict(changed)
    assert dumped(first) == dumped(verdict(means))
    assert first["helpful"] == second["helpful"] and first["harmful"] == second["harmful"]
    for name in first["scores"]:  # so every score is the same, and tells the opposite
        assert first["scores"][name]["auroc"]["value"] == pytest.approx(
            1 - second["scores"][name]["auroc"]["value"]
        )
    assert second["verdict"] == "fail"


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


# -- figures ---------------------------------------------------------------------------------------


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
    for seed in range(60):
        rng = np.random.default_rng(seed)
        question = np.repeat(np.arange(30), 4)
        correct, score = (rng.random(30) < 0.5)[question], rng.normal(size=30)[question]
        of = Scored({SCORE: score}, correct, rng.integers(1, 9, 120), question)
        with StopRequest() as stop:
            p.append(measured(of, SCORE, 60, 0, stop)[SCORE]["p"])
    assert np.mean(np.array(p) < 0.05) <= 0.12
    assert 0.3 < np.mean(p) < 0.7


def test_a_score_without_spread_is_not_significant() -> None:
    of = Scored({SCORE: np.zeros(20)}, np.arange(20) % 2 == 0, np.arange(20), np.arange(20))
    with StopRequest() as stop:
        assert measured(of, SCORE, 40, 0, stop)[SCORE]["p"] == 1.0


# -- the probe -------------------------------------------------------------------------------------


def test_the_probe_is_at_its_losss_minimum() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 4)) * [1, 5, 0.1, 2] + 3
    label = x[:, 0] + 0.3 * rng.normal(size=60) > 3
    found = probe.fit(x, label, 0.1)
    z = (x - x.mean(0)) / x.std(0)

    def loss(parameters: np.ndarray) -> float:
        odds = z @ parameters[:4] + parameters[4]
        return float(
            np.mean(np.log(1 + np.exp(-np.where(label, odds, -odds))))
            + 0.05 * np.sum(parameters[:4] ** 2)
        )

    independent = optimize.minimize(
        loss, np.zeros(5), method="Nelder-Mead", options={"xatol": 1e-6, "maxiter": 20_000}
    )
    np.testing.assert_allclose([*found.w, found.b], independent.x, atol=1e-3)
    np.testing.assert_allclose(found(x), z @ found.w + found.b)
    constant = probe.fit(np.c_[x, np.full(60, 7.0)], label, 0.1)
    assert abs(constant.w[4]) < 1e-12 and np.isfinite(constant(np.c_[x, np.full(60, 8.0)])).all()


@pytest.mark.parametrize(("n", "d"), [(30, 100), (100, 30), (40, 40)])
@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_the_probes_gradient_is_0_with_few_cases_and_with_many(
    n: int, d: int, penalty: float
) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d))
    label = x[:, 0] > 0.2  # separable
    found = probe.fit(x, label, penalty)
    z = (x - found.mean) / found.scale
    rest = 1 / (1 + np.exp(-found(x))) - label
    np.testing.assert_allclose(z.T @ rest / n + penalty * found.w, 0, atol=1e-7)
    assert abs(rest.mean()) < 1e-7


def test_cross_validation_penalises_noise_more_than_signal() -> None:
    rng = np.random.default_rng(6)
    x, label = rng.normal(size=(90, 12)), rng.random(90) < 0.5
    noise = probe.cross_validated(x, label, np.arange(90))
    signal = probe.cross_validated(x, x[:, 0] > 0, np.arange(90))
    assert noise.penalty > signal.penalty
    assert stats.auroc(signal(rng_x := rng.normal(size=(300, 12))), rng_x[:, 0] > 0) > 0.9


# -- the study -------------------------------------------------------------------------------------


def test_the_study_of_the_embedded_model(tiny_study) -> None:
    study = tiny_study(
        "stage_gate", answers={"questions": 80}, discovery=0.5, min_firing=5, draws=100
    )
    outcome = stage_gate(study)
    figures = json.loads(dumped(outcome.figures))
    assert figures["verdict"] in ("pass", "weak", "fail")
    assert figures["verdict"] in outcome.summary[0]
    sides = figures["discovery"], figures["validation"]
    assert sum(side["questions"] for side in sides) == 80
    assert outcome.pictures["auroc"].svg.startswith("<svg")


def test_log_probabilities_are_the_models(tiny_study) -> None:
    study = tiny_study("stage_gate", answers={"questions": 6})
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
    means = made(np.random.default_rng(7), n=100)
    with pytest.raises(SettingError, match=r"answers\.questions"):
        verdict(means._replace(correct=np.ones(100, bool)))
    with pytest.raises(SettingError, match=r"study\.min_firing"):
        verdict(means, Options(0.5, 101, 100))
