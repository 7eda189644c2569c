"""Planted matches are found, random ones are at the null, figures equal naive computations."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import sparse

from residual_saes.analyze.latents import directions, matching
from residual_saes.analyze.latents.codes import choosing_half
from residual_saes.analyze.latents.matching import NONE
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.studies.stability import study as stability
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows import summary
from residual_saes.harvest.model import ModelConfig
from residual_saes.train import sae, sae_file
from residual_saes.train.run import CONFIG
from residual_saes.train.sae import SAE, SAEConfig
from tests.analyze.conftest import LAYER, Made, make_run, random_rows
from tests.conftest import commit

ROWS = 10**6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One run, on a store whose every unit is held out as far as studies see, so that there are
    rows enough.
    """
    return make_run(tmp_path_factory.mktemp("stability"), random_rows())


@pytest.fixture(autouse=True)
def every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "residual_saes.analyze.subject.held_out_units", lambda store: range(store.units)
    )


def other_run(made: Made, root: Path, weights: SAE, **settings: Any) -> Path:
    run = root / "other"
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("studies"))
    sae_file.write_final(weights, 1.0, run)
    config = yaml.safe_load((run / CONFIG).read_text())
    config["settings"] |= settings
    (run / CONFIG).write_text(yaml.safe_dump(config))
    return run


def compared(made: Made, root: Path, weights: SAE, **settings: Any) -> tuple[Outcome, pd.DataFrame]:
    options = {"other": str(other_run(made, root, weights, **settings)), "rows": ROWS}
    subject = replace(Subject.open(made.run, None, torch.device("cpu")), run=root)
    study = Study("stability", subject, options, ModelConfig("nowhere/none"))
    return stability.stability(study), pd.read_parquet(study.folder / stability.FILE)


# -- planted truths --------------------------------------------------------------------------------


def test_a_run_matches_itself(made: Made, tmp_path: Path) -> None:
    outcome, table = compared(made, tmp_path, made.sae)
    figures = outcome.figures
    alive = table[~table["correlation"].isna()]
    assert len(alive) == figures["alive"] > 30
    assert (alive["partner"] == alive["feature"]).all() and alive["mutual"].all()
    np.testing.assert_allclose(alive["correlation"], 1, atol=1e-9)
    np.testing.assert_allclose(table["cosine"], 1, atol=1e-6)
    assert (table["nearest"] == table["feature"]).all()
    assert (alive["assigned"] == alive["feature"]).all()
    assert figures["matched"]["other"]["above"]["0.9"] == {"share": 1.0, "share_95": (1.0, 1.0)}
    assert figures["matched"]["random"]["correlation"] < 0.9
    assert abs(figures["matched"]["shifted"]["correlation"]) < 0.1
    assert outcome.summary[0].startswith("100.0% [100.0%, 100.0%]")
    assert sum(row["latents"] for row in figures["by_density"]) == figures["alive"]


def test_permuted_latents_are_found(made: Made, tmp_path: Path) -> None:
    order = torch.randperm(made.sae.d_sae, generator=torch.Generator().manual_seed(3))
    ours = made.sae
    mixed = SAE.of(ours.W_enc[:, order], ours.W_dec[order], ours.b_enc[order], ours.b_dec, ours.k)
    _, table = compared(made, tmp_path, mixed)
    alive = table[~table["correlation"].isna()]
    place = np.argsort(order.numpy())
    assert (alive["partner"] == place[alive["feature"]]).all()
    assert (alive["assigned"] == place[alive["feature"]]).all()
    assert (table["nearest"] == place).all()
    np.testing.assert_allclose(alive["correlation"], 1, atol=1e-6)
    np.testing.assert_allclose(alive["partner_cosine"], 1, atol=1e-6)
    np.testing.assert_allclose(alive["assigned_correlation"], alive["correlation"])


def test_an_independent_random_dictionary_is_at_the_null(made: Made, tmp_path: Path) -> None:
    config = SAEConfig(d_sae=made.sae.d_sae, k=made.sae.k, k_aux=4)
    figures = compared(made, tmp_path, sae.initial(config, made.sae.b_dec, seed=9))[0].figures
    other, random = figures["matched"]["other"], figures["matched"]["random"]
    assert other["correlation"] == pytest.approx(random["correlation"], abs=0.07)
    assert figures["cosine"]["other"]["mean_max_cosine"] == pytest.approx(
        figures["cosine"]["random"]["mean_max_cosine"], abs=0.08
    )
    assert (
        other["correlation"] > figures["matched"]["shifted"]["correlation"] + 0.1
    )  # they read the same rows
    low, high = other["correlation_95"]
    assert low < other["correlation"] < high


def test_layers_are_joined_by_token(made: Made, tmp_path: Path) -> None:
    """Another layer with twice the rows, and outliers at other tokens, which leave both."""
    bits = torch.from_numpy(made.rows * 2).bfloat16()
    bits[[100, 700]] *= 300
    for unit in range(made.store.units):
        commit(
            made.store, unit, {5: bits[unit * 128 : (unit + 1) * 128].view(torch.uint16).numpy()}
        )
    summary.write(made.store, 5)
    ours = made.sae
    twice = SAE.of(ours.W_enc, ours.W_dec, 2 * ours.b_enc, 2 * ours.b_dec, ours.k)
    outcome, table = compared(made, tmp_path, twice, layer=5)
    alive = table[~table["correlation"].isna()]
    np.testing.assert_allclose(alive["correlation"], 1, atol=1e-5)
    assert outcome.figures["layers"] == [LAYER, 5]
    assert "3 and 5" in outcome.summary[-1]
    starts = np.concatenate(
        [made.store.piece_starts(unit).ravel() for unit in range(made.store.units)]
    )
    left = ~starts
    left[[100, 300, 700, 900, 1500]] = False
    assert outcome.figures["rows"] == left.sum()


# -- against naive computations --------------------------------------------------------------------


def random_codes(rows: int, latents: int, seed: int, density: float = 0.2) -> Any:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((rows, latents)) < density, rng.random((rows, latents)), 0)


@pytest.mark.parametrize("block", [3, 256])
def test_partners_are_those_of_the_whole_matrix(block: int) -> None:
    a, b = random_codes(200, 11, 0, 0.05), random_codes(200, 13, 1, 0.05)
    a[:, 4], b[:, 7] = 0, 0  # silent
    a[:, 6] = a[:, 2]  # twice the same: the first is theirs
    b[:, 9] = a[:, 2] * 3
    b[:, 12] = b[:, 9]
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(a.T, b.T)[:11, 11:])
    sparse_a, sparse_b = sparse.csr_array(a), sparse.csr_array(b)
    np.testing.assert_allclose(matching.correlations(sparse_a, sparse_b, block), r, atol=1e-12)
    found = matching.best_partners(sparse_a, sparse_b, block)
    np.testing.assert_allclose(found.correlation, np.maximum(r.max(1), 0), atol=1e-12)
    for ours, best in ((found.ours, r), (found.theirs, r.T)):
        expected = np.where(best.max(1) > 0, np.argmax(np.round(best, 9), axis=1), NONE)
        assert ours.tolist() == expected.tolist()
    assert found.ours[[2, 4, 6]].tolist() == [9, NONE, 9] and found.theirs[[7, 9, 12]].tolist() == [
        NONE,
        2,
        2,
    ]


@pytest.mark.parametrize("block", [2, 256])
def test_measuring_is_a_bootstrap_of_documents(block: int) -> None:
    a, b = random_codes(60, 5, 2, 0.3), random_codes(60, 4, 3, 0.3)
    a[:, 3] = 0
    document = np.repeat([7, 3, 9, 20], 15)
    partner = np.array([1, 0, NONE, 2, 2])
    found = matching.measure(
        sparse.csr_array(a), sparse.csr_array(b), partner, document, draws=6, seed=5, block=block
    )
    rng = np.random.default_rng(5)
    drawn = [np.arange(4), *(rng.integers(0, 4, 4) for _ in range(6))]
    names = np.array([3, 7, 9, 20])
    for r, documents in zip([found.r, *found.draws], drawn, strict=True):
        rows = np.concatenate([np.flatnonzero(document == name) for name in names[documents]])
        for latent, other in enumerate(partner):
            if latent == 3:
                assert np.isnan(r[latent])
            else:
                expected = (
                    np.corrcoef(a[rows, latent], b[rows, other])[0, 1] if other != NONE else 0
                )
                assert r[latent] == pytest.approx(expected, abs=1e-12)


def test_a_single_document_gives_no_draws() -> None:
    a = sparse.csr_array(random_codes(30, 4, 2))
    found = matching.measure(a, a, np.arange(4), np.zeros(30, np.int64), draws=6, seed=5)
    assert found.r == pytest.approx(np.ones(4)) and found.draws.shape == (0, 4)
    figures = stability._match_figures(
        stability.Match(np.arange(4), np.ones(4, np.bool_), found.r, found), np.ones(4, np.bool_)
    )
    assert figures["correlation_95"] is figures["above"]["0.7"]["share_95"] is None


def test_assignment_is_one_to_one() -> None:
    r = np.array([[0.9, 0.8], [0.9, 0.1], [0.0, 0.0]])
    assert matching.assignment(r).tolist() == [1, 0, NONE]  # greedily: 0.9 + 0.1


def test_what_was_chosen_is_measured_elsewhere() -> None:
    """Unrelated latents correlate above 0 where the partner was chosen, not elsewhere."""
    ours, theirs = (sparse.csr_array(random_codes(400, 60, seed)) for seed in (4, 5))
    document = np.arange(400) // 5
    found = stability.match(ours, theirs, document, choosing_half(document, 0))
    assert found.chosen.mean() > 0.1
    assert abs(found.measured.r.mean()) < 0.03


def test_halves_split_documents() -> None:
    document = np.repeat(np.arange(10), 4)
    half = choosing_half(document, 0).reshape(10, 4)
    assert (half.all(1) | ~half.any(1)).all() and half.all(1).sum() == 5
    with pytest.raises(StoreError, match=r"study\.rows"):
        choosing_half(np.zeros(5, np.int64), 0)


def test_the_random_dictionary_has_the_second_moments() -> None:
    draw, d = torch.Generator().manual_seed(0), 48
    mix = torch.linalg.qr(torch.randn(d, d, generator=draw)).Q * torch.linspace(0.5, 2, d)[:, None]
    W_dec = torch.randn(20_000, d, generator=draw) @ mix.T @ mix
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    drawn = directions.random_dictionary(
        SAE.of(W_dec.T, W_dec, torch.zeros(20_000), torch.ones(d), 3), 0
    )
    torch.testing.assert_close(drawn.W_dec.norm(dim=1), torch.ones(20_000))
    ours, theirs = (W.T @ W / len(W) for W in (W_dec, drawn.W_dec))
    assert (ours - torch.eye(d) / d).norm() > 0.5 * ours.norm()  # far from isotropic
    assert (ours - theirs).norm() < 0.1 * ours.norm()
    assert (
        drawn.k == 3
        and torch.equal(drawn.W_enc, drawn.W_dec.T)
        and torch.equal(drawn.b_dec, torch.ones(d))
    )


# -- refusals --------------------------------------------------------------------------------------


def test_what_cannot_be_compared(made: Made, tmp_path: Path) -> None:
    subject = Subject.open(made.run, None, torch.device("cpu"))

    def study(**options: Any) -> Study:
        return Study("stability", subject, options, ModelConfig("nowhere/none"))

    with pytest.raises(SettingError, match=r"study\.other"):
        stability.stability(study())
    with pytest.raises(StoreError, match="none"):
        stability.stability(study(other=str(tmp_path / "none")))
    with pytest.raises(SettingError, match=r"study\.rows=0"):
        stability.stability(study(other="x", rows=0))
    elsewhere = other_run(made, tmp_path, made.sae, store={"identity": "0" * 32})
    with pytest.raises(StoreError, match=elsewhere.name):
        stability.stability(study(other=str(elsewhere)))
    with pytest.raises(SettingError, match=made.run.name):
        stability.stability(study(other=f"{made.run}/../{made.run.name}"))


def test_a_retrained_run_is_compared_again(made: Made, tmp_path: Path) -> None:
    run = other_run(made, tmp_path, made.sae)
    subject = Subject.open(made.run, None, torch.device("cpu"))
    study = Study("stability", subject, {"other": str(run)}, ModelConfig("nowhere/none"))
    before = stability.inputs(study)
    sae_file.write_final(replace(made.sae, b_enc=made.sae.b_enc + 1), 1.0, run)
    assert stability.inputs(study) != before
