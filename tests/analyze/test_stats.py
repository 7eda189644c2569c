"""The shared statistics against published answers, scipy, and the definitions written out."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats as reference

from residual_saes.analyze import stats


def test_wilson_against_its_formula() -> None:
    n, p, z = 50, 0.48, 1.959963984540054
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = stats.wilson(24, 50)
    assert (low, high) == pytest.approx(
        [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    )
    assert stats.wilson(0, 0) == (0, 1)
    assert stats.wilson(0, 10)[0] == 0


def test_mcnemar_of_the_reference_cards_table() -> None:
    assert stats.mcnemar(3, 9) == pytest.approx(0.146, abs=5e-4)  # +15
    assert stats.mcnemar(1, 1) == 1
    assert stats.mcnemar(0, 0) == 1
    assert stats.mcnemar(5, 0) == pytest.approx(2 * 0.5**5)


def test_overlap_of_the_reference_cards_recovery_sets() -> None:
    assert stats.overlap_p(25, 5, 5, 3) == pytest.approx(0.038, abs=5e-4)
    assert stats.overlap_p(25, 5, 5, 0) == 1
    draws = np.random.default_rng(0).permuted(np.tile(np.arange(12), (20_000, 1)), axis=1)
    shared = (draws[:, :5] < 4).sum(1)  # 5 of 12, among which 4 are marked
    assert stats.overlap_p(12, 4, 5, 2) == pytest.approx((shared >= 2).mean(), abs=0.015)


def test_holm_and_benjamini_hochberg_of_a_worked_example() -> None:
    p = [0.04, 0.01, 0.03, 0.005]
    np.testing.assert_allclose(stats.holm(p), [0.06, 0.03, 0.06, 0.02])
    np.testing.assert_allclose(stats.benjamini_hochberg(p), [0.04, 0.02, 0.04, 0.02])
    assert len(stats.holm([])) == len(stats.benjamini_hochberg([])) == 0


def test_hedges_g_of_a_worked_example() -> None:
    first, second = np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0, 2.0])
    pooled = np.sqrt((2 * 4.0 + 3 * (2 / 3)) / 5)
    x, label = np.concatenate([first, second])[:, None], np.array([True] * 3 + [False] * 4)
    assert stats.hedges_g(x, label)[0] == pytest.approx((4 - 2) / pooled * (1 - 3 / 19))


def test_hedges_g_of_many_labels_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal([1e6, 0, 3], [1, 1e-2, 5], size=(40, 3))
    x = np.column_stack([x, np.full(40, 7.1)])  # without spread
    labels = rng.random((30, 40)) < 0.3
    found = stats.hedges_g_of_labels(x, labels)
    for label, row in zip(labels, found, strict=True):
        first, second = x[label, :3], x[~label, :3]
        within = (len(first) - 1) * first.var(0, ddof=1) + (len(second) - 1) * second.var(0, ddof=1)
        expected = (first.mean(0) - second.mean(0)) / np.sqrt(within / 38) * (1 - 3 / 151)
        np.testing.assert_allclose(row[:3], expected, atol=1e-6)
    assert not found[:, 3].any()


def test_auroc_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 6, 40), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    assert stats.auroc(score, label) == pytest.approx(np.mean(pairs))
    assert np.isnan(stats.auroc(score, np.ones(40, bool)))


def test_rank_correlations() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 200))
    assert stats.spearman(x, x + noise) == pytest.approx(
        reference.spearmanr(x, x + noise).statistic
    )
    assert np.isnan(stats.spearman(x, np.ones(200)))


def test_the_cap_of_spearman_is_the_most_that_any_labels_reach() -> None:
    rng = np.random.default_rng(2)
    scores = [np.zeros(7), np.arange(7), *rng.integers(0, 4, (12, 7)), [0] * 6 + [1]]
    for score in scores:
        for right in range(8):
            reached = []
            for chosen in combinations(range(7), right):
                reached.append(stats.spearman(score, np.isin(np.arange(7), chosen)))
            found = stats.spearman_cap(score, np.arange(7) < right)
            np.testing.assert_allclose(found, max(reached), atol=1e-12)  # NaN is NaN
    assert np.isnan(stats.spearman_cap(np.zeros(7), np.arange(7) < 3))


def test_the_cap_of_a_score_without_ties_is_a_formula() -> None:
    right = np.arange(100) < 89
    cap = stats.spearman_cap(np.arange(100), right)
    assert cap == pytest.approx(np.sqrt(3 * 0.89 * 0.11) * 100 / np.sqrt(9999))
    assert stats.spearman(np.arange(100)[::-1], right) == pytest.approx(cap)


def test_permutation_p_counts_the_data_themselves() -> None:
    assert stats.permutation_p(5.0, np.arange(9)) == pytest.approx((1 + 4) / 10)
    assert stats.permutation_p(50.0, np.arange(9)) == pytest.approx(1 / 10)


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        x = rng.exponential(size=60)
        low, high = stats.bootstrap(lambda cases, x=x: x[cases].mean(), 60, draws=300, seed=trial)[
            0
        ]
        covered += low <= 1 <= high
    assert (
        0.88 <= covered / 200 <= 0.98
    )  # percentile intervals of 60 skewed values cover a little less


def test_bootstraps_of_ratio_and_of_statistic_agree_and_repeat() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(30), rng.random(30) + 1
    ratio = stats.bootstrap_ratio(a, b, seed=3)
    interval, values = stats.bootstrap(lambda cases: a[cases].sum() / b[cases].sum(), 30, seed=3)
    assert ratio == pytest.approx(interval)
    assert len(values) == 1000
    assert stats.bootstrap_ratio(a, b, seed=4) != ratio
    assert np.isnan(stats.percentiles(np.array([np.nan])).low)


def test_bootstrap_ratios_are_bootstrap_ratio_column_by_column() -> None:
    rng = np.random.default_rng(0)
    numerators, denominators = rng.normal(size=(30, 3)), rng.uniform(1, 4, (30, 3))
    every = stats.bootstrap_ratios(numerators, denominators, draws=50, seed=3)
    first = stats.bootstrap_ratios(numerators, denominators[:, 0], draws=50, seed=3)
    for column in range(3):
        for found, by in ((every[column], column), (first[column], 0)):
            alone = stats.bootstrap_ratio(
                numerators[:, column], denominators[:, by], draws=50, seed=3
            )
            assert found == pytest.approx(alone) and found.low < found.high


def test_one_cluster_has_no_interval() -> None:
    """All its resamples are the same, which is no interval of width 0."""
    one = np.ones(1)
    assert stats.bootstrap_ratio(one, 2 * one) is None
    assert stats.bootstrap_ratios(np.ones((1, 2)), one) == [None, None]
    assert stats.bootstrap(lambda cases: float(cases.sum()), 1)[0] is None
    rows = np.array([1.0, 2.0])
    assert stats.variance_explained([7, 7], rows, 2 * rows) == (0.5, None)
    assert stats.formatted(stats.figure(0.5, None), ".2f") == "0.50 [no interval]"


def test_a_sentence_says_what_few_clusters_are_worth() -> None:
    for count, words in ((1, "one prompt"), (2, "2 prompts"), (4, "4 prompts")):
        sentence = stats.resampled(count, "prompt")
        assert words in sentence and ("narrow" in sentence) == (count > 1)
    assert stats.resampled(5, "prompt") == "Brackets are 95% intervals from resampling 5 prompts."


def test_detectable_change_is_found_as_often_as_it_says() -> None:
    """The published figures, and McNemar's test on drawn pairs."""
    found = [stats.detectable_change(pairs, 0.2) for pairs in (50, 200, 1319)]
    assert found == pytest.approx([0.17, 0.088, 0.034], abs=5e-3)
    assert [f"{100 * change:.0f}" for change in found[:1]] + [
        f"{100 * change:.1f}" for change in found[1:]
    ] == ["17", "8.8", "3.4"]
    rng, pairs, share = np.random.default_rng(0), 400, 0.3
    change = stats.detectable_change(pairs, share)
    drawn = rng.multinomial(
        pairs, [(share + change) / 2, (share - change) / 2, 1 - share], size=4000
    )
    z = (drawn[:, 0] - drawn[:, 1]) / np.sqrt(drawn[:, 0] + drawn[:, 1])
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)
    assert np.isnan(stats.detectable_change(10, 0.1))  # one pair that changes proves nothing
    assert np.isnan(stats.detectable_change(100, 0.0))
