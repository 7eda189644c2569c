"""Every figure of study=quality against its definition, in numpy over all held-out rows at once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.analyze import reconstruction
from residual_saes.analyze.latents.budgets import Budgets
from residual_saes.analyze.latents.nearest import nearest_others
from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.stats import bootstrap_ratio
from residual_saes.analyze.studies import quality as study
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.rows.split import Policy, held_out_units
from residual_saes.harvest.model import ModelConfig
from tests.analyze.conftest import F, K, Made, make_run, random_rows
from tests.conftest import BOS


class Reference:
    """Held-out rows, in stored order, and their reconstruction by dense float64 arithmetic."""

    def __init__(self, made: Made) -> None:
        store = made.store
        units = held_out_units(store)
        flat = np.concatenate(
            [store.permutation(unit) + unit * store.unit_tokens for unit in units]
        )
        tokens = np.concatenate([store.tokens(unit).ravel() for unit in range(store.units)])
        self.documents = np.concatenate(
            [store.document(unit).ravel() for unit in range(store.units)]
        )[flat]
        self.x = made.rows[flat]
        self.hat, self.f = dense(made, self.x)
        self.e = self.x - self.hat
        self.bos = tokens[flat] == BOS
        starts = np.flatnonzero(tokens == BOS)
        self.position = flat - starts[np.searchsorted(starts, flat, side="right") - 1]
        every = np.linalg.norm(made.rows, axis=1).reshape(-1, 128)
        outlier = (every > 10 * np.median(every, axis=1, keepdims=True)).ravel() & (tokens != BOS)
        self.outlier = outlier[flat]
        self.kept = ~self.bos & ~self.outlier
        held = np.isin(np.arange(len(tokens)) // 128, units)
        self._training = made.rows[~held]
        self._bos = (tokens == BOS)[~held]
        self._outlier = outlier[~held]

    def training_mean(self, subset: str) -> NDArray[np.float64]:
        """The mean of the training rows of a subset."""
        dropped = {"all rows": self._bos & False, "without BOS": self._bos}
        return self._training[~dropped.get(subset, self._bos | self._outlier)].mean(0)


def dense(
    made: Made, x: NDArray[np.float64], k: int = K
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    W_enc, W_dec, b_enc, b_dec = (tensor.double().numpy() for tensor in made.sae.tensors().values())
    pre = (x - b_dec) @ W_enc + b_enc
    threshold = np.sort(pre, axis=1)[:, -k][:, None]
    f = np.where(pre >= threshold, np.maximum(pre, 0), 0)
    return f @ W_dec + b_dec, f


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run whose store has an outlier in every unit, held out or not."""
    values = torch.from_numpy(random_rows()).view(torch.bfloat16).clone()
    values[7::128] *= 100
    return make_run(tmp_path_factory.mktemp("quality"), values.view(torch.uint16).numpy())


@pytest.fixture(scope="module")
def reference(made: Made) -> Reference:
    return Reference(made)


@pytest.fixture(scope="module")
def figures(made: Made) -> dict[str, Any]:
    subject = Subject.open(made.run, None, torch.device("cpu"))
    found = study.quality(subject, 10**6)
    asked = Study("quality", subject, {"rows": 10**6}, ModelConfig("nobody/none"))
    asked.perform(study.DEFINITION)
    return found


SUBSETS = {
    "as trained": lambda reference: reference.kept,
    "all rows": lambda reference: reference.kept | True,
    "without BOS": lambda reference: ~reference.bos,
    "without BOS and outliers": lambda reference: reference.kept,
}


@pytest.mark.parametrize("name", SUBSETS)
def test_every_definition_of_every_subset(
    figures: dict[str, Any], reference: Reference, name: str
) -> None:
    """A subset has one mean, its own: of its training rows, or of its rows of the batch."""
    mask = SUBSETS[name](reference)
    found = figures["variance_explained"][name]
    x, e = reference.x[mask], reference.e[mask]
    error = (e**2).sum(1)
    mu = reference.training_mean(name)
    about_batch = np.empty(len(reference.x))
    for at in range(0, len(about_batch), 128):  # one batch a unit: units have fewer than 4,096 rows
        part, inside = reference.x[at : at + 128], mask[at : at + 128]
        about_batch[at : at + 128] = ((part - part[inside].mean(0)) ** 2).sum(1)
    expected = {
        "centred": 1 - error.sum() / ((x - mu) ** 2).sum(),
        "batch_mean": 1 - error.sum() / about_batch[mask].sum(),
        "mean_of_ratios": (1 - error / about_batch[mask]).mean(),
        "variance_of_error": 1 - e.var(0).sum() / x.var(0).sum(),
        "scalar": 1 - (e**2).mean() / x.var(ddof=1),
    }
    assert found["rows"] == mask.sum()
    for definition, value in expected.items():
        assert found[definition] == pytest.approx(value, rel=1e-5)
    energy = (reference.x**2).sum(1)
    left_out = found["left_out"].values()
    assert sum(share["count"] for share in left_out) == (~mask).sum()
    assert sum(share["rows"] for share in left_out) == pytest.approx((~mask).mean())
    share = energy[~mask].sum() / energy.sum()
    assert sum(share["energy"] for share in left_out) == pytest.approx(share)
    if name == "as trained":
        assert {key: figures[key] for key in study.DEFINITIONS} == {
            key: found[key] for key in study.DEFINITIONS
        }


def test_a_subset_has_one_figure_whatever_was_trained_on(
    figures: dict[str, Any], subject: Subject
) -> None:
    """Outliers 100 times as long do not flatter the ordinary rows of a run that kept them."""
    every = Policy(drop_bos=False, drop_outliers=False)
    other = study.quality(replace(subject, policy=every), 10**6)["variance_explained"]
    for name in ("all rows", "without BOS", "without BOS and outliers"):
        assert other[name] == figures["variance_explained"][name]
    assert other["as trained"] == other["all rows"]


def test_what_is_left_out_stands_beside_the_headline(
    figures: dict[str, Any], subject: Subject, reference: Reference
) -> None:
    first = study.outcome_of(subject, figures).summary[0]
    energy = (reference.x**2).sum(1)
    for mask in (reference.bos, reference.outlier):
        assert mask.any()
        share = energy[mask].sum() / energy.sum()
        assert f"({mask.sum():,} rows: {mask.mean():.3%} of rows, {share:.3%} of E|x|²)" in first


def test_one_document_has_figures_and_no_interval(subject: Subject) -> None:
    measured = reconstruction.measure(subject, 10**6)
    rows = measured.whole.rows
    alone = rows._replace(document=np.zeros_like(rows.document))
    found = study.variance_explained(measured, measured.whole, alone, subject.policy)
    assert found["centred_95"] is None and found["documents"] == 1


def test_reconstruction_figures(figures: dict[str, Any], reference: Reference) -> None:
    kept = reference.kept
    x, hat, e = reference.x[kept], reference.hat[kept], reference.e[kept]
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(hat, axis=1)
    assert figures["mse_per_element"] == pytest.approx((e**2).mean(), rel=1e-5)
    assert figures["mse_per_row"] == pytest.approx((e**2).sum(1).mean(), rel=1e-5)
    assert figures["l0"] == (reference.f[kept] > 0).sum(1).mean()
    assert figures["cosine"] == pytest.approx(
        ((x * hat).sum(1) / norms[0] / norms[1]).mean(), rel=1e-5
    )
    assert figures["l2_ratio"] == pytest.approx((norms[1] / norms[0]).mean(), rel=1e-5)
    assert figures["shrinkage"] == pytest.approx((hat**2).sum() / (x * hat).sum(), rel=1e-5)


def test_a_topk_sae_is_read_with_fewer_latents_too(
    figures: dict[str, Any], reference: Reference, made: Made
) -> None:
    kept = reference.kept
    x = reference.x[kept]
    about_mean = ((x - reference.training_mean("as trained")) ** 2).sum()
    halvings = [K >> level for level in range(1, K.bit_length())]
    assert [at["k"] for at in figures["by_k"]] == halvings
    for at in figures["by_k"]:
        hat, _ = dense(made, x, at["k"])
        explained = 1 - ((x - hat) ** 2).sum() / about_mean
        assert at["explained"]["value"] == pytest.approx(explained, abs=1e-6)
        assert at["explained"]["interval"][0] <= at["explained"]["value"]


def test_an_sae_with_thresholds_has_no_k_to_lower(subject: Subject) -> None:
    sae = replace(subject.sae, threshold=torch.zeros(F))
    budgets = Budgets(replace(subject, sae=sae))
    unit = next(subject.rows(1))
    budgets.add(unit, sae.encode(unit.rows))
    assert budgets.figures(unit.document, np.ones(len(unit.rows))) == []


def test_latents_are_counted(figures: dict[str, Any], reference: Reference) -> None:
    fires = reference.f[reference.kept] > 0
    assert figures["silent"] == (~fires.any(0)).sum()
    assert figures["density"]["above_10_percent"] == (fires.mean(0) > 0.1).sum()
    *_, last = figures["coverage"]
    assert last == {"rows": len(fires), "share": fires.any(0).mean()}
    assert figures["silent_for"] == {}  # too few rows to say


def test_coverage_is_over_rows_in_random_order() -> None:
    """Of a document alone a latent would be seen at once, or not before the last rows."""
    rng = np.random.default_rng(0)
    fires = np.zeros((900, 6), np.bool_)
    for latent, rows in enumerate((range(1), range(3), range(200), range(890, 900), range(900))):
        fires[rows, latent] = True  # the sixth latent is silent
    latents = reconstruction.Latents(6)
    for part in np.array_split(fires, 3):
        latents.add(np.nonzero(part)[1], len(part))
    assert latents.rows == 900 and latents.fired.tolist() == [1, 3, 200, 10, 900, 0]
    seen = np.mean([fires[rng.permutation(900)[:256]].any(0) for _ in range(2000)], axis=0)
    assert latents.seen_in(256) == pytest.approx(seen, abs=0.03)
    assert latents.seen_in(256)[0] == pytest.approx(256 / 900)
    first, second, last = latents.coverage()
    assert [first["rows"], second["rows"], last["rows"]] == [256, 512, 900]
    assert first["share"] == pytest.approx(latents.seen_in(256).mean())
    assert last["share"] == 5 / 6
    silent = latents.silent_for((256, 900, 10_000))
    assert silent == {"256": pytest.approx(6 - latents.seen_in(256).sum()), "900": 1}


def test_groups_add_up(figures: dict[str, Any], reference: Reference) -> None:
    """Each group is about its own mean."""
    error = (reference.e**2).sum(1)
    for groups, value in (
        (figures["by_position"], reference.position),
        (figures["by_norm_decile"], np.linalg.norm(reference.x, axis=1)),
    ):
        assert sum(group["rows"] for group in groups) == reference.kept.sum()
        for group in groups:
            inside = (
                reference.kept
                & (value >= group["from"] * (1 - 1e-6))
                & (value <= group["to"] * (1 + 1e-6))
            )
            assert group["rows"] == inside.sum()
            total = reference.x[inside].var(0).sum() * inside.sum()
            assert group["centred"] == pytest.approx(1 - error[inside].sum() / total, rel=1e-5)
            assert group["l0"] == pytest.approx((reference.f[inside] > 0).sum(1).mean())
    assert figures["by_position"][0]["from"] == 1  # BOS, at 0, is left out by the policy
    deciles = [group["rows"] for group in figures["by_norm_decile"]]
    assert max(deciles) - min(deciles) <= 2


def test_rows_that_are_all_the_same_have_no_variance_to_explain() -> None:
    same = reconstruction.Groups([10], 2)
    x = np.array([[1e4 / 3, 2.0]] * 3)
    row = np.ones(3)
    values = [row, row, row, (x**2).sum(1), row, row, row, row, row, row, row]
    rows = reconstruction.Rows._make(values)
    same.add(np.array([3, 4, 5]), x, rows)
    (group,) = same.figures()
    assert np.isnan(group["centred"])
    assert (group["from"], group["to"], group["rows"]) == (3, 5, 3)


def test_the_interval_is_of_documents(figures: dict[str, Any], reference: Reference) -> None:
    low, high = figures["variance_explained"]["as trained"]["centred_95"]
    assert low < figures["variance_explained"]["as trained"]["centred"] < high
    kept = reference.kept
    assert figures["documents"] == len(np.unique(reference.documents[kept]))
    by_document = [
        np.flatnonzero(kept & (reference.documents == d))
        for d in np.unique(reference.documents[kept])
    ]
    error, total = (
        (reference.e**2).sum(1),
        ((reference.x - reference.training_mean("as trained")) ** 2).sum(1),
    )
    sums = np.array([[error[rows].sum(), total[rows].sum()] for rows in by_document])
    expected = bootstrap_ratio(sums[:, 0], sums[:, 1])
    assert (1 - high, 1 - low) == pytest.approx(tuple(expected), rel=1e-5)


def test_bootstrap_covers_a_planted_truth() -> None:
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        denominator = rng.uniform(1, 3, 60)
        numerator = 0.3 * denominator + rng.normal(0, 0.2, 60)
        low, high = bootstrap_ratio(numerator, denominator, draws=300, seed=seed)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199  # 95 % of 200, with sampling error


def test_decoder_cosine_ignores_the_latent_itself() -> None:
    W_dec = torch.eye(4)
    W_dec[3] = torch.tensor([0.6, 0.8, 0.0, 0.0])
    found = study.decoder_cosine(nearest_others(W_dec, 1)[0][:, 0])
    assert found["max"] == pytest.approx(0.8)
    # The median of 0.6, 0.8, 0 and 0.8: torch takes the lower middle.
    assert found["median"] == pytest.approx(0.6)
    assert found["above_0.9"] == 0


def test_files_are_written(figures: dict[str, Any], made: Made) -> None:
    written = json.loads((made.run / "quality.json").read_bytes())
    assert written.pop("sae") == durable.digest_file(made.run / "sae_final.pt").xxh3_128
    assert written == json.loads(dumped(figures))
    text = (made.run / "quality.md").read_text()
    assert f"{figures['variance_explained']['as trained']['centred']:#.4g}" in text
    assert f"{figures['silent']} of {F}" in text
