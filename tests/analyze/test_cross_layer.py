"""study=cross_layer: planted pairs are found, turned rows have none, figures equal naive ones."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from residual_saes.analyze.latents.codes import choosing_half
from residual_saes.analyze.latents.matching import NONE
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.stats import wilson
from residual_saes.analyze.studies.cross_layer import causal, pairs, rotation
from residual_saes.analyze.studies.cross_layer import study as study_module
from residual_saes.analyze.studies.cross_layer.pairs import LEVEL, Found
from residual_saes.analyze.studies.cross_layer.rotation import Runs, coincidences
from residual_saes.analyze.studies.cross_layer.study import (
    CLASSES,
    DEFINITION,
    PAIRS,
    classes_of,
    other_of,
    refuses,
)
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import (
    Interrupted,
    PipelineError,
    SettingError,
    StopRequest,
    StoreError,
)
from residual_saes.data.rows import summary
from residual_saes.data.store.store import Store
from residual_saes.harvest.model import ModelConfig
from residual_saes.train import sae_file
from residual_saes.train.ports import recorded_ports
from residual_saes.train.run import CONFIG
from residual_saes.train.sae import SAE, SAEConfig
from tests.analyze.conftest import (
    LAYER,
    MLP_LAYERS,
    D,
    Made,
    N,
    make_run,
    mlp_run,
    random_rows,
    random_transcoder,
    write_run,
)
from tests.analyze.planted_firing import Firing, planted, unrelated
from tests.conftest import commit, make_store

NOWHERE = ModelConfig("nowhere/none")


def found_in(firing: Firing, least: int = 5) -> Found:
    half = choosing_half(firing.document, 0)
    return pairs.find(firing.theirs, firing.ours, firing.document, half, least, StopRequest())


# -- the exact test --------------------------------------------------------------------------------


def test_coincidences_are_those_of_every_shift() -> None:
    """Against all combinations of shifts of three documents, one of which has one of the two."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 9, 3)
        document = np.repeat([7, 3, 5], lengths)
        x, y = (rng.random(len(document)) < 0.5 for _ in range(2))
        x[document == 5] = False
        runs = Runs.of(document)
        counts = []
        for shifts in itertools.product(*map(range, lengths)):
            moved = [
                np.roll(part, by)
                for part, by in zip(np.split(x, runs.first[1:]), shifts, strict=True)
            ]
            counts.append((np.concatenate(moved) & y).sum())
        together, expected, p = coincidences(np.flatnonzero(x), np.flatnonzero(y), runs)
        assert together == (x & y).sum()
        assert expected == pytest.approx(np.mean(counts))
        assert p == pytest.approx(np.mean(np.array(counts) >= together))


def test_a_bound_is_never_below_the_tail() -> None:
    """Ten documents in which the only shift of 8 that coincides is the one that is there."""
    document = np.repeat(np.arange(10), 8)
    first = np.arange(10) * 8
    _, expected, p = coincidences(first, first, Runs.of(document))
    assert expected == pytest.approx(10 / 8)
    assert 8.0**-10 <= p <= 8.0**-10 * 1.01
    _, _, half = coincidences(first, np.concatenate([first[:5], first[5:] + 1]), Runs.of(document))
    tail = sum(_binomial(10, hits, 1 / 8) for hits in range(5, 11))
    assert half == pytest.approx(tail)


def _binomial(n: int, hits: int, p: float) -> float:
    ways = np.prod(np.arange(n - hits + 1, n + 1)) / np.prod(np.arange(1, hits + 1))
    return float(ways * p**hits * (1 - p) ** (n - hits))


def test_turned_rows_keep_each_document(planted_firing: Firing) -> None:
    firing = planted_firing
    turned = rotation.rotated(firing.ours, Runs.of(firing.document), 1)
    assert (turned != firing.ours).nnz
    for number in (0, 1, 50):
        mine = firing.document == number
        before, after = (codes[mine].toarray() for codes in (firing.ours, turned))
        rolls = [np.roll(before, by, 0) for by in range(mine.sum())]
        assert any((after == rolled).all() for rolled in rolls)


# -- pairs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_firing() -> Firing:
    return planted(0)


def test_planted_pairs_are_found_and_turned_ones_are_not(planted_firing: Firing) -> None:
    firing = planted_firing
    found = found_in(firing)
    functions = np.arange(firing.ours.shape[1] // 2)
    right = (found.partner[functions, 0] == functions) & (found.q[functions, 0] <= LEVEL)
    assert right.mean() >= 0.95
    # A multiple is explained wholly, with its slope. The second half are functions of nothing.
    np.testing.assert_allclose(found.r[:20:4, 0], 1, atol=1e-6)
    np.testing.assert_allclose(found.slope[:20:4, 0], 2, atol=1e-5)
    np.testing.assert_allclose(found.explained[:20:4], 1, atol=1e-5)
    assert not (found.q[20:] <= LEVEL).any() and (found.explained[20:] < 0.1).all()
    turned = rotation.rotated(firing.ours, Runs.of(firing.document), 0)
    assert not (found_in(firing._replace(ours=turned)).q <= LEVEL).any()


def test_figures_are_the_naive_ones(planted_firing: Firing) -> None:
    firing = planted_firing
    found = found_in(firing)
    half = choosing_half(firing.document, 0)
    a, b = (codes.toarray() for codes in (firing.ours, firing.theirs))
    correlation = np.corrcoef(b[half].T, a[half].T)[:40, 40:]
    x, y = a[~half], b[~half]
    for latent in (0, 1, 3, 30):
        best = np.argsort(-correlation[latent])[: pairs.TOP]
        assert found.partner[latent].tolist() == best.tolist()
        design = np.column_stack([np.ones(half.sum()), a[half][:, best]])
        weights = np.linalg.lstsq(design, b[half, latent], rcond=None)[0]
        error = y[:, latent] - weights[0] - x[:, best] @ weights[1:]
        assert found.explained[latent] == pytest.approx(
            1 - (error**2).mean() / y[:, latent].var(), abs=1e-5
        )
        for rank, partner in enumerate(best):
            fires = [values > 0 for values in (x[:, partner], y[:, latent])]
            table = np.corrcoef(*fires)[0, 1]
            assert found.phi[latent, rank] == pytest.approx(table, abs=1e-6)
            both = (fires[0] & fires[1]).sum()
            assert found.together[latent, rank] == both
            assert found.jaccard[latent, rank] == pytest.approx(both / (fires[0] | fires[1]).sum())
            assert found.given_partner[latent, rank] == pytest.approx(both / fires[0].sum())
            assert found.given_latent[latent, rank] == pytest.approx(both / fires[1].sum())
            independent = fires[0].mean() * fires[1].mean() * len(x)
            assert found.lift[latent, rank] == pytest.approx(both / independent)
            r = np.corrcoef(x[:, partner], y[:, latent])[0, 1]
            assert found.r[latent, rank] == pytest.approx(r, abs=1e-5)


def test_a_sum_of_several_is_combined() -> None:
    """No one of four explains half of their sum; together they do."""
    firing = planted(1)
    theirs = firing.theirs.toarray()
    theirs[:, 30] = firing.ours[:, [1, 5, 9, 13]].sum(1)
    dense = type(firing.theirs)(theirs)
    found = found_in(firing._replace(theirs=dense))
    classes = classes_of(found, np.zeros(found.r.shape))
    assert sorted(found.partner[30][:4]) == [1, 5, 9, 13]
    assert CLASSES[classes[30]] == "combined" and found.explained[30] > 0.95
    assert [CLASSES[number] for number in classes[[0, 35]]] == ["other direction", "new"]


def test_latents_that_fire_everywhere_are_told_by_where_they_are_strong() -> None:
    firing = planted(2)
    always = firing.ours.toarray() + 0.1
    related = 3 * always[:, 0] + 0.1
    theirs = np.column_stack([related, np.random.default_rng(0).random(len(related)) + 1])
    found = found_in(
        firing._replace(ours=type(firing.ours)(always), theirs=type(firing.ours)(theirs))
    )
    assert found.partner[0, 0] == 0 and found.q[0, 0] <= LEVEL
    assert not (found.q[1] <= LEVEL).any()


def test_what_fires_seldom_is_not_judged(planted_firing: Firing) -> None:
    few = planted_firing.theirs.toarray()
    few[10:, 0] = 0
    found = found_in(planted_firing._replace(theirs=type(planted_firing.theirs)(few)))
    assert not found.judged[0] and (found.partner[0] == NONE).all()
    assert CLASSES[classes_of(found, np.zeros(found.r.shape))[0]] == "rare"
    assert found.judged[1:].all()


def false_positives(data_sets: range) -> int:
    """In how many data sets without any pair some pair predicts."""
    return sum(bool((found_in(unrelated(seed)).q <= LEVEL).any()) for seed in data_sets)


def test_false_positives_are_few() -> None:
    assert false_positives(range(4)) <= 2


@pytest.mark.long
def test_false_positives_are_at_their_level() -> None:
    sets = range(300)
    assert wilson(false_positives(sets), len(sets)).low <= LEVEL


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("cross_layer"), random_rows())


@pytest.fixture
def every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "residual_saes.analyze.subject.held_out_units", lambda store: range(store.units)
    )


def copied(made: Made, run: Path, weights: SAE, **settings: Any) -> Path:
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("studies"))
    sae_file.write_final(weights, 1.0, run)
    config = yaml.safe_load((run / CONFIG).read_text())
    config["settings"] |= settings
    (run / CONFIG).write_text(yaml.safe_dump(config))
    return run


def study_of(run: Path, to: Any, **options: Any) -> Study:
    subject = Subject.open(run, None, torch.device("cpu"))
    return Study("cross_layer", subject, {"to": str(to), **options}, NOWHERE)


@pytest.mark.usefixtures("every_unit")
def test_a_copy_predicts_itself(made: Made, tmp_path: Path) -> None:
    order = torch.randperm(made.sae.d_sae, generator=torch.Generator().manual_seed(3))
    same = made.sae
    mixed = SAE.of(same.W_enc[:, order], same.W_dec[order], same.b_enc[order], same.b_dec, same.k)
    run = copied(made, tmp_path / "run", same)
    study = study_of(run, copied(made, tmp_path / "to", mixed))
    outcome = study.perform(DEFINITION)
    table = pq.read_table(study.folder / PAIRS).to_pandas()
    best = table[(table["rank"] == 0) & (table["class"] != "rare")]
    assert len(best) == outcome.figures["judged"] > 30
    assert (best["class"] == "same direction").all()
    assert (best["partner"] == order.numpy()[best["feature"]]).all()
    for name in ("r", "cosine", "given_partner", "given_latent", "phi", "jaccard", "explained"):
        np.testing.assert_allclose(best[name].astype(float), 1, atol=1e-5)
    null = outcome.figures["null"]
    assert null["classes"]["same direction"] == null["classes"]["other direction"] == 0
    mine = pq.read_table(study.folder / FEATURES).to_pandas()
    assert len(mine) == made.sae.d_sae
    predicting = mine[mine["predicts"].fillna(0) > 0]
    np.testing.assert_allclose(predicting["r"].astype(float), 1, atol=1e-5)
    assert outcome.summary[0].startswith(f"{outcome.figures['predicted']} (100.0%)")


@pytest.mark.usefixtures("every_unit")
@pytest.mark.parametrize("same_store", [True, False])
def test_layers_are_joined_by_token_in_either_order(
    made: Made, tmp_path: Path, same_store: bool
) -> None:
    """Another layer has the same latents, in rows of twice the length; or another store has it."""
    bits = torch.from_numpy(made.rows * 2).bfloat16().view(torch.uint16).numpy()
    twice = SAE.of(
        made.sae.W_enc / 2, made.sae.W_dec, made.sae.b_enc, made.sae.b_dec * 2, made.sae.k
    )
    if same_store:
        made = make_run(tmp_path / "made", random_rows())
        for unit in range(made.store.units):
            part = slice(unit * made.store.unit_tokens, (unit + 1) * made.store.unit_tokens)
            commit(made.store, unit, {LAYER + 1: bits[part]})
        summary.write(made.store, LAYER + 1)
        made.store.declare([LAYER, LAYER + 1])
        later = copied(made, tmp_path / "later", twice, layer=LAYER + 1)
    else:
        store = make_store(
            tmp_path / "t.zarr", bits, context=32, unit=128, chunk=32, layer=LAYER, codec="none"
        )
        assert store.identity != made.store.identity
        config = SAEConfig(d_sae=twice.d_sae, k=twice.k, k_aux=4, dead_after=1000)
        later = tmp_path / "later"
        write_run(later, store, LAYER, config, twice)
    earlier = copied(made, tmp_path / "earlier", made.sae)
    run, to = (earlier, later) if same_store else (later, earlier)
    figures = study_of(run, to, rows=N).perform(DEFINITION).figures
    assert figures["classes"]["same direction"] == figures["judged"] > 30


@pytest.mark.usefixtures("every_unit")
def test_a_stop_keeps_the_pairs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = copied(made, tmp_path / "to", made.sae)
    run = copied(made, tmp_path / "run", made.sae)
    searches = []

    def find(*arguments: Any) -> Found:
        searches.append(1)
        return original(*arguments)

    def stopped(*_: Any) -> None:
        raise Interrupted(2)

    original = pairs.find
    monkeypatch.setattr(pairs, "find", find)
    with monkeypatch.context() as patch:
        patch.setattr(
            study_module, "measure", stopped
        )  # it comes between the search and the null's
        with pytest.raises(Interrupted):
            study_of(run, to).perform(DEFINITION)
    assert len(searches) == 1
    assert study_of(run, to).perform(DEFINITION).figures["predicted"] > 30
    assert len(searches) == 2  # the null's alone is left


def test_transcoders_of_two_layers_are_compared(tiny_mlps: Store, tmp_path: Path) -> None:
    """Random ones, of which nothing is known but that each reads and writes its own MLP."""
    runs = [mlp_run(tmp_path / f"of{n}", tiny_mlps, n, random_transcoder(n)) for n in MLP_LAYERS]
    figures = study_of(runs[0].run, runs[1].run).perform(DEFINITION).figures
    assert figures["where"] == [run.where for run in runs] and figures["judged"] > 20
    with pytest.raises(SettingError, match=r"study\.causal=1 .*resid_post"):
        other_of(study_of(runs[0].run, runs[1].run, causal=1))


def test_what_cannot_be_compared_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"study\.to is missing"):
        other_of(Study("cross_layer", study_of(made.run, "x").subject, {}, NOWHERE))
    for to, error, name in (
        (made.run, SettingError, "run itself"),
        (tmp_path / "none", StoreError, "none"),
    ):
        with pytest.raises(error, match=name):
            other_of(study_of(made.run, to))
    same = copied(made, tmp_path / "same", made.sae)
    with pytest.raises(SettingError, match=r"study\.causal=3 .*later layer"):
        other_of(study_of(made.run, same, causal=3))
    other = make_run(tmp_path / "other", random_rows()[: N // 2])
    with pytest.raises(SettingError, match="not of the same tokens"):
        other_of(study_of(made.run, other.run))
    for bad in ({"rows": 0}, {"min_firing": 1}, {"causal": -1}):
        with pytest.raises(SettingError, match=f"study.{next(iter(bad))}="):
            other_of(study_of(made.run, same, **bad))


def test_a_crosscoder_is_refused_on_either_side(made: Made, tmp_path: Path) -> None:
    zeros = torch.zeros(2 * D)
    weights = SAE.of(
        torch.rand(2 * D, 8), torch.rand(8, 2 * D), torch.zeros(8), zeros, 2, zeros[:8]
    )
    run = tmp_path / "cross"
    config = SAEConfig(kind="crosscoder", d_sae=8, k=2, k_aux=4)
    layers = [LAYER, LAYER + 1]
    write_run(run, made.store, layers, config, weights, {str(layer): 1.0 for layer in layers})
    subject = Subject.open(run, None, torch.device("cpu"))
    assert "crosscoder" in str(refuses(subject, {}))
    with pytest.raises(PipelineError, match=r"study\.to=.*crosscoder"):
        other_of(study_of(made.run, run))


# -- in the model ----------------------------------------------------------------------------------


def test_an_ablated_direction_is_lost_and_a_bystander_is_not(tiny_study: Any) -> None:
    """Orthogonal directions read at layer 5 and again at layer 6: the stream carries each on."""
    study = tiny_study("cross_layer", to="itself")
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    sae = SAE.of(basis, basis.T.contiguous(), torch.zeros(64), study.subject.sae.b_dec, 16)
    ours = study.subject = replace(study.subject, sae=sae)
    settings = {**ours.config["settings"], "layer": ours.layer + 1}
    theirs = replace(ours, ports=recorded_ports(settings))
    ones = np.ones((64, 1))
    others: Any = [ones] * 12
    found = Found(np.arange(64)[:, None], *others)._replace(q=0 * ones)
    figures = causal.measured(study, theirs, found, ones, 6, StopRequest())
    same = figures["same direction"]
    assert same["measured"] == 6 and same["p"] < 0.02
    assert same["median"] > 0.5 > 0.2 > same["median_controls"]
    assert figures["other direction"]["measured"] == 0
