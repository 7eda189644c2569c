"""Transcoders and crosscoders as studies see them, on planted rows whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.analyze import linear, refusals
from residual_saes.analyze.studies import quality as study
from residual_saes.analyze.studies.sweep import arms
from residual_saes.analyze.studies.sweep.comparison import sweep
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows.split import training_units
from residual_saes.data.site import HookPoint
from residual_saes.data.store.kinds import OUTLIER
from residual_saes.data.store.store import Store
from residual_saes.harvest.model import ModelConfig
from residual_saes.train.sae import SAE, SAEConfig
from tests.analyze.conftest import add_points, make_run, random_rows, write_run
from tests.conftest import make_store

N, D, OUT, LAYER = 1024, 12, 12, 3
LONG = 200  # a token
CPU = torch.device("cpu")
THRESHOLD = 1.5


def planted_mlp(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64], torch.Tensor]:
    """What an MLP reads (N, D), what it writes (N, OUT), and its output directions (D, OUT).

    It writes direction i as strongly as column i is above 1.5: no linear map does that.
    """
    rng = np.random.default_rng(seed)
    x = (rng.random((N, D)) < 0.3) * rng.uniform(0.5, 3, (N, D))
    x = rounded(x)
    directions = rng.normal(size=(D, OUT))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    y = np.maximum(x - THRESHOLD, 0) @ directions + 0.5
    return x, rounded(y), torch.from_numpy(directions).float()


def rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return torch.from_numpy(values).bfloat16().double().numpy()


def bits_of(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def transcoder(directions: torch.Tensor) -> SAE:
    """The planted MLP, exactly."""
    b_enc = torch.full((D,), -THRESHOLD)
    b_dec = torch.full((OUT,), 0.5)
    return SAE.of(torch.eye(D), directions, b_enc, b_dec, D, b_in=torch.zeros(D))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def store(root: Path) -> Store:
    """The planted MLP at layer 3; at layer 5 each token has another token's output, and one is
    1,000 times as long.
    """
    x, y, _ = planted_mlp()
    other = y[np.random.default_rng(1).permutation(N)]
    other[LONG] *= 1000
    made = make_store(root / "s.zarr", bits_of(x), context=32, unit=128, chunk=32, layer=LAYER)
    written = {"mlp_out_3": bits_of(y), "mlp_out_5": bits_of(other)}
    return add_points(made, {"mlp_in_3": bits_of(x), "mlp_in_5": bits_of(x), **written})


def run_of(root: Path, store: Store, layer: int, sae: SAE) -> Subject:
    config = SAEConfig(d_sae=D, k=D, k_aux=4, dead_after=1000, kind="transcoder")
    write_run(root / f"run_{layer}", store, layer, config, sae, site="mlp_in")
    return Subject.open(root / f"run_{layer}", None, CPU)


@pytest.fixture(scope="module")
def mlp(root: Path, store: Store) -> Subject:
    return run_of(root, store, LAYER, transcoder(planted_mlp()[2]))


@pytest.fixture(scope="module")
def shuffled(root: Path, store: Store) -> Subject:
    return run_of(root, store, 5, transcoder(planted_mlp()[2]))


def held_out(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read and written of the held-out rows as trained."""
    read, written = [], []
    for unit in subject.rows(10**6):
        chosen = torch.from_numpy(unit.of_kinds(subject.policy.kinds))
        read.append(unit.rows[chosen])
        written.append(unit.targets[chosen])
    return torch.cat(read).double(), torch.cat(written).double()


# -- what is read and written ----------------------------------------------------------------------


def test_an_sae_of_resid_post_is_what_it_was(tmp_path: Path) -> None:
    made = make_run(tmp_path, random_rows())
    subject = Subject.open(made.run, None, CPU)
    assert (subject.noun, subject.layer, subject.label) == ("SAE", LAYER, "L3")
    assert subject.recorded == {"layer": LAYER, "store": made.store.identity}
    unit = subject.unit(0)
    assert unit.rows is unit.targets and subject.scaled(unit.rows) is unit.rows
    assert subject.where == "layer 3" and subject.point == subject.target == HookPoint(LAYER)


def test_a_transcoder_has_rows_and_targets(mlp: Subject) -> None:
    x, y, _ = planted_mlp()
    unit = mlp.unit(2)
    stored = mlp.store.permutation(2) + 2 * mlp.store.unit_tokens
    np.testing.assert_array_equal(unit.rows.numpy(), x[stored])
    np.testing.assert_array_equal(unit.targets.numpy(), y[stored])
    np.testing.assert_allclose(unit.norm, np.linalg.norm(y[stored], axis=1), rtol=1e-6)
    assert mlp.noun == "transcoder" and mlp.label == "mlp_in_3-mlp_out_3"
    assert mlp.where == "mlp_in of layer 3 to mlp_out of layer 3" and mlp.layer == LAYER
    assert mlp.recorded["reads"] == ["mlp_in_3"] and mlp.recorded["writes"] == ["mlp_out_3"]
    training = np.isin(np.arange(N) // 128, training_units(mlp.store))
    tokens = np.concatenate([mlp.store.piece_starts(unit).ravel() for unit in range(8)])
    kept = training & ~tokens
    np.testing.assert_allclose(mlp.mean.numpy(), y[kept].mean(0), rtol=1e-9)


def test_a_row_is_what_the_least_usual_of_its_hook_points_is(shuffled: Subject) -> None:
    """An outlier as it is written, not as it is read."""
    kind = np.empty(128, np.uint8)
    kind[shuffled.store.permutation(1)] = shuffled.kinds_of(1)
    assert kind[LONG - 128] == OUTLIER and np.sum(kind == OUTLIER) == 1


def test_widths_must_be_those_of_the_store(tmp_path: Path, mlp: Subject) -> None:
    config = SAEConfig(d_sae=D, k=D, k_aux=4, dead_after=1000, kind="transcoder")
    wide = replace(transcoder(planted_mlp()[2]), W_dec=torch.eye(D, 20), b_dec=torch.zeros(20))
    write_run(tmp_path / "run", mlp.store, LAYER, config, wide, site="mlp_in")
    with pytest.raises(StoreError, match=r"writes rows of width 20.* have 12"):
        Subject.open(tmp_path / "run", None, CPU)


# -- quality of a transcoder -----------------------------------------------------------------------


def centred(figures: dict[str, Any]) -> float:
    return float(figures["variance_explained"][study.TRAINED]["centred"])


def figures_of(subject: Subject) -> dict[str, Any]:
    return study.quality(subject, 10**6)


def test_a_linear_map_is_ridge_regression_on_the_training_rows(mlp: Subject) -> None:
    rows = [mlp.unit(number) for number in training_units(mlp.store)]
    chosen = [torch.from_numpy(unit.of_kinds(mlp.policy.kinds)) for unit in rows]
    x = torch.cat([unit.rows[mask] for unit, mask in zip(rows, chosen, strict=True)]).double()
    y = torch.cat([unit.targets[mask] for unit, mask in zip(rows, chosen, strict=True)]).double()
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    gram = scaled.T @ scaled / len(x) + linear.RIDGE * torch.eye(D)
    W = torch.linalg.solve(gram, scaled.T @ (y - y.mean(0)) / len(x))
    fit = linear.fitted(mlp)
    assert fit and fit.rows == len(x)
    torch.testing.assert_close(fit(x.float()).double(), scaled @ W + y.mean(0), rtol=0, atol=1e-4)


def test_quality_of_a_transcoder_is_of_what_it_writes(mlp: Subject) -> None:
    figures = figures_of(mlp)
    x, y = held_out(mlp)
    about_mean = (y - mlp.mean).square().sum()
    for name, guess in (
        (study.SKIP, torch.full_like(y, 0.5)),
        (study.LINEAR, linear.fitted(mlp)(x.float()).double()),
    ):
        expected = 1 - (y - guess).square().sum() / about_mean
        assert figures["baselines"][name]["explains"]["value"] == pytest.approx(
            float(expected), abs=1e-5
        )
    assert centred(figures) > 0.9999
    assert 0.3 < figures["baselines"][study.LINEAR]["explains"]["value"] < 0.95
    assert figures["baselines"][study.SHUFFLED]["explains"]["value"] < 0
    words = " ".join(study.outcome_of(mlp, figures).summary)
    assert "The transcoder explains" in words and "The latents add" in words
    assert "worthless" not in words and "which is no more" not in words


def test_a_transcoder_without_decoder_is_seen_to_be_its_skip(mlp: Subject) -> None:
    """Zero directions: all that it explains, its skip does."""
    fit = linear.fitted(mlp)
    assert fit
    as_skip = {"b_in": fit.mean_in, "b_dec": fit.mean_out, "W_skip": fit.W}
    empty = replace(mlp.sae, W_dec=torch.zeros_like(mlp.sae.W_dec), **as_skip)
    subject = replace(mlp, sae=empty)
    figures = figures_of(subject)
    alone = figures["baselines"][study.SKIP]
    assert alone["more"] == {"value": 0.0, "interval": (0.0, 0.0)}
    assert centred(figures) == pytest.approx(alone["explains"]["value"]) and centred(figures) > 0.3
    words = " ".join(study.outcome_of(subject, figures).summary)
    assert "The latents explain nothing" in words and "which is no more" in words


def test_a_transcoder_of_shuffled_pairs_is_worthless(shuffled: Subject) -> None:
    figures = figures_of(shuffled)
    assert centred(figures) < 0
    assert "worthless" in " ".join(study.outcome_of(shuffled, figures).summary)


# -- crosscoders -----------------------------------------------------------------------------------


def crosscoder_run(root: Path) -> tuple[Subject, NDArray[np.float64]]:
    """A crosscoder of two layers, of which the second has rows 100 times as long."""
    rng = np.random.default_rng(2)
    rows = [rounded(rng.normal(size=(N, D)) * scale + 1) for scale in (1.0, 100.0)]
    store = make_store(
        root / "s.zarr", bits_of(rows[0]), context=32, unit=128, chunk=32, layer=LAYER
    )
    store = add_points(store, {"5": bits_of(rows[1])})
    both = np.concatenate(rows, 1)
    generator = torch.Generator().manual_seed(0)
    scales = torch.cat([torch.full((D,), 10.0), torch.full((D,), 0.1)])
    W_dec = torch.nn.functional.normalize(torch.randn(40, 2 * D, generator=generator), dim=1)
    sae = SAE.of(
        (W_dec * scales).T.contiguous() * 0.3,
        W_dec / scales,
        torch.zeros(40),
        torch.from_numpy(both.mean(0)).float(),
        8,
    )
    config = SAEConfig(d_sae=40, k=8, k_aux=4, dead_after=1000, kind="crosscoder")
    named = {"3": 10.0, "5": 0.1}
    write_run(root / "run", store, [LAYER, 5], config, sae, scales=named)
    return Subject.open(root / "run", None, CPU), both


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return crosscoder_run(tmp_path_factory.mktemp("cross"))[0]


def test_a_crosscoder_is_seen_target_by_target(cross: Subject) -> None:
    assert cross.noun == "crosscoder" and cross.where == "layer 3 and layer 5"
    first, second = cross.ports.writes
    assert (cross.columns(first), cross.columns(second)) == (slice(0, D), slice(D, 2 * D))
    assert cross.scales == {"3": pytest.approx(10), "5": pytest.approx(0.1)}
    torch.testing.assert_close(cross.scaled(cross.sae.W_dec).norm(dim=1), torch.ones(40))
    norms = cross.decoder_norms()
    torch.testing.assert_close(norms.square().sum(1), torch.ones(40))
    with pytest.raises(SettingError, match=r"is of layer 3 and layer 5"):
        cross.layer  # noqa: B018

    figures = figures_of(cross)
    _, y = held_out(cross)
    y_hat = cross.sae(y.float()).double()
    squares = ((y - y_hat).square(), (y - cross.mean).square())
    for name, columns in (("3", slice(0, D)), ("5", slice(D, 2 * D))):
        error, total = (square[:, columns].sum() for square in squares)
        found = figures["targets"][name]["variance_explained"][study.TRAINED]["centred"]
        assert found == pytest.approx(float(1 - error / total), abs=1e-5)
    weights = torch.cat([torch.full((D,), 100.0), torch.full((D,), 0.01)]).double()
    error, total = ((square * weights).sum() for square in squares)
    assert centred(figures) == pytest.approx(float(1 - error / total), abs=1e-5)
    rows = {row[0] for table in study.outcome_of(cross, figures).tables for row in table.rows}
    assert {"3", "5"} <= rows


def test_a_crosscoder_of_two_stores_reads_both(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    stores = []
    for number in range(2):
        rows = bits_of(rng.normal(size=(N, D)) + number)
        path = tmp_path / f"{number}.zarr"
        stores.append(make_store(path, rows, context=32, unit=128, chunk=32, layer=LAYER))
    W_dec = torch.nn.functional.normalize(torch.randn(20, 2 * D), dim=1)
    sae = SAE.of(W_dec.T.contiguous(), W_dec, torch.zeros(20), torch.zeros(2 * D), 4)
    config = SAEConfig(d_sae=20, k=4, k_aux=4, dead_after=1000, kind="crosscoder")
    scales = {"3": 1.0, "1/3": 1.0}
    write_run(tmp_path / "run", stores[0], LAYER, config, sae, scales=scales, stores=2)
    _record_both(tmp_path / "run", stores)
    subject = Subject.open(tmp_path / "run", None, CPU)
    assert subject.where == "layer 3 and layer 3 of store 1" and subject.layer == LAYER
    unit = subject.unit(1)
    for store, columns in zip(stores, (slice(0, D), slice(D, 2 * D)), strict=True):
        bits = torch.from_numpy(store.residuals(LAYER, 1)).view(torch.bfloat16).float()
        assert torch.equal(unit.rows[:, columns], bits)
    assert set(figures_of(subject)["targets"]) == {"3", "1/3"}
    with pytest.raises(SettingError, match=r"store=.* names 1, .* from 2"):
        Subject.open(tmp_path / "run", stores[0].name, CPU)
    assert "two stores" in (refusals.two_models(subject, {}) or "")


def _record_both(run: Path, stores: list[Store]) -> None:
    import yaml

    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["store_paths"] = [store.name for store in stores]
    config["settings"]["store"]["identities"] = [store.identity for store in stores]
    path.write_text(yaml.safe_dump(config))


# -- sweeps ----------------------------------------------------------------------------------------


def test_a_sweep_compares_what_writes_the_same(
    root: Path, store: Store, mlp: Subject, shuffled: Subject
) -> None:
    """A transcoder beside an SAE of what it writes, on the rows that both keep."""
    both_ways = torch.cat([torch.eye(OUT), -torch.eye(OUT)])
    perfect = SAE.of(both_ways.T.contiguous(), both_ways, torch.zeros(24), torch.zeros(OUT), 24)
    config = SAEConfig(d_sae=24, k=24, k_aux=4, dead_after=1000)
    write_run(root / "run_sae", store, LAYER, config, perfect, site="mlp_out")
    read, damaged = arms.read_all(arms.find(str(root)))
    found = {entry["layer"]: entry for entry in sweep(read, damaged, None, 10**6, CPU)["layers"]}
    assert set(found) == {mlp.place, shuffled.place} == {"mlp_out_3", "mlp_out_5"}
    explained = {arm["name"]: arm["variance_explained"] for arm in found["mlp_out_3"]["arms"]}
    assert explained["run_sae"] == pytest.approx(1, abs=1e-6)
    assert explained["run_3"] == pytest.approx(centred(figures_of(mlp)), abs=1e-6)
    assert [arm["name"] for arm in found["mlp_out_5"]["arms"]] == ["run_5"]
    assert found["mlp_out_3"]["where"] == "mlp_out of layer 3" and not damaged


# -- refusals --------------------------------------------------------------------------------------


def test_a_study_that_is_not_for_a_run_says_so_at_once(mlp: Subject) -> None:
    def never(_: Study) -> Any:
        raise AssertionError("the study ran")

    definition = Definition(never, refuses=refusals.all_but_saes)
    asked = Study("quality", mlp, {}, ModelConfig("nobody/none"))
    with pytest.raises(SettingError, match=r"study=quality .*mlp_in of layer 3 to mlp_out"):
        asked.perform(definition)
