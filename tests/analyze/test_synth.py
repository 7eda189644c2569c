"""Known features: the rows are made as they are said to be, and the figures see what is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from residual_saes.analyze.studies.synth import study, training, verdict
from residual_saes.analyze.studies.synth.baselines import (
    ORACLE,
    PCA,
    RANDOM,
    UNTRAINED,
    baselines,
    pursuit,
)
from residual_saes.analyze.studies.synth.planted import (
    CHOICE,
    HELD_OUT,
    NO_PARENT,
    SPREAD,
    TRAIN,
    WITH_CHILD,
    Batch,
    World,
)
from residual_saes.analyze.studies.synth.scores import (
    NONE,
    Code,
    Detection,
    descendants,
    matched,
    scores,
)
from residual_saes.analyze.studies.synth.study import Options
from residual_saes.analyze.studies.synth.training import Dictionary
from residual_saes.conf.command import plain
from residual_saes.data.errors import SettingError
from residual_saes.data.settings import build
from residual_saes.train import objective
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import SAE

WORLD = Options(n_features=60, d_model=24, active=5.0, hierarchy=0.6, tail=1.0).world(3)


@pytest.fixture(scope="module")
def rows() -> Batch:
    return WORLD.draw(TRAIN, 0, 60_000)


@pytest.fixture(scope="module")
def parts() -> tuple[Batch, Batch]:
    return WORLD.draw(CHOICE, 0, 8_192), WORLD.draw(HELD_OUT, 0, 8_192)


def given(**changes: Any) -> Options:
    return build(Options, "study", changes)


# -- rows ------------------------------------------------------------------------------------------


def test_features_fire_as_often_as_the_world_says(rows: Batch) -> None:
    fires = rows.fires.double()
    p = WORLD.frequency
    error = np.sqrt(p * (1 - p) / len(fires))
    assert (np.abs(fires.mean(0).numpy() - p) < 5 * error).all()
    assert p.sum() == pytest.approx(5.0)
    of_roots = np.sort(p[WORLD.roots])[::-1]
    free = np.flatnonzero(of_roots < 0.399)  # the others are cut off
    ratio = of_roots[free] / of_roots[free[-1]]
    assert ratio == pytest.approx((1 + free[-1]) / (1 + free))  # to the power of tail 1


def test_a_child_implies_its_parent_and_excludes_its_siblings(rows: Batch) -> None:
    fires = rows.fires.numpy()
    children = np.flatnonzero(WORLD.parent != NO_PARENT)
    assert len(children) == 33 and len(descendants(WORLD, 0)) == 12
    for child in children:
        assert not (fires[:, child] & ~fires[:, WORLD.parent[child]]).any()
    of_root = fires[:, WORLD.parent == 0]
    assert of_root.shape[1] == 3 and of_root.sum(1).max() == 1
    here = fires[:, 0]
    error = np.sqrt(WITH_CHILD * (1 - WITH_CHILD) / here.sum())
    assert abs(of_root.any(1)[here].mean() - WITH_CHILD) < 5 * error


def test_roots_of_a_topic_fire_together_as_the_copula_says(rows: Batch) -> None:
    fires = rows.fires.numpy()
    rho = np.array([[1, WORLD.correlation], [WORLD.correlation, 1]])
    for same in (True, False):
        compared = 0
        for i, j in np.ndindex(len(WORLD.roots), len(WORLD.roots)):
            if i >= j or (WORLD.topic[i] == WORLD.topic[j]) != same:
                continue
            p = WORLD.frequency[WORLD.roots[[i, j]]]
            if p.min() < 0.02:
                continue
            limit = norm.ppf(p)
            both = float(multivariate_normal.cdf(limit, cov=rho)) if same else float(p.prod())
            seen = (fires[:, WORLD.roots[i]] & fires[:, WORLD.roots[j]]).mean()
            assert abs(seen - both) < 5 * np.sqrt(both * (1 - both) / len(fires)), (i, j)
            compared += 1
        assert compared > 20


def test_rows_are_the_sums_of_their_features(rows: Batch) -> None:
    assert torch.linalg.vector_norm(WORLD.directions, dim=1).numpy() == pytest.approx(1, abs=1e-6)
    noise = (rows.x - WORLD.offset - rows.amounts @ WORLD.directions).numpy()
    assert noise.std() == pytest.approx(WORLD.noise, rel=0.01)
    assert abs(noise.mean()) < 1e-3
    for feature in np.flatnonzero(WORLD.frequency > 0.05):
        amount = rows.amounts[rows.fires[:, feature], feature].numpy()
        assert amount.mean() == pytest.approx(WORLD.mean_amount[feature], rel=0.03)
        assert np.log(amount).std() == pytest.approx(SPREAD, rel=0.1)


def test_rows_are_a_pure_function_of_world_part_and_number() -> None:
    again = other(WORLD.seed)
    assert torch.equal(again.draw(TRAIN, 5, 64).x, WORLD.draw(TRAIN, 5, 64).x)
    others = [WORLD.draw(TRAIN, 6, 64), WORLD.draw(CHOICE, 5, 64), other(4).draw(TRAIN, 5, 64)]
    for batch in others:
        assert not torch.equal(batch.x, WORLD.draw(TRAIN, 5, 64).x)
    stream = training.stream_of(WORLD, 4 * training.BATCH)
    third = next(stream.reader.batches(3))
    assert torch.equal(third, WORLD.draw(TRAIN, 3, training.BATCH).x)


def vars_of(world: World) -> dict[str, Any]:
    return {name: getattr(world, name) for name in World.__dataclass_fields__}


def other(seed: int) -> World:
    return World(**{**vars_of(WORLD), "seed": seed})


# -- figures ---------------------------------------------------------------------------------------


def truth(batch: Batch) -> Code:
    """A latent for each feature, active exactly where the feature is."""
    return Code(batch.amounts, WORLD.directions, WORLD.offset)


def test_the_truth_has_every_figure_at_its_end(parts: tuple[Batch, Batch]) -> None:
    found = scores(WORLD, *parts, *map(truth, parts))
    for key in ("f1", "precision", "recall", "f1_by_decoder"):
        assert found[key] == 1, key
    assert found["mcc"] == pytest.approx(1)
    assert found["absorption"] == 0 and found["split"] == 0
    assert found["variance_explained"] > 0.99
    assert found["l0"] == pytest.approx(5, rel=0.05)
    relabelled = [
        Code(code.f[:, perm], code.W_dec[perm], code.b_dec)
        for code in map(truth, parts)
        for perm in [torch.arange(59, -1, -1)]
    ]
    assert scores(WORLD, *parts, *relabelled) == pytest.approx(found)


def absorbing(batch: Batch, child: int) -> Code:
    """The parent's latent is silent where one child is active, whose latent writes both."""
    parent = WORLD.parent[child]
    f, W_dec = batch.amounts.clone(), WORLD.directions.clone()
    f[batch.fires[:, child], parent] = 0
    W_dec[child] += W_dec[parent]
    return Code(f, W_dec, WORLD.offset)


def test_absorption_is_the_share_of_a_parent_that_its_child_takes(
    parts: tuple[Batch, Batch],
) -> None:
    child = 1
    codes = [absorbing(batch, child) for batch in parts]
    found = scores(WORLD, *parts, *codes)
    fires = parts[1].fires
    share = float(fires[:, child].sum() / fires[:, 0].sum())
    judged = [
        p for p in np.unique(WORLD.parent[WORLD.parent != NO_PARENT]) if fires[:, p].sum() >= 10
    ]
    # A child that is too small beside its parent does not write .4 of it.
    assert 0.8 * share / len(judged) < found["absorption"] <= share / len(judged)
    assert found["absorption_by_chance"] < found["absorption"] / 5
    assert found["recall"] < 1 and found["precision"] == 1


def test_latents_of_others_are_no_absorption(parts: tuple[Batch, Batch]) -> None:
    """A root that fires often, in the child's place, is counted as chance alone."""
    frequent = int(WORLD.roots[np.argsort(-WORLD.frequency[WORLD.roots])][1])
    parent = 0
    codes = []
    for batch in parts:
        f, W_dec = batch.amounts.clone(), WORLD.directions.clone()
        f[batch.fires[:, frequent], parent] = 0
        W_dec[frequent] += 2 * W_dec[parent]
        codes.append(Code(f, W_dec, WORLD.offset))
    found = scores(WORLD, *parts, *codes)
    assert found["absorption"] < found["absorption_by_chance"]


def test_a_feature_of_two_latents_is_split(parts: tuple[Batch, Batch]) -> None:
    feature = int(np.argmax(WORLD.frequency))
    codes = []
    for batch in parts:
        half = (batch.amounts[:, feature] > float(WORLD.mean_amount[feature])).float()
        f = torch.cat([batch.amounts, batch.amounts[:, [feature]] * half[:, None]], 1)
        f[:, feature] *= 1 - half
        dead = torch.zeros(len(f), 1)
        W_dec = torch.cat([WORLD.directions, WORLD.directions[[feature, feature]]])
        codes.append(Code(torch.cat([f, dead], 1), W_dec, WORLD.offset))
    found = scores(WORLD, *parts, *codes)
    judged = int(((parts[0].fires.sum(0) >= 10) & (parts[1].fires.sum(0) >= 10)).sum())
    assert found["split"] == pytest.approx(1 / judged)
    assert found["dead"] == pytest.approx(1 / 62)


def test_detection_against_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    fires, active = rng.random((50, 4)) < 0.3, rng.random((50, 6)) < 0.4
    found = Detection.of(torch.tensor(fires).float(), torch.tensor(active).float())
    for i, j in np.ndindex(4, 6):
        right = int((fires[:, i] & active[:, j]).sum())
        precision, recall = right / active[:, j].sum(), right / fires[:, i].sum()
        assert found.precision[i, j] == pytest.approx(precision)
        assert found.recall[i, j] == pytest.approx(recall)
        expected = 2 * precision * recall / (precision + recall) if right else 0
        assert found.f1[i, j] == pytest.approx(expected)
    partner = matched(np.array([[0.9, 0.8], [0.8, 0.1], [0.7, 0.0]]))
    assert partner.tolist() == [1, 0, NONE]  # one to one, of the largest sum


def test_worthless_dictionaries_and_the_oracle(parts: tuple[Batch, Batch]) -> None:
    options = given(n_features=60, d_model=24, d_sae=60, tokens=2048)
    config = options.config(Dictionary("topk", 6), 3)
    stream = training.stream_of(WORLD, 2048)
    found = {}
    for name, encode in baselines(WORLD, stream, config).items():
        found[name] = scores(WORLD, *parts, *(encode(batch.x) for batch in parts))
    always = float(np.mean(2 * WORLD.frequency / (1 + WORLD.frequency)))
    for name in (RANDOM, PCA):
        assert found[name]["f1_by_decoder"] < 2 * always, name
    assert found[ORACLE]["f1"] > 2 * found[UNTRAINED]["f1"]
    assert found[ORACLE]["f1"] > 3 * max(found[RANDOM]["f1"], found[PCA]["f1"])
    assert found[ORACLE]["mcc"] == pytest.approx(1)


def test_matching_pursuit_explains_more_than_the_encoder(parts: tuple[Batch, Batch]) -> None:
    mean = parts[0].x.mean(0)
    W = WORLD.directions
    sae = SAE(W, W.clone(), torch.zeros(len(W)), mean, 5)
    code = pursuit(sae)(parts[1].x)
    assert (code.f >= 0).all() and int((code.f > 0).sum(1).max()) <= 5
    rest = parts[1].x - code.b_dec - code.f @ code.W_dec
    assert rest.square().sum() < (parts[1].x - sae(parts[1].x)).square().sum()
    one = pursuit(SAE(W, W, torch.zeros(len(W)), torch.zeros(24), 1))(2.0 * W)
    assert torch.equal(one.f.argmax(1), torch.arange(len(W)))
    assert one.f.max(1).values.numpy() == pytest.approx(2, abs=1e-5)


# -- the verdict -----------------------------------------------------------------------------------


def test_equal_arms_are_told_apart_in_five_of_a_hundred_tables() -> None:
    rng = np.random.default_rng(0)
    tables = 2 * rng.normal(size=(600, 1, 3)) + rng.normal(size=(600, 6, 3))
    told = [np.abs(verdict.differences(t)).max() > verdict.half_width(t) for t in tables]
    assert 0.025 < np.mean(told) < 0.08


def test_a_disagreement_needs_both_figures() -> None:
    rng = np.random.default_rng(1)
    world = rng.normal(size=3)
    noise = 0.01 * rng.normal(size=(2, 3, 3))
    explained = np.array([[0.0], [1.9], [2.0]]) + world + noise[0]
    finds = np.array([[1.0], [1.0], [0.0]]) + noise[1]
    pairs = verdict.disagreements(explained, finds)
    assert pairs == [(2, 0), (2, 1)]  # 2 and 0 are farther apart in the first figure
    assert not verdict.disagreements(explained, explained)
    assert not verdict.disagreements(explained[:, :1], finds[:, :1])  # one world


# -- the command -----------------------------------------------------------------------------------

SMALL = {
    "objectives": ["topk", "batchtopk"],
    "k": 2,
    "n_features": 24,
    "d_model": 10,
    "d_sae": 16,
    "active": 2.0,
    "tokens": 1024,
    "rows": 1024,
    "seeds": 2,
}


def asked(out: Path, **changes: Any) -> dict[str, Any]:
    study = {"name": "synth", **SMALL, **changes}
    return {"run": None, "runs": None, "store": None, "out": str(out), "study": study}


def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study.compare(asked(tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "synth.json").read_text())
    assert "Variance explained and F1 disagree on" in capsys.readouterr().out
    made = list[str]()

    def stopping(*args: Any) -> dict[str, float]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append("")
        return scores(*args)

    with monkeypatch.context() as patched:
        patched.setattr(study.scores, "scores", stopping)
        with pytest.raises(KeyboardInterrupt):
            study.compare(asked(tmp_path / "stopped"))
    saes = sorted((tmp_path / "stopped" / "arms").glob("*/sae_final.pt"))
    assert len(saes) == 2  # of the first world
    before = [path.stat().st_mtime_ns for path in saes]
    study.compare(asked(tmp_path / "stopped"))
    assert [path.stat().st_mtime_ns for path in saes] == before
    assert json.loads((tmp_path / "stopped" / "synth.json").read_text()) == whole

    figures = whole["figures"]
    assert figures["compared"] == ["topk k 2", "batchtopk k 2", "pursuit k 2"]
    assert figures["arms"]["topk k 2"]["l0"]["mean"] == pytest.approx(2, rel=0.05)
    assert figures["arms"][ORACLE]["f1"]["mean"] > figures["arms"]["topk k 2"]["f1"]["mean"]
    page = (tmp_path / "whole" / "synth.html").read_text()
    assert whole["summary"][0] in page and "<script" not in page


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": [2, 200]}, "study.k=200"),
        ({"k": []}, "study.k"),
        ({"k": [2, 2]}, "study.k"),
        ({"k": 2.5}, "study.k=2.5"),
        ({"objectives": "sparse"}, "study.objectives=sparse"),
        ({"l1": [1.0]}, "study.l1"),
        ({"tokens": 10}, "study.tokens=10"),
        ({"seeds": 0}, "study.seeds=0"),
        ({"hierarchy": 1.5}, "study.hierarchy=1.5"),
        ({"correlation": 1.0}, "study.correlation=1.0"),
        ({"active": 60.0}, "study.active=60.0"),
        ({"noise": float("nan")}, "study.noise=nan"),
        ({"noise": "loud"}, "study.noise=loud"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError) as caught:
        given(**changes)
    assert named in str(caught.value)


def test_rows_on_which_nothing_can_be_judged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"study\.rows=100"):
        study.compare(asked(tmp_path, rows=100, active=0.01))


def test_it_takes_no_run(tmp_path: Path) -> None:
    for name in ("run", "runs", "store"):
        with pytest.raises(SettingError, match=f"{name}=x"):
            study.compare({**asked(tmp_path), name: "x"})


def test_arms_are_trained_as_the_presets_say() -> None:
    """Sizes and rates are the study's own; all else is conf/sae's and conf/optim's."""
    from hydra import compose, initialize_config_module

    own = {"activation", "d_sae", "k", "k_aux", "name", "l1_coef", "nested"}
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        rows = plain(compose("train", ["sae=rows_32k", "optim=rows"]))
    assert study.objective.names() == objective.names()
    for name in objective.names():
        config = given().config(Dictionary(name, 6), 0)
        for key, value in rows["sae"].items():
            if key not in own and (name, key) != ("gated", "aux_coef"):
                assert getattr(config.sae, key) == value, (name, key)
        assert config.sae.activation == name
        for key in set(OptimConfig.__dataclass_fields__) - {"lr", "LATER"}:
            assert getattr(config.optim, key) == rows["optim"][key], key
