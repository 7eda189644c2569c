"""The catalogue pack of chosen features: what the reference loads, and an honest verdict."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.analyze.studies.stage_gate import pack
from residual_saes.analyze.study import Study
from tests.analyze.test_stage_gate import SAMPLES, first_input, made, verdict

# Fields of an entry of catalogs/qwen3.5-4b/reasoning_pack.json, with their types.
ENTRY = {
    **{"feature_id": int, "effect_size": float, "mean_correct": float, "mean_wrong": float},
    **{"weight": float, "validated": bool},
}
TOP = {
    **dict.fromkeys(("name", "version", "model_name", "release", "sae_id", "description"), str),
    **{"helpful_features": list, "harmful_features": list, "validation": dict, "metadata": dict},
}


@dataclasses.dataclass
class LoadedFeature:
    """The fields that the reference's loader keeps; the first three have no default there."""

    feature_id: int
    name: str
    description: str
    weight: float = 1.0
    release: str = ""
    sae_id: str = ""
    activation_threshold: float = 0.0
    validated: bool = False
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def loaded(content: dict[str, Any]) -> list[LoadedFeature]:
    """As the reference's loader makes them: the list `features`, unknown keys left out."""
    names = {field.name for field in dataclasses.fields(LoadedFeature)}
    known = [{key: one[key] for key in names & set(one)} for one in content.get("features", [])]
    return [LoadedFeature(**one) for one in known]


def packed(study: Study, means: Means, figures: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(dumped(pack.pack(study, figures, means)))
    for name, kind in TOP.items():
        assert isinstance(content[name], kind), name
    for feature in content["helpful_features"] + content["harmful_features"]:
        assert {name: type(value) for name, value in feature.items()} == ENTRY
    return content


def test_a_passing_gates_pack_is_loaded_whole(tiny_study: Any) -> None:
    study = tiny_study("stage_gate")
    means = made(np.random.default_rng(0), effect=2.0)
    figures = verdict(means, fit_probe=first_input)
    content = packed(study, means, figures)
    assert content["name"] == "tiny/reasoning_pack" and content["sae_id"] == "layer_5"
    assert content["validation"]["verdict"] == "PASS" and content["validation"]["missing"] == []
    features = loaded(content)
    weights = {feature.feature_id: feature.weight for feature in features}
    assert weights == {number: 1.0 if number < 10 else -1.0 for number in range(20)}
    assert all(feature.validated for feature in features)
    assert len({feature.name for feature in features}) == 20
    ids = figures["discovery"]["ids"]
    rows = np.isin(means.question, ids)
    first = content["helpful_features"][0]
    activations = means.features[:, [first["feature_id"]]].toarray()[rows, 0]
    right = means.correct[rows]
    assert first["mean_correct"] == pytest.approx(activations[right].mean(), rel=1e-5)
    assert first["mean_wrong"] == pytest.approx(activations[~right].mean(), rel=1e-5)
    metadata = content["metadata"]
    assert (metadata["d_sae"], metadata["target_layer"], metadata["d_model"]) == (256, 5, 64)
    assert metadata["num_hidden_layers"] == study.n_layers


@pytest.mark.parametrize("verdict_is", ["fail", "undecided"])
def test_a_gate_that_did_not_pass_validates_nothing(tiny_study: Any, verdict_is: str) -> None:
    rng = np.random.default_rng(1)
    means = made(rng, 60, effect=2.0, samples=SAMPLES if verdict_is == "fail" else 1)
    if verdict_is == "fail":
        labels = rng.permuted(means.correct.reshape(-1, SAMPLES), axis=1).ravel()
        means = means._replace(correct=labels)
    figures = verdict(means, fit_probe=first_input)
    assert figures["verdict"] == verdict_is
    content = packed(tiny_study("stage_gate"), means, figures)
    assert content["validation"]["verdict"] == verdict_is.upper()
    assert content["validation"]["missing"] and content["description"].startswith("NOT VALIDATED")
    entries = content["helpful_features"] + content["harmful_features"] + content["features"]
    assert entries and not any(entry["validated"] for entry in entries)


@pytest.mark.parametrize(
    ("model", "named"),
    [("google/gemma-4-E4B", "google/gemma-4-E4B"), ("/home/me/models/Mine", "Mine"), ("../m", "m")],
)
def test_no_folder_is_named(tiny_study: Any, model: str, named: str) -> None:
    study = tiny_study("stage_gate")
    study.subject.store.manifest["model"]["id"] = model
    means = made(np.random.default_rng(0), 40, effect=2.0)
    content = packed(study, means, verdict(means, fit_probe=first_input))
    assert content["model_name"] == named
    assert "/home" not in json.dumps(content)
    assert content["name"] == f"{named.rpartition('/')[2].lower()}/reasoning_pack"
