"""Arms of known quality: the dictionary that made the rows, worse ones, and equal ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from residual_saes.analyze.stats import bootstrap_ratio
from residual_saes.analyze.studies.sweep import ranking, words
from residual_saes.analyze.studies.sweep import reading as study
from residual_saes.analyze.studies.sweep.arms import find, read_all
from residual_saes.analyze.studies.sweep.comparison import sweep
from residual_saes.analyze.studies.sweep.ranking import compare
from residual_saes.analyze.studies.sweep.reading import Measured
from residual_saes.data.rows import summary
from residual_saes.data.rows.split import held_out_units
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.text.packing import Cursor
from residual_saes.train import sae, sae_file
from residual_saes.train.run import CONFIG
from tests.conftest import BOS, commit, make_manifest, make_spine

N, D, K, UNIT, CONTEXT, NOISE = 8192, 16, 3, 256, 32, 0.05
CPU = torch.device("cpu")


class Planted(NamedTuple):
    """A store whose rows are sums of K of D orthonormal directions, and noise."""

    store: Store
    rows: NDArray[np.float64]  # (N, D) as stored, in spine order
    documents: NDArray[np.int64]  # (N,)
    bos: NDArray[np.bool_]
    directions: torch.Tensor  # (D, D)


def planted_store(
    path: Path, layers: tuple[int, ...] = (3,), seed: int = 0, documents: int = 160
) -> Planted:
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    chosen = torch.rand(N, D, generator=generator).argsort(1) < K
    codes = chosen * (1 + 2 * torch.rand(N, D, generator=generator))
    rows = 5 + codes @ directions + NOISE * torch.randn(N, D, generator=generator)
    bits = rows.bfloat16().view(torch.uint16).numpy()
    tokens, document = make_spine(N // CONTEXT, CONTEXT, rng)
    document = document % documents  # documents go on in other units
    shape = {"tokens": N, "context": CONTEXT, "unit": UNIT, "chunk": 32}
    store = Store.open_or_create(path, {**make_manifest(D, **shape), "seed": 7 + seed})
    per_unit = UNIT // CONTEXT
    for unit in range(N // UNIT):
        part = slice(unit * per_unit, (unit + 1) * per_unit)
        store.commit_spine(unit, tokens[part], document[part], Cursor(part.start, 0, None))
    store.close_spine(SpineEnd(N // CONTEXT, ended_early=False))
    for unit in range(store.units):
        commit(store, unit, dict.fromkeys(layers, bits[unit * UNIT : (unit + 1) * UNIT]))
    for layer in layers:
        summary.write(store, layer)
    store.declare(list(layers))
    stored = torch.from_numpy(bits).view(torch.bfloat16).double().numpy()
    return Planted(
        store, stored, document.ravel().astype(np.int64), tokens.ravel() == BOS, directions
    )


def planted_sae(planted: Planted, noise: float = 0.0, without: int | None = None) -> sae.SAE:
    """The dictionary that made the rows, with noise in its decoder or one direction missing."""
    W_dec = planted.directions + noise * torch.randn(
        D, D, generator=torch.Generator().manual_seed(1)
    )
    if without is not None:
        W_dec[without] = 0
    return sae.SAE.of(
        planted.directions.T.contiguous(), W_dec, torch.zeros(D), torch.full((D,), 5.0), K
    )


def make_arm(root: Path, name: str, planted: Planted, made: sae.SAE | None, **changes: Any) -> Path:
    """A run directory as training leaves it; without an SAE, as it is before the end."""
    run = root / name
    run.mkdir(parents=True)
    dotted = {
        "optim.lr": 1e-3,
        "sae.aux_coef": 0.0,
        "sae.d_sae": D,
        "sae.k": K,
        "seed": 0,
        "layer": 3,
    }
    dotted |= {
        "tokens": 1024,
        "batch": 64,
        "policy.drop_bos": True,
        "policy.drop_outliers": True,
        **changes,
    }
    settings: dict[str, Any] = {"store": {"identity": planted.store.identity}}
    for key, value in dotted.items():
        group, _, last = key.rpartition(".")
        (settings.setdefault(group, {}) if group else settings)[last] = value
    whole = {
        "settings": settings,
        "store_path": planted.store.name,
        "steps": 16,
        "environment": {"torch": "x"},
    }
    (run / CONFIG).write_text(yaml.safe_dump(whole, sort_keys=False))
    ve = {
        "variance_explained": 0.5,
        "mse": 1.0,
        "l0": 3.0,
        "coverage": 0.75,
        "dead": 1,
        "dead_share": 0.125,
    }
    ve["lr"] = dotted["optim.lr"]
    steps = (1, 8, 16) if made else (1, 8)
    lines = [
        {"split": split, "step": step, "tokens": 64 * step, **ve}
        for step in steps
        for split in ("train", "held_out")
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "timings.jsonl").write_text('{"step":16,"tokens_per_s":12345}\n')
    if made:
        sae_file.write_final(made, 1.0, run)
    return run


ARMS = {
    "planted": {},
    "copy": {},
    "noisy": {"noise": 0.02},
    "noisier": {"noise": 0.1},
    "gap_0": {"without": 0},
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_store(tmp_path_factory.mktemp("planted") / "s.zarr")


@pytest.fixture(scope="module")
def folder(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    for number, (name, how) in enumerate(ARMS.items()):
        make_arm(
            root, name, planted, planted_sae(planted, **how), **{"optim.lr": 10.0 ** -(number + 1)}
        )
    make_arm(root, "unfinished", planted, None)
    return root


def run_sweep(runs: str | list[str], **options: Any) -> dict[str, Any]:
    read, damaged = read_all(find(runs))
    return sweep(read, damaged, options.get("store"), options.get("limit", 10**6), CPU)


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    return run_sweep(f"{folder}/*")


def by_name(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for layer in figures["layers"] for arm in layer["arms"]}


def dense_sums(planted: Planted, made: sae.SAE) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each held-out document's |e|^2 and |x - mu|^2 without BOS, by dense float64 arithmetic."""
    held = np.isin(np.arange(N) // UNIT, held_out_units(planted.store))
    mean = planted.rows[~held & ~planted.bos].mean(0)
    x, documents = planted.rows[held & ~planted.bos], planted.documents[held & ~planted.bos]
    W_enc, W_dec, b_enc, b_dec = (tensor.double().numpy() for tensor in made.tensors().values())
    pre = (x - b_dec) @ W_enc + b_enc
    f = np.where(pre >= np.sort(pre, axis=1)[:, -K][:, None], np.maximum(pre, 0), 0)
    error, about = ((x - f @ W_dec - b_dec) ** 2).sum(1), ((x - mean) ** 2).sum(1)
    each = [documents == document for document in np.unique(documents)]
    return np.array([error[mask].sum() for mask in each]), np.array(
        [about[mask].sum() for mask in each]
    )


# -- the comparison --------------------------------------------------------------------------------


def test_every_arm_against_its_definition(figures: dict[str, Any], planted: Planted) -> None:
    found = by_name(figures)
    best = dense_sums(planted, planted_sae(planted))[0]
    for name, how in ARMS.items():
        error, about = dense_sums(planted, planted_sae(planted, **how))
        assert found[name]["variance_explained"] == pytest.approx(
            1 - error.sum() / about.sum(), rel=1e-6
        )
        low, high = bootstrap_ratio(error, about)
        assert found[name]["variance_explained_95"] == pytest.approx([1 - high, 1 - low], rel=1e-6)
        assert found[name]["behind_best"] == pytest.approx(
            (error - best).sum() / about.sum(), rel=1e-4, abs=1e-9
        )
        low, high = found[name]["behind_best_95"]
        assert (low + high) / 2 == pytest.approx(found[name]["behind_best"], abs=1e-12)
        alone = bootstrap_ratio(error - best, about)  # simultaneous intervals are wider than this
        assert alone is not None
        assert 1 <= (high - low + 1e-9) / (alone.high - alone.low + 1e-9) < 2.5
    assert figures["layers"][0]["documents"] == len(best)
    assert (
        figures["layers"][0]["rows"]
        == (~planted.bos)[np.isin(np.arange(N) // UNIT, held_out_units(planted.store))].sum()
    )


def test_the_planted_dictionary_explains_what_it_must(figures: dict[str, Any]) -> None:
    """Noise in the D - K directions that are not kept is lost, and nothing else."""
    # A code is uniform from 1 to 3 in K of D directions.
    share = K / D
    mean = 2.0
    mean_square = 13 / 3
    variance = D * (share * mean_square - (share * mean) ** 2 + NOISE**2)
    bfloat16 = D * 7**2 / 12 * 2.0**-16  # rounding of values around 5 by steps of 2^-5: at most
    explained = by_name(figures)["planted"]["variance_explained"]
    assert 1 - explained == pytest.approx(
        (D - K) * NOISE**2 / variance, abs=1.5 * bfloat16 / variance, rel=0.1
    )


def test_the_order_and_what_cannot_be_told_apart(figures: dict[str, Any]) -> None:
    (layer,) = figures["layers"]
    assert [arm["name"] for arm in layer["arms"]] == [
        "copy",
        "planted",
        "noisy",
        "gap_0",
        "noisier",
        "unfinished",
    ]
    assert layer["best"] == "copy"  # equal ones by name
    assert layer["not_distinguishable"] == ["planted"]
    found = by_name(figures)
    assert found["planted"]["behind_best_95"] == [0.0, 0.0]
    assert found["planted"]["first_share"] == found["copy"]["first_share"] == 0.5
    assert found["noisy"]["first_share"] == 0
    assert (
        found["unfinished"]["first_share"] is found["unfinished"]["variance_explained_95"] is None
    )
    assert figures["settings"] == ["optim.lr"]


def simulated(rng: np.random.Generator, gaps: list[float], n: int = 60) -> Measured:
    """Documents of very different difficulty, the same for all arms, which differ as given."""
    about = rng.uniform(1, 3, n)
    difficulty = about * rng.uniform(0.1, 0.5, n)
    errors = {
        f"{i}": difficulty + gap * about + rng.normal(0, 0.02, n) for i, gap in enumerate(gaps)
    }
    return Measured(1000, about, errors)


def test_intervals_of_differences_cover_a_planted_truth() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        found = compare(simulated(rng, [0.0, 0.05]), draws=100)
        assert list(found) == ["0", "1"]
        low, high = found["1"].behind_interval
        covered += low <= 0.05 <= high
        marginal = found["1"].interval
        assert high - low < 0.3 * (
            marginal[1] - marginal[0]
        )  # what makes a document hard for both cancels
        assert low > 0
    assert 89 <= covered <= 100  # 95 % of 100, with sampling error


def test_equal_arms_are_seldom_told_apart() -> None:
    rng, alike, firsts = np.random.default_rng(1), 0, []
    for _ in range(100):
        best, other = compare(simulated(rng, [0.0, 0.0]), draws=100).values()
        alike += other.behind_interval[0] <= 0
        firsts.append(best.first_share)
        assert best.first_share + other.first_share == pytest.approx(1)
        assert best.behind_interval == [0.0, 0.0]
    assert 89 <= alike <= 100
    assert 0.5 <= np.mean(firsts) < 0.95  # the winner of equals is not sure of it


def test_equal_arms_share_the_places_that_they_take() -> None:
    measured = simulated(np.random.default_rng(2), [0.0, 0.001, 0.5, 0.001])
    measured.squared_error["3"] = measured.squared_error["1"]
    found = compare(measured)
    assert list(found) == ["0", "1", "3", "2"]
    assert 0 < found["1"].first_share == found["3"].first_share
    assert sum(standing.first_share for standing in found.values()) == pytest.approx(1)


def equal_arms(seed: int, arms: int, documents: int, better: float = 0.0) -> Measured:
    """Arms of the same quality, but for the first, on documents of very different length."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(20, 400, documents)
    about = rows * rng.gamma(5, 0.2, documents)
    base = 0.1 * about * rng.gamma(8, 1 / 8, documents)
    errors = {}
    for arm in range(arms):
        errors[f"a{arm}"] = base * (1 + 0.05 * rng.normal(size=documents))
    errors["a0"] *= 1 - better
    return Measured(int(rows.sum()), about, errors)


def told(measured: Measured, draws: int, labels: Any = None) -> list[str]:
    found = compare(measured, labels, draws)
    return [name for name, standing in found.items() if standing.is_told]


def test_none_of_nine_equal_arms_is_told_from_the_best() -> None:
    """Judged pair by pair, one is in 70 of 100 data sets: the best of nine is chosen."""
    alarms = sum(bool(told(equal_arms(seed, 9, 100), 60)) for seed in range(40))
    assert alarms <= 6  # 5 % of 40, with sampling error
    measured = equal_arms(0, 9, 100, better=0.1)
    found = compare(measured, draws=200)
    assert next(iter(found)) == "a0" and len(told(measured, 200)) == 8


@pytest.mark.long
@pytest.mark.parametrize("documents", [30, 300])
@pytest.mark.parametrize("arms", [2, 9, 20])
def test_equal_arms_are_told_apart_as_often_as_the_level_says(arms: int, documents: int) -> None:
    alarms = sum(bool(told(equal_arms(seed, arms, documents), 200)) for seed in range(300))
    assert alarms <= 27  # 5 % of 300 is 15, with sampling error


def test_variances_of_differences_are_those_of_their_linear_terms() -> None:
    rng = np.random.default_rng(4)
    sums, total, times = rng.random((3, 7)), rng.random(7) + 1, rng.integers(0, 3, 7).astype(float)
    r, variance = ranking.differences(sums, total, times)
    for a, b in ((0, 1), (2, 0)):
        ratio = times @ (sums[a] - sums[b]) / (times @ total)
        terms = sums[a] - sums[b] - ratio * total
        assert r[a, b] == pytest.approx(ratio)
        assert variance[a, b] == pytest.approx(
            7 / 6 * (times @ terms**2) / (times @ total) ** 2, rel=1e-9
        )
    assert np.diag(variance) == pytest.approx(0, abs=1e-15)


def with_seeds(values: dict[str, list[float]]) -> tuple[Measured, dict[str, tuple[str, str]]]:
    """Arms that explain these shares, by setting and seed, on 80 documents."""
    rng = np.random.default_rng(1)
    about = rng.uniform(1, 3, 80)
    errors, labels = {}, {}
    for setting, explained in values.items():
        for seed, value in enumerate(explained):
            noise = rng.normal(0, 0.002, 80) * about
            errors[f"{setting}{seed}"] = (1 - value) * about + noise - noise.mean()
            labels[f"{setting}{seed}"] = (setting, str(seed))
    return Measured(1000, about, errors), labels


def test_one_lucky_seed_tells_no_settings_apart() -> None:
    measured, labels = with_seeds({"a": [0.80, 0.80, 0.86], "b": [0.80, 0.801, 0.80]})
    assert told(measured, 100, labels) == []
    assert "b0" in told(measured, 100)  # as runs they can be told apart, which is of that seed only
    found = compare(measured, labels, 100)
    assert next(iter(found)) == "a2" and {found[f"a{i}"].seeds for i in range(3)} == {3}
    assert found["b0"].behind_interval == found["b2"].behind_interval
    assert found["a0"].mean == pytest.approx(0.82, abs=1e-3)
    crowd = {f"{n}": [0.80, 0.8005] for n in range(8)}  # their calm seeds do not hide it
    measured, labels = with_seeds({"x": [0.80, 0.90], **crowd})
    assert told(measured, 100, labels) == []


def test_settings_that_differ_more_than_their_seeds_are_told_apart() -> None:
    measured, labels = with_seeds({"a": [0.86, 0.861, 0.859], "b": [0.80, 0.801, 0.80]})
    assert sorted(told(measured, 100, labels)) == ["b0", "b1", "b2"]


def test_two_seeds_are_few() -> None:
    """t with one degree of freedom: 12.7 deviations at 95 %, and more for the larger variance."""
    pair = ranking.Settings.of([("a", "0"), ("a", "1"), ("b", "0")])
    assert pair.counts.tolist() == [2, 1]
    assert ranking.seed_quantile(pair, 0) == pytest.approx(12.7, rel=0.1)
    same = ranking.Settings.of([("a", "0"), ("a", "0"), ("b", "0")])
    assert same.counts.tolist() == [1, 1]  # a run done twice is one seed
    assert same.of_arms.tolist() == [[0.5, 0.5, 0], [0, 0, 1]]


@pytest.mark.long
def test_equal_settings_with_seeds_are_told_apart_as_often_as_the_level_says() -> None:
    for settings, seeds in ((2, 2), (2, 3), (5, 3)):
        alarms = 0
        for trial in range(200):
            rng = np.random.default_rng([settings, seeds, trial])
            drawn = {
                str(n): (0.8 + 0.01 * rng.normal(size=seeds)).tolist() for n in range(settings)
            }
            measured, labels = with_seeds(drawn)
            alarms += bool(told(measured, 60, labels))
        assert alarms <= 18  # 5 % of 200 is 10, with sampling error


@pytest.mark.parametrize("documents", [1, 2])
def test_too_few_documents_tell_nothing_apart(documents: int) -> None:
    found = compare(equal_arms(0, 3, documents, better=0.5), draws=50)
    best, *others = found.values()
    assert not any(standing.is_told for standing in others)
    assert {standing.behind_interval for standing in others} == {None}
    assert (best.interval is None) == (documents == 1)


def test_every_unit_is_read_once_for_all_arms(
    folder: Path, planted: Planted, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real: Callable[..., Any] = Store.residuals
    monkeypatch.setattr(
        Store,
        "residuals",
        lambda self, layer, unit: (read.append(unit), real(self, layer, unit))[1],
    )
    opened: list[Any] = []
    real_open = Store.open.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Store, "open", classmethod(lambda cls, at: (opened.append(at), real_open(cls, at))[1])
    )
    assert run_sweep(f"{folder}/*") == figures
    assert sorted(read) == held_out_units(planted.store)
    assert len(opened) == 1
    read.clear()
    monkeypatch.setattr(
        study, "free_bytes", lambda device: 1
    )  # each SAE in a reading of its own, the same figures
    assert run_sweep(f"{folder}/*") == figures
    assert len(read) == len(ARMS) * len(held_out_units(planted.store))
    assert run_sweep(f"{folder}/*", limit=1)["layers"][0]["rows"] < UNIT


def test_groups_fit_the_budget(folder: Path) -> None:
    read = [arm for arm in read_all(find(str(folder)))[0] if arm.finished]
    size = (folder / "planted" / sae_file.FILE).stat().st_size
    assert [len(group) for group in study.groups(read, 2 * size + 100)] == [2, 2, 1]
    assert [len(group) for group in study.groups(read, 10 * size)] == [5]


def test_policies_meet_on_the_rows_of_all(
    tmp_path: Path, planted: Planted, figures: dict[str, Any]
) -> None:
    make_arm(tmp_path, "a", planted, planted_sae(planted), **{"policy.drop_bos": False})
    make_arm(tmp_path, "b", planted, planted_sae(planted))
    (layer,) = run_sweep(str(tmp_path))["layers"]
    assert [arm["variance_explained"] for arm in layer["arms"]] == [
        by_name(figures)["planted"]["variance_explained"]
    ] * 2
    assert not layer["one_policy"]
    assert words.verdict(layer, str) != words.verdict({**layer, "one_policy": True}, str)


def test_seeds_say_what_a_difference_is_worth(
    tmp_path: Path, planted: Planted, figures: dict[str, Any]
) -> None:
    assert figures["layers"][0]["seed_spread"] is None
    for seed, noise in ((0, 0.0), (1, 0.02)):
        make_arm(tmp_path, f"{seed}", planted, planted_sae(planted, noise), seed=seed)
    make_arm(tmp_path, "other", planted, planted_sae(planted, 0.1), **{"optim.lr": 0.5})
    (layer,) = run_sweep(str(tmp_path))["layers"]
    first, second, _ = layer["arms"]
    assert layer["seed_spread"] == first["variance_explained"] - second["variance_explained"] > 0
    assert f"{layer['seed_spread']:.5f}" in " ".join(words.verdict(layer, str))


def test_where_one_document_gives_no_interval_the_best_is_to_be_taken(tmp_path: Path) -> None:
    planted = planted_store(tmp_path / "s.zarr", documents=1)
    for lr, (name, noise, dead) in enumerate((("a", 0.1, "0.25"), ("b", 0.0, "0.5")), 1):
        made = planted_sae(planted, noise)
        metrics = make_arm(tmp_path, name, planted, made, **{"optim.lr": lr / 10}) / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("0.125", dead))
    (layer,) = run_sweep(f"{tmp_path}/a,{tmp_path}/b")["layers"]
    assert layer["best"] == layer["choice"] == "b" and layer["not_distinguishable"] == ["a"]
    assert "Harvest more documents" in " ".join(words.verdict(layer, str))


def test_of_equal_arms_the_one_with_fewest_dead_latents_is_to_be_taken(
    tmp_path: Path, planted: Planted
) -> None:
    dead = {"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.0}
    for lr, (name, share) in enumerate(dead.items(), 1):
        made = planted_sae(planted, 0.1 if name == "d" else 0.0)
        run = make_arm(tmp_path, name, planted, made, **{"optim.lr": lr / 10})
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("0.125", str(share)))
    (layer,) = run_sweep(str(tmp_path))["layers"]
    assert layer["best"] == "a" and layer["choice"] == "b"  # d can be told from the best
    assert [arm["name"] for arm in layer["arms"]] == ["b", "c", "a", "d"]
    text = " ".join(words.verdict(layer, str))
    assert "take b" in text and "dead latents (25.0%)" in text
    share = layer["left_out"]["drop_bos"]
    assert f"{share['count']:,} rows: {share['rows']:.3%} of rows" in text and share["count"]


def test_a_setting_is_the_mean_of_its_seeds(tmp_path: Path, planted: Planted) -> None:
    for lr, noises in ((0.1, (0.0, 0.1)), (0.2, (0.03, 0.03))):
        for seed, noise in enumerate(noises):
            made = planted_sae(planted, noise)
            make_arm(tmp_path, f"{lr},{seed}", planted, made, **{"optim.lr": lr}, seed=seed)
    (layer,) = run_sweep(str(tmp_path))["layers"]
    found = {arm["name"]: arm for arm in layer["arms"]}
    pair = [found["0.2,0"], found["0.2,1"]]
    assert layer["best"] in found and layer["seed_freedom"] == 2
    assert {arm["seeds"] for arm in layer["arms"]} == {2}
    mean = np.mean([arm["variance_explained"] for arm in pair])
    assert pair[0]["setting_mean"] == pytest.approx(mean)
    assert len(layer["not_distinguishable"]) == 3  # one lucky seed
    text = " ".join(words.verdict(layer, str))
    assert "2 seeds more than settings" in text and "2 seeds:" in text


def test_layers_are_not_compared(tmp_path: Path) -> None:
    both = planted_store(tmp_path / "s.zarr", layers=(3, 4))
    for layer, noise in ((3, 0.0), (3, 0.05), (4, 0.05), (4, 0.1)):
        make_arm(
            tmp_path / "runs", f"L{layer}_{noise}", both, planted_sae(both, noise), layer=layer
        )
    found = run_sweep(f"{tmp_path}/runs")
    assert [(layer["layer"], layer["best"]) for layer in found["layers"]] == [
        (3, "L3_0.0"),
        (4, "L4_0.05"),
    ]
    assert [len(layer["arms"]) for layer in found["layers"]] == [2, 2]
