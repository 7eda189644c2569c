"""study=diff on planted truths: what is shared, what is one target's own, what is an artefact of
training, and what is no difference at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor

from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.studies.diff import words
from residual_saes.analyze.studies.diff.study import DEFINITION, Measured, compare
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.harvest.model import ModelConfig
from residual_saes.train.ports import ports_of
from residual_saes.train.run import CONFIG
from residual_saes.train.sae import SAE, SAEConfig
from tests.analyze.conftest import LAYER, write_run
from tests.conftest import make_spine, make_store

N, D, UNIT = 2048, 64, 1024
SHARED, OWN_A, OWN_B = 24, 10, 12  # planted features; of the shared a third each is
SAME, ROTATED, OPPOSITE = slice(0, 8), slice(8, 16), slice(16, 24)


class World(NamedTuple):
    """Planted features of two models: codes, and directions that are 0 where a model lacks one."""

    codes: Tensor  # (N, F)
    a: Tensor  # (F, D)
    b: Tensor  # (F, D)


def world(rows: int = N) -> World:
    generator = torch.Generator().manual_seed(0)
    features = SHARED + OWN_A + OWN_B
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    a = basis[:features].clone()
    b = a.clone()
    b[ROTATED] = basis[features : features + 8]
    b[OPPOSITE] *= -1
    b[SHARED : SHARED + OWN_A] = 0
    a[SHARED + OWN_A :] = 0
    fires = torch.rand(rows, features, generator=generator) < 0.08
    codes = fires * (1 + torch.rand(rows, features, generator=generator))
    return World(codes, a, b)


def rows_of(codes: Tensor, directions: Tensor, seed: int, scale: float = 1.0) -> Tensor:
    noise = torch.randn(len(codes), D, generator=torch.Generator().manual_seed(seed))
    return (codes @ directions + 0.02 * noise) * scale


def crosscoder(planted: World, scales: tuple[float, float] = (1, 1)) -> SAE:
    """The dictionary that has each planted feature as a latent."""
    reads = planted.a.norm(dim=1) + planted.b.norm(dim=1)
    W_enc = torch.cat([planted.a / scales[0], planted.b / scales[1]], 1) / reads[:, None]
    W_dec = torch.cat([planted.a * scales[0], planted.b * scales[1]], 1)
    features = len(W_enc)
    zeros = torch.zeros(features)
    return SAE.of(W_enc.T, W_dec, zeros, torch.zeros(2 * D), 8, torch.full((features,), 0.5))


def write(
    folder: Path, a: Tensor, b: Tensor, sae: SAE, scales: tuple[float, float] = (1, 1)
) -> Path:
    """A finished crosscoder of two stores of the same tokens; of one store twice if b is a."""
    spine = make_spine(N // 32, 32, np.random.default_rng(1))
    size: dict[str, Any] = {"context": 32, "unit": UNIT, "chunk": 32, "layer": LAYER}
    stores = []
    for name, rows in {"a": a, "b": b}.items() if b is not a else [("a", a)]:
        bits = rows.bfloat16().view(torch.uint16).numpy()
        # As stores of different models the two have different identities.
        codec = {"a": "blosc", "b": "none"}[name]
        stores.append(make_store(folder / f"{name}.zarr", bits, spine=spine, codec=codec, **size))
    stores = [stores[0], stores[-1]]
    run = folder / "run"
    config = SAEConfig(kind="crosscoder", d_sae=sae.d_sae, k=sae.k, k_aux=4)
    named = {str(LAYER): 1 / scales[0], f"1/{LAYER}": 1 / scales[1]}
    write_run(run, stores[0], LAYER, config, sae, named, stores=2)
    written = yaml.safe_load((run / CONFIG).read_text())
    written["settings"]["store"]["identities"] = [store.identity for store in stores]
    written["store_paths"] = [store.name for store in stores]
    (run / CONFIG).write_text(yaml.safe_dump(written))
    return run


def study_of(run: Path, **options: Any) -> Study:
    subject = Subject.open(run, None, torch.device("cpu"))
    return Study("diff", subject, options, ModelConfig("nowhere/none"))


def own_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return list(figures["own"].values())


def compared(run: Path, null: Path | None = None) -> tuple[Measured, dict[str, Any]]:
    """What the study finds, without its files and pictures."""
    of_null = study_of(null).subject if null else None
    return compare(study_of(run).subject, of_null, 10**6, StopRequest())


Planted = tuple[World, Outcome, dict[str, list[Any]]]


@pytest.fixture(scope="module")
def planted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[World, Outcome, dict[str, list[Any]]]:
    """Rows of the second store are a hundred times as long, which must change nothing."""
    made = world()
    scales = (1.0, 100.0)
    a = rows_of(made.codes, made.a, 1)
    b = rows_of(made.codes, made.b, 2, 100)
    run = write(tmp_path_factory.mktemp("diff"), a, b, crosscoder(made, scales), scales)
    study = study_of(run)
    outcome = study.perform(DEFINITION)
    return made, outcome, pq.read_table(study.folder / FEATURES).to_pydict()


def test_planted_directions_are_told_apart(planted: Planted) -> None:
    _, outcome, table = planted
    truth = ["shared"] * SHARED + ["own of 3"] * OWN_A + ["own of 1/3"] * OWN_B
    assert table["class"] == truth
    assert [target["survive"] for target in own_of(outcome.figures)] == [OWN_A, OWN_B]
    assert all(target["differs"] for target in own_of(outcome.figures))
    cosine = outcome.figures["cosine"]
    assert (cosine["same"], cosine["rotated"], cosine["opposite"]) == (8, 8, 8)
    assert np.allclose(table["share 1/3"][:SHARED], 0.5)
    assert np.allclose(table["entropy"], [1] * SHARED + [0] * (OWN_A + OWN_B))


def test_each_class_explains_what_was_planted(planted: Planted) -> None:
    """A class explains of a target as much variance as its features were planted with."""
    made, outcome, _ = planted
    parts = {"shared": slice(0, SHARED), "own": slice(SHARED, SHARED + OWN_A)}
    variance = made.codes.var(0)
    total = (variance * made.a.norm(dim=1) ** 2).sum() + D * 0.02**2
    a, b = outcome.figures["variance_explained"].values()
    for (name, part), title in zip(parts.items(), ("shared", "own of layer 3 of a"), strict=True):
        expected = variance[part].sum() / total
        measured = a["of_class"][title]
        low, high = measured["interval"]
        assert low < measured["value"] < high
        assert measured["value"] == pytest.approx(float(expected), rel=0.1), name
    assert b["of_class"]["own of layer 3 of a"]["value"] == pytest.approx(0, abs=1e-3)
    assert a["all"]["value"] > 0.99
    rates = [found["l0"]["value"] for found in outcome.figures["classes"].values()]
    assert rates == pytest.approx([0.08 * n for n in (OWN_A, OWN_B, SHARED, 0)], rel=0.1)


def test_artefacts_of_training_do_not_survive(tmp_path: Path) -> None:
    """Shared features whose decoder has shrunk, or that are split in two, look own by their
    norms.
    """
    made = world()
    sae = crosscoder(made)
    W_enc, W_dec = sae.W_enc.clone(), sae.W_dec.clone()
    W_dec[:4, :D] = 0  # shrunk: A has the direction, in its error
    # Decoupled: one latent for A and another one for B, which fire together.
    W_dec[4:8, :D] = 0
    split = torch.cat([made.a[4:8], torch.zeros(4, D)], 1)
    W_enc = torch.cat([W_enc, W_enc[:, 4:8]], 1)
    W_dec = torch.cat([W_dec, split])
    broken = SAE.of(
        W_enc, W_dec, torch.zeros(len(W_dec)), sae.b_dec, 8, torch.full((len(W_dec),), 0.5)
    )
    run = write(tmp_path, rows_of(made.codes, made.a, 1), rows_of(made.codes, made.b, 2), broken)
    measured, figures = compared(run)
    a, b = own_of(figures)
    assert (a["latents"], a["survive"], a["decoupled"], a["shrunk"]) == (OWN_A + 4, OWN_A, 4, 0)
    assert (b["latents"], b["survive"]) == (OWN_B + 8, OWN_B)
    assert (b["decoupled"], b["shrunk"]) == (4, 4)
    assert measured.nu is not None
    assert np.allclose(measured.nu.error[:4], 1, atol=0.1)
    assert np.allclose(measured.nu.reconstruction[4:8], 1, atol=0.1)
    assert np.allclose(measured.nu.error[SHARED:-4], 0, atol=0.1)


def itself(made: World) -> World:
    """The same features, all of them in both models."""
    directions = torch.where(made.a.norm(dim=1, keepdim=True) > 0, made.a, made.b)
    return World(made.codes, directions, directions)


def test_a_model_with_itself_shows_no_difference(tmp_path: Path) -> None:
    """Whatever the decoder says: a third of the features are called own, half of them of each."""
    made = itself(world())
    sae = crosscoder(made)
    W_dec = sae.W_dec.clone()
    W_dec[:8, :D] = 0
    W_dec[8:16, D:] = 0
    W_dec[16:20, :D] *= 0.3
    false = SAE.of(sae.W_enc, W_dec, sae.b_enc, sae.b_dec, 8, sae.threshold)
    rows = rows_of(made.codes, made.a, 1)
    _, figures = compared(write(tmp_path, rows, rows, false))
    assert [target["latents"] for target in own_of(figures)] == [8, 8]
    assert [target["survive"] for target in own_of(figures)] == [0, 0]
    assert not any(target["differs"] for target in own_of(figures))
    assert words.summary(figures)[0].startswith("No difference beyond the null")


def test_what_either_model_may_have_by_chance_is_no_difference(tmp_path: Path) -> None:
    """Rare features, each of them in the one model or in the other by a coin for each document.

    Many survive latent scaling, in as many permuted documents as in these.
    """
    made = itself(world())
    sae = crosscoder(made)
    W_dec = sae.W_dec.clone()
    W_dec[:, :D] = 0
    blamed = SAE.of(sae.W_enc, W_dec, sae.b_enc, sae.b_dec, 8, sae.threshold)
    _, document = make_spine(N // 32, 32, np.random.default_rng(1))
    generator = torch.Generator().manual_seed(3)
    features = len(made.a)
    shape = (int(document.max()) + 1, features)
    coin = (torch.rand(shape, generator=generator) < 0.5)[document.ravel().astype(np.int64)]
    rare = torch.rand(N, features, generator=generator) < 0.002
    codes = 1.5 * rare
    a = rows_of(codes * coin, made.a, 1)
    b = rows_of(codes * ~coin, made.a, 2)
    _, figures = compared(write(tmp_path, a, b, blamed))
    of_a, of_b = own_of(figures)
    assert of_b["survive"] >= 3
    assert of_b["permuted"]["mean"] >= 3
    assert not of_a["differs"] and not of_b["differs"]


def test_beside_a_null_run_more_than_its_share_must_survive(
    planted: Planted, tmp_path: Path
) -> None:
    """The same own latents of a run whose null has none, and beside itself as the null."""
    made, outcome, _ = planted
    run = Path(outcome.figures["stores"][0]).parent / "run"
    sae = Subject.open(run, None, torch.device("cpu")).sae
    rows = rows_of(itself(made).codes, itself(made).a, 1)
    null = write(tmp_path, rows, rows, sae)
    found = [target["null"] for target in own_of(compared(run, null)[1])]
    assert all(of_null["expected_survivors"] == 0 and of_null["p"] < 1e-3 for of_null in found)
    figures = compared(run, run)[1]
    assert not any(target["differs"] for target in own_of(figures))
    assert own_of(figures)[0]["null"]["expected_survivors"] == (OWN_A + OWN_B) / 2
    assert words.summary({**figures, "null": "runs/self"})[0].startswith("No difference")


def test_shared_latents_with_other_directions_are_a_difference_beside_a_null(
    tmp_path: Path,
) -> None:
    """No latent is own: a third of the shared ones is rotated in B, a third is opposite."""
    made = world()
    shared = World(made.codes[:, :SHARED], made.a[:SHARED], made.b[:SHARED])
    a, b = (rows_of(shared.codes, side, 1) for side in (shared.a, shared.b))
    run = write(tmp_path / "run", a, b, crosscoder(shared))
    null = write(tmp_path / "null", a, a, crosscoder(shared._replace(b=shared.a)))
    figures = compared(run, null)[1]
    assert figures["cosine"]["differs"] and figures["cosine"]["p"] < 1e-3
    assert not any(target["differs"] for target in own_of(figures))
    told = words.summary({**figures, "null": "runs/self"})
    assert told[0].startswith("The targets differ") and "16 shared latents" in told[0]
    # Beside its like it differs in nothing, and without a null no direction is tested.
    assert not compared(run, run)[1]["cosine"]["differs"]
    assert "differs" not in compared(run)[1]["cosine"]
    assert words.summary(compared(run)[1])[0].startswith("No difference beyond the null")


def test_what_is_no_null_is_refused(planted: Planted) -> None:
    run = Path(planted[1].figures["stores"][0]).parent / "run"
    with pytest.raises(SettingError, match=r"study\.null_run"):  # its targets are different
        study_of(run, null_run=str(run)).perform(DEFINITION)
    study = study_of(run)
    study.subject = replace(study.subject, ports=ports_of("sae", [LAYER], ["resid_post"], None))
    with pytest.raises(SettingError, match=rf"{run}.*crosscoder"):
        study.perform(DEFINITION)
