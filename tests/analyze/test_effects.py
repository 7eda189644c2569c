"""Effects and their nulls against definitions written out, and against planted data."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse
from scipy import stats as reference

from residual_saes.analyze import stats
from residual_saes.analyze.studies.contrast import effects
from residual_saes.analyze.studies.contrast.effects import Design


def design(correct, question=None, covariates=None, *, paired=False, shuffles=99, seed=0) -> Design:
    n = len(correct)
    question = np.arange(n) if question is None else question
    covariates = np.empty((n, 0)) if covariates is None else covariates
    return Design.of(
        np.asarray(correct, bool), question, covariates, paired=paired, shuffles=shuffles, seed=seed
    )


# -- definitions -----------------------------------------------------------------------------------


def test_shuffling_stays_within_blocks_and_is_uniform() -> None:
    block = np.array([1, 0, 1, 0, 1, 2])
    orders = effects.shuffled(block, 6000, np.random.default_rng(0))
    assert (block[orders] == block).all()
    assert (np.sort(orders, axis=1) == np.arange(6)).all()
    _, counts = np.unique(orders[:, [0, 2, 4]], axis=0, return_counts=True)
    assert len(counts) == 6
    assert reference.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("paired", [False, True])
def test_adjusted_effect_is_that_of_least_squares_and_its_null_is_freedmans_and_lanes(
    paired: bool,
) -> None:
    rng = np.random.default_rng(1)
    question = np.repeat(np.arange(8), 7)
    block = question if paired else np.zeros(56, int)
    correct = rng.permuted(
        np.tile([True, False, False, True, False, False, True], (8, 1)), axis=1
    ).ravel()
    # The second is a question's own, so that only rounding is left of it within questions.
    own = np.log(question + 7.0)
    covariates = np.column_stack([rng.normal(size=56) + correct, own, rng.random(56) < 0.5]).astype(
        float
    )
    x = rng.normal(3, 2, size=(56, 5)) + covariates[:, :1] + question[:, None]
    made = design(correct, question, covariates, paired=paired, shuffles=4)
    assert made.adjusted is not None
    found = made.adjusted.d(x)

    reduced = np.column_stack([np.eye(8)[block], covariates])
    whole = np.column_stack([reduced, correct])
    hat = reduced @ np.linalg.pinv(reduced)
    for row, order in zip(found, made.orders, strict=True):
        shuffled = (
            hat @ x + (x - hat @ x)[np.argsort(order)]
        )  # orders say where labels go, and this moves the rest
        coefficients = np.linalg.pinv(whole) @ shuffled
        freedom = 56 - np.linalg.matrix_rank(whole)
        spread = np.sqrt(np.square(shuffled - whole @ coefficients).sum(0) / freedom)
        np.testing.assert_allclose(
            row, coefficients[-1] / spread * (1 - 3 / (4 * freedom - 1)), rtol=1e-8
        )


def brute_force(x: NDArray[np.float64], made: Design, order: NDArray[np.int64]) -> tuple:
    """A column's t by a regression with residuals that were moved, and its degrees of freedom."""
    blocks = np.eye(made.block.max() + 1)[made.block]
    reduced = np.column_stack([blocks, made.covariates])
    whole = np.column_stack([reduced, made.correct])
    hat = reduced @ np.linalg.pinv(reduced)
    moved = (x - hat @ x)[np.argsort(order)]
    rest = moved - whole @ np.linalg.pinv(whole) @ moved
    label = made.correct - hat @ made.correct
    scores = label * rest
    parts = [np.bincount(made.block, scores) ** 2]
    freedom = [made.block.max()]
    if not made.paired:
        squares = scores**2 / (1 - np.diag(whole @ np.linalg.pinv(whole)))  # HC2
        parts = [squares[made.correct], squares[~made.correct]]
        freedom = [len(part) - 1 for part in parts]
    sums = np.array([part.sum() for part in parts])
    t = label @ moved / np.sqrt(sums.sum())
    return t, sums.sum() ** 2 / np.sum(sums**2 / freedom)


@pytest.mark.parametrize("paired", [False, True])
def test_sizes_have_the_p_values_of_robust_standard_errors(paired: bool) -> None:
    rng = np.random.default_rng(3)
    question = np.repeat(np.arange(9), 5)
    correct = rng.permuted(np.tile([True, False, False, True, False], (9, 1)), axis=1).ravel()
    x = rng.normal(size=(45, 3)) * np.where(correct, 1, 3)[:, None] + correct[:, None]
    covariates = rng.normal(size=(45, 2)) + correct[:, None]
    made = design(correct, question, covariates, paired=paired, shuffles=3)
    assert made.adjusted is not None
    freedom = made.adjusted.freedom
    for row, order in zip(made.adjusted.sizes(x), made.orders, strict=True):
        same = row * made.adjusted.length / (1 - 3 / (4 * freedom - 1))
        for column in range(3):
            t, own = brute_force(x[:, column], made, order)
            assert reference.t.sf(same[column], freedom) == pytest.approx(
                reference.t.sf(t, own), rel=0.02
            )


def test_sizes_of_two_groups_are_welchs_test() -> None:
    rng = np.random.default_rng(4)
    correct = np.arange(40) < 12
    x = rng.normal(0.5 * correct, np.where(correct, 3, 1), (6, 40)).T
    same = design(correct).raw.sizes(x)[0] * np.sqrt(12 * 28 / 40) / (1 - 3 / (4 * 38 - 1))
    welch = reference.ttest_ind(x[correct], x[~correct], equal_var=False)
    np.testing.assert_allclose(2 * reference.t.sf(np.abs(same), 38), welch.pvalue, rtol=0.02)
    even = rng.normal(size=(50, 400)) + 0.5 * (np.arange(50) < 25)[:, None]
    d, sizes = design(np.arange(50) < 25).raw.both(even)
    np.testing.assert_allclose(sizes[0], d[0], rtol=0.05)


def test_without_covariates_and_blocks_an_adjusted_effect_is_cohens_d() -> None:
    rng = np.random.default_rng(2)
    x, correct = rng.normal(size=(30, 4)), rng.random(30) < 0.4
    made = design(correct)
    np.testing.assert_allclose(made.adjusted.d(x), made.raw.d(x), atol=1e-12)
    np.testing.assert_allclose(made.raw.d(x)[0], stats.hedges_g(x, correct))


def test_covariates_that_are_the_labels_leave_nothing_to_compare() -> None:
    correct = np.arange(20) % 2 == 0
    assert design(correct, covariates=correct[:, None] * 3.0).adjusted is None


def test_weighted_effect_is_that_of_repeated_cases() -> None:
    rng = np.random.default_rng(3)
    x, correct = rng.normal(1e5, 1, size=(12, 3)), np.arange(12) < 5
    x[:, 2] = 4.2
    times = effects.drawn(np.arange(12), 20, rng)
    assert (times.sum(1) == 12).all()
    times[0] = correct  # no wrong one
    found = effects.weighted_g(x, times * correct.astype(float), times * (~correct).astype(float))
    assert np.isnan(found[0]).all()
    for row, often in zip(found[1:], times[1:], strict=True):
        cases = np.repeat(np.arange(12), often)
        np.testing.assert_allclose(row, stats.hedges_g(x[cases], correct[cases]), atol=1e-6)


def test_clusters_are_drawn_whole() -> None:
    cluster = np.array([0, 1, 1, 2, 2, 2])
    times = effects.drawn(cluster, 50, np.random.default_rng(0))
    assert (times[:, 1] == times[:, 2]).all() and (times[:, 3] == times[:, 5]).all()
    assert (times[:, [0, 1, 3]].sum(1) == 3).all()


def test_top_of_resampled_cases_is_that_of_their_effects() -> None:
    rng = np.random.default_rng(12)
    x, correct = rng.normal(size=(20, 15)), np.arange(20) % 2 == 0
    times = effects.drawn(np.arange(20), 6, rng)
    for found, often in zip(effects.drawn_top(x, correct, times, 4), times, strict=True):
        cases = np.repeat(np.arange(20), often)
        assert found == pytest.approx(
            np.sort(np.abs(stats.hedges_g(x[cases], correct[cases])))[-4:].mean()
        )


def test_columns_in_parts_are_columns_at_once() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(24, 31)) * (rng.random((24, 31)) < 0.6)
    made = design(rng.random(24) < 0.5, shuffles=19)
    splits = effects.split(made, 5, np.random.default_rng(0))

    def found(values: object, width: int) -> list:
        tested = effects.against_shuffled(values, made.raw, 10, width)
        return [
            *tested,
            *effects.halves(values, splits, 10, width),
            effects.drawn_top(values, made.correct, made.orders, 10, width),
        ]

    at_once = found(x, effects.WIDTH)
    for part, whole in zip(found(sparse.csc_array(x), 7), at_once, strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-12)
    d = np.abs(made.raw.sizes(x))
    assert at_once[2] == pytest.approx(np.sort(d[0])[-10:].mean())
    np.testing.assert_allclose(at_once[3], np.sort(d[1:], axis=1)[:, -10:].mean(1))
    np.testing.assert_allclose(at_once[4], d[1:].max(1))


def test_family_wise_p_counts_the_null() -> None:
    rng = np.random.default_rng(5)
    null, sizes = rng.random(99), np.append(rng.random((4, 5)), 2.0)
    sizes[3] = null[7]
    expected = [stats.permutation_p(size, null) for size in sizes]
    np.testing.assert_allclose(effects.family_wise_p(sizes, null), expected)


# -- halves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
def test_halves_part_questions_and_keep_both_labels(paired: bool) -> None:
    question = np.repeat(np.arange(9), 3) if paired else np.arange(27)
    correct = np.tile([True, False, False], 9)
    made = design(correct, question, paired=paired)
    splits = effects.split(made, 40, np.random.default_rng(0))
    for first, labels, shuffled in zip(*splits, strict=True):
        assert all(len(set(first[question == number])) == 1 for number in question)
        assert abs(2 * len(set(question[first])) - len(set(question))) <= 2
        assert (labels == correct).all()
        for half in (first, ~first):
            assert shuffled[half].sum() == correct[half].sum() > 0
            assert not correct[half].all()
        if paired:
            assert (np.bincount(question, shuffled) == 1).all()
    assert (splits.shuffled != correct).any()


def test_halves_agree_on_what_is_planted_and_on_nothing_else() -> None:
    rng = np.random.default_rng(6)
    correct = rng.random(200) < 0.5
    x = rng.normal(size=(200, 100))
    splits = effects.split(design(correct), 60, np.random.default_rng(0))
    noise = effects.halves(x, splits, 5)
    x[:, :5] += 1.5 * correct[:, None]
    planted = effects.halves(x, splits, 5)
    assert noise.shared < 0.2 and abs(noise.carried) < 0.1 < noise.null_carried_95
    assert planted.shared > 0.99
    assert planted.carried == pytest.approx(1.5, abs=0.15)  # not inflated by having been chosen
    assert planted.null_shared < 0.2 and abs(planted.null_carried) < 0.1

    first, g = splits.first[0], []
    for half in (first, ~first):
        g.append(stats.hedges_g(x[half], correct[half]))
    single = effects.halves(x, effects.Splits(*(part[:1] for part in splits)), 5)
    best = [np.argsort(-np.abs(d))[:5] for d in g]
    assert single.shared == len(set(best[0]) & set(best[1])) / 5
    there = [
        np.mean(np.sign(d[chosen]) * other[chosen])
        for d, other, chosen in zip(g, g[::-1], best, strict=True)
    ]
    assert single.carried == pytest.approx(np.mean(there))


# -- nulls -----------------------------------------------------------------------------------------

LAYERS, N, D = 3, 30, 20


# How many right and wrong answers there are, and how much further the wrong ones spread.
SPREADS = {
    "plain": None,
    "unequal": (136, 64, 1.5),
    "balanced": (50, 50, 2.0),
    "few wrong": (89, 11, 1.0),
    "few wrong, wide": (89, 11, 2.0),
    "few right": (11, 89, 2.0),
}


def null_data(kind: str, rng: np.random.Generator) -> tuple[NDArray[np.float64], Design]:
    """Correlated columns; labels say no more of them than covariates and questions do.

    Of a kind in SPREADS, columns are independent, and wrong answers spread further.
    """
    if of_kind := SPREADS.get(kind):
        right, wrong, spread = of_kind
        correct = np.arange(right + wrong) < right
        covariates = rng.normal(size=(right + wrong, 1))
        x = rng.normal(size=(LAYERS, right + wrong, D)) * np.where(correct, 1, spread)[:, None]
        return x, design(correct, covariates=covariates, seed=int(rng.integers(2**31)))
    question, correct = np.arange(N), rng.permutation(N) < rng.integers(8, 22)
    covariates = rng.normal(size=(N, 2))
    x = rng.normal(size=(LAYERS, N, D)) + rng.normal(size=(LAYERS, N, 1))
    if kind == "confounded":
        correct = covariates[:, 0] + rng.normal(size=N) > 0
        x += covariates[:, 0][:, None]
    if kind == "paired":
        question = np.repeat(np.arange(10), 3)
        correct = np.concatenate(
            [rng.permutation([True, False, rng.random() < 0.5]) for _ in range(10)]
        )
        x += 2 * rng.normal(size=(LAYERS, 10, D))[:, question]
    if kind == "paired, unequal":
        question = np.repeat(np.arange(40), 4)
        correct = np.tile([True, False, False, False], 40)
        x = rng.normal(size=(LAYERS, 160, D)) * np.where(correct, 2, 1)[:, None]
        covariates = rng.normal(size=(160, 1))
    seed = int(rng.integers(2**31))
    return x, design(correct, question, covariates, paired=kind.startswith("paired"), seed=seed)


def false_positives(
    kind: str, effect: str, sets: int, seed: int, top: int = 10, shift: float = 0.0
) -> tuple[int, int]:
    """In how many of `sets` the top |d|, and the largest |d|, exceed 95 % of the joint null.

    Args:
        effect: `raw`, `adjusted`, or `hedges`, which is judged by d itself.
        shift: by which right answers are larger in five columns of one layer.
    """
    rng, counts = np.random.default_rng(seed), np.zeros(2, int)
    for _ in range(sets):
        x, made = null_data(kind, rng)
        x[1, :, :5] += shift * made.correct[:, None]
        by_d = SimpleNamespace(both=lambda part, raw=made.raw: (raw.d(part), raw.d(part)))
        judged_by = by_d if effect == "hedges" else getattr(made, effect)
        found = [effects.against_shuffled(layer, judged_by, top) for layer in x]
        tops = (
            max(tested.top for tested in found),
            np.max([tested.null_top for tested in found], axis=0),
        )
        largest = (
            max(np.abs(tested.sizes).max() for tested in found),
            np.max([tested.null_max for tested in found], axis=0),
        )
        counts += [stats.permutation_p(*tops) <= 0.05, stats.permutation_p(*largest) <= 0.05]
    return int(counts[0]), int(counts[1])


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "effect"),
    [
        ("plain", "raw"),
        ("plain", "adjusted"),
        ("confounded", "adjusted"),
        ("paired", "raw"),
        ("paired", "adjusted"),
        ("unequal", "raw"),
        ("unequal", "adjusted"),
        ("paired, unequal", "raw"),
    ],
)
def test_where_there_is_nothing_five_percent_are_found(kind: str, effect: str) -> None:
    sets = 80 if "unequal" in kind else 250  # of which a third would be found by Hedges' d
    low, high = reference.binom.interval(0.99, sets, 0.05)
    assert all(low <= count <= high for count in false_positives(kind, effect, sets, seed=0))


@pytest.mark.parametrize(
    ("kind", "effect", "sets"),
    [
        ("plain", "raw", 60),
        ("confounded", "adjusted", 30),
        ("unequal", "adjusted", 24),
        ("paired, unequal", "raw", 30),
    ],
)
def test_where_there_is_nothing_little_is_found(kind: str, effect: str, sets: int) -> None:
    most = reference.binom.ppf(0.995, sets, 0.05)
    assert max(false_positives(kind, effect, sets, seed=0)) <= most


def test_by_hedges_d_unequal_spreads_pass_for_findings() -> None:
    """Of as many data sets more than the test before allows."""
    found = false_positives("unequal", "hedges", 24, seed=0)[0]
    assert found > reference.binom.ppf(0.995, 24, 0.05)


def test_unadjusted_a_confounder_is_found() -> None:
    assert min(false_positives("confounded", "raw", 20, seed=1)) > 8


def test_a_planted_direction_is_found_at_its_layer_and_only_there() -> None:
    rng = np.random.default_rng(7)
    correct = rng.random(80) < 0.5
    x = rng.normal(size=(5, 80, 40))
    x[3, :, [4, 9]] += np.array([[1.8], [-1.8]]) * correct
    made = design(correct, covariates=rng.normal(size=(80, 2)), shuffles=199)
    for effect in (made.raw, made.adjusted):
        assert effect is not None
        found = [effects.against_shuffled(layer, effect, 2) for layer in x]
        assert np.argmax([tested.top for tested in found]) == 3
        p = effects.family_wise_p(
            np.abs([tested.sizes for tested in found]),
            np.max([tested.null_max for tested in found], axis=0),
        )
        assert set(zip(*np.nonzero(p <= 0.005), strict=True)) == {(3, 4), (3, 9)}
        assert found[3].d[4] > 1 and found[3].d[9] < -1


# -- features --------------------------------------------------------------------------------------


def sparse_columns(n: int, fired: list[int], rng: np.random.Generator) -> sparse.csc_array:
    x = np.zeros((n, len(fired)))
    for column, count in enumerate(fired):
        x[rng.permutation(n)[:count], column] = rng.exponential(size=count)
    return sparse.csc_array(x)


def p_of(x: sparse.csc_array, made: Design) -> NDArray[np.float64]:
    return effects.rank_p(x, np.diff(x.indptr), made.correct, made.raw)


def test_rank_p_of_dense_columns_is_mann_and_whitneys() -> None:
    rng = np.random.default_rng(8)
    x, correct = sparse_columns(70, [64, 66, 68, 69, 70] * 8, rng), rng.random(70) < 0.5
    exact = reference.mannwhitneyu(
        x.toarray()[correct], x.toarray()[~correct], axis=0, method="asymptotic"
    )
    np.testing.assert_allclose(p_of(x, design(correct, shuffles=999)), exact.pvalue, atol=0.03)


def test_rank_p_of_rare_firing_is_exact_where_the_normal_approximation_is_not() -> None:
    rng = np.random.default_rng(9)
    correct = np.arange(100) >= 10  # a tenth is wrong
    x = (sparse_columns(100, [5] * 400, rng).toarray() > 0).astype(float)
    x[:, 0] = 0
    x[:3, 0] = x[50:52, 0] = 1  # three of five firings among the wrong
    exact = reference.hypergeom.sf(2, 100, 10, 5)
    normal = reference.mannwhitneyu(x[correct, 0], x[~correct, 0], use_continuity=False).pvalue
    found = p_of(sparse.csc_array(x), design(correct, shuffles=999))[0]
    assert found == pytest.approx(exact, rel=0.1)
    assert normal < exact / 40


@pytest.mark.parametrize(
    ("n", "wrong", "fired", "both"), [(37, 17, 9, 2), (50, 20, 16, 3), (61, 30, 12, 3)]
)
def test_rank_p_counts_what_is_as_far_out_as_what_was_seen(
    n: int, wrong: int, fired: int, both: int
) -> None:
    """Of columns that are 0 or 1, it is a hypergeometric count.

    Rounding must not part what is equal.
    """
    correct, x = np.arange(n) >= wrong, np.zeros((n, 1))
    x[:both] = x[wrong : wrong + fired - both] = 1
    seen = reference.hypergeom(n, wrong, fired)
    counts = np.arange(fired + 1)
    far = np.abs(counts - seen.mean()) >= abs(both - seen.mean()) - 1e-9
    found = p_of(sparse.csc_array(np.repeat(x, 200, axis=1)), design(correct, shuffles=4999))
    assert found[0] == pytest.approx(seen.pmf(counts[far]).sum(), rel=0.12)


@pytest.mark.parametrize("sets", [60, pytest.param(200, marks=pytest.mark.long)])
def test_false_discoveries_are_rare_among_features_that_say_nothing(sets: int) -> None:
    rng, any_found = np.random.default_rng(10), 0
    for _ in range(sets):
        x = sparse_columns(40, rng.integers(5, 41, size=50).tolist(), rng)
        made = design(rng.permutation(40) < 30, shuffles=99, seed=int(rng.integers(2**31)))
        any_found += stats.benjamini_hochberg(p_of(x, made)).min() <= 0.05
    assert any_found <= reference.binom.ppf(0.995, sets, 0.05)


def test_planted_features_are_discovered_also_at_equal_length() -> None:
    rng = np.random.default_rng(11)
    length, x = (
        rng.normal(size=120),
        sparse_columns(120, rng.integers(5, 120, size=100).tolist(), rng).toarray(),
    )
    correct = length + rng.normal(size=120) > 0
    x[:, 3] = correct * rng.random(120) + 0.2 * rng.random(120)  # of the label
    x[:, 8] = np.exp(length)  # of the length alone
    made = design(correct, covariates=length[:, None], shuffles=199)
    columns = sparse.csc_array(x)
    fired = np.diff(columns.indptr)
    assert made.adjusted is not None
    raw, adjusted = (
        set(
            np.flatnonzero(
                stats.benjamini_hochberg(effects.rank_p(columns, fired, correct, effect)) <= 0.05
            )
        )
        for effect in (made.raw, made.adjusted)
    )
    assert raw >= {3, 8}
    assert 3 in adjusted and 8 not in adjusted
    assert len(raw) <= 6
