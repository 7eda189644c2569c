"""Every figure of study=quality against its definition, in numpy over all held-out rows at once."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from analyze.stats import bootstrap_ratio
from analyze.studies import quality as study
from analyze.subject import Subject
from data import durable
from data.rows.split import held_out_units
from tests.analyze.conftest import F, K, Made
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
        self.mu = made.rows[~held & (tokens != BOS) & ~outlier].mean(0)


def dense(made: Made, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    W_enc, W_dec, b_enc, b_dec = (tensor.double().numpy() for tensor in made.sae.tensors().values())
    pre = (x - b_dec) @ W_enc + b_enc
    threshold = np.sort(pre, axis=1)[:, -K][:, None]
    f = np.where(pre >= threshold, np.maximum(pre, 0), 0)
    return f @ W_dec + b_dec, f


@pytest.fixture(scope="module")
def reference(made: Made) -> Reference:
    return Reference(made)


@pytest.fixture(scope="module")
def figures(made: Made) -> dict[str, Any]:
    subject = Subject.open(made.run, None, torch.device("cpu"))
    found = study.quality(subject, 10**6)
    study.write(subject, study.outcome_of(subject, found))
    return found


def centred(reference: Reference, mask: NDArray[np.bool_]) -> float:
    return 1 - (reference.e[mask] ** 2).sum() / ((reference.x[mask] - reference.mu) ** 2).sum()


def test_variance_explained_by_every_definition(
    figures: dict[str, Any], reference: Reference
) -> None:
    kept, x, e = reference.kept, reference.x[reference.kept], reference.e[reference.kept]
    assert figures["rows"] == kept.sum()
    subsets = figures["variance_explained"]
    expected = {"as trained": kept, "all rows": kept | True, "without BOS": ~reference.bos}
    for name, mask in expected.items():
        assert subsets[name]["centred"] == pytest.approx(centred(reference, mask), rel=1e-5)
    assert subsets["without BOS and outliers"]["centred"] == subsets["as trained"]["centred"]
    assert subsets["all rows"]["centred"] != pytest.approx(
        subsets["as trained"]["centred"], abs=1e-3
    )
    assert figures["variance_of_error"] == pytest.approx(
        1 - e.var(0).sum() / x.var(0).sum(), rel=1e-5
    )
    assert figures["scalar"] == pytest.approx(1 - (e**2).mean() / x.var(ddof=1), rel=1e-5)


def test_batch_definitions(figures: dict[str, Any], reference: Reference) -> None:
    error, batch = (reference.e**2).sum(1), np.empty(len(reference.x))
    for at in range(0, len(batch), 128):  # one batch a unit: units are smaller than 4,096 rows
        part, mask = reference.x[at : at + 128], reference.kept[at : at + 128]
        batch[at : at + 128] = ((part - part[mask].mean(0)) ** 2).sum(1)
    kept, found = reference.kept, figures
    assert found["batch_mean"] == pytest.approx(1 - error[kept].sum() / batch[kept].sum(), rel=1e-5)
    assert found["mean_of_ratios"] == pytest.approx(
        (1 - error[kept] / batch[kept]).mean(), rel=1e-5
    )


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


def test_latents_are_counted(figures: dict[str, Any], reference: Reference) -> None:
    fires = reference.f[reference.kept] > 0
    assert figures["silent"] == (~fires.any(0)).sum()
    assert figures["density"]["above_10_percent"] == (fires.mean(0) > 0.1).sum()
    *_, last = figures["coverage"]
    assert last == {"rows": len(fires), "share": fires.any(0).mean()}
    assert figures["silent_for"] == {}  # too few rows to say


@pytest.fixture
def latents() -> study.Latents:
    """900 rows in which five of six latents fire once."""
    counted = study.Latents(6)
    counted.add(np.arange(5), np.array([0, 255, 256, 511, 600]), 900)
    return counted


def test_coverage_counts_the_first_rows(latents: study.Latents) -> None:
    assert latents.coverage() == [
        {"rows": 256, "share": 2 / 6},
        {"rows": 512, "share": 4 / 6},
        {"rows": 900, "share": 5 / 6},
    ]


def test_latents_are_silent_for_a_span_or_not(latents: study.Latents) -> None:
    assert latents.silent_for((300, 600, 10_000)) == {"300": 3, "600": 2}
    assert latents.fired.tolist() == [1, 1, 1, 1, 1, 0]


def test_counting_goes_on_from_batch_to_batch() -> None:
    latents = study.Latents(3)
    for latent, row in (([0, 0, 0], [0, 1, 1]), ([1, 0, 2], [0, 1, 1])):
        latents.add(np.array(latent), np.array(row), 2)
    assert latents.rows == 4
    assert latents.fired.tolist() == [4, 1, 1]
    assert latents.first.tolist() == [0, 2, 3]


def test_groups_add_up(figures: dict[str, Any], reference: Reference) -> None:
    error, total = (reference.e**2).sum(1), ((reference.x - reference.mu) ** 2).sum(1)
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
            assert group["centred"] == pytest.approx(
                1 - error[inside].sum() / total[inside].sum(), rel=1e-5
            )
    assert figures["by_position"][0]["from"] == 1  # BOS, at 0, is left out by the policy
    deciles = [group["rows"] for group in figures["by_norm_decile"]]
    assert max(deciles) - min(deciles) <= 2


def test_the_interval_is_of_documents(figures: dict[str, Any], reference: Reference) -> None:
    low, high = figures["variance_explained"]["as trained"]["centred_95"]
    assert low < figures["variance_explained"]["as trained"]["centred"] < high
    kept = reference.kept
    assert figures["documents"] == len(np.unique(reference.documents[kept]))
    by_document = [
        np.flatnonzero(kept & (reference.documents == d))
        for d in np.unique(reference.documents[kept])
    ]
    error, total = (reference.e**2).sum(1), ((reference.x - reference.mu) ** 2).sum(1)
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
    found = study.decoder_cosine(W_dec)
    assert found["max"] == pytest.approx(0.8)
    # The median of 0.6, 0.8, 0 and 0.8: torch takes the lower middle.
    assert found["median"] == pytest.approx(0.6)
    assert found["above_0.9"] == 0


def test_files_are_written(figures: dict[str, Any], made: Made) -> None:
    written = json.loads((made.run / "quality.json").read_bytes())
    assert written.pop("sae") == durable.digest_file(made.run / "sae_final.pt").xxh3_128
    assert written == json.loads(json.dumps(figures))
    text = (made.run / "quality.md").read_text()
    assert f"{figures['variance_explained']['as trained']['centred']:.4f}" in text
    assert f"{figures['silent']} of {F}" in text
