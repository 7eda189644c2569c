"""Every MLP replaced at once: by the MLPs themselves as the planted truth, by what is worthless."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy

from residual_saes.analyze import linear
from residual_saes.analyze.linear import LinearMap
from residual_saes.analyze.losses import ALL, TRAINED, choose
from residual_saes.analyze.parts import NOWHERE
from residual_saes.analyze.studies import splice
from residual_saes.analyze.studies.replacement import spliced, study
from residual_saes.analyze.studies.replacement.spliced import (
    IDENTITY,
    LINEAR,
    MEAN,
    TRANSCODERS,
    Layer,
)
from residual_saes.analyze.studies.replacement.study import Options
from residual_saes.analyze.studies.replacement.words import find, outcome_of
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.settings import build
from residual_saes.data.store.kinds import ORDINARY
from residual_saes.data.store.store import Store
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.train.sae import SAE
from tests.analyze.conftest import MLP_LAYERS, mlp_run, random_transcoder

MODEL = ModelConfig(EMBEDDED, dtype="float32")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(MODEL, head=True)


@pytest.fixture(scope="module")
def runs(tiny_mlps: Store, tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """Transcoders that nobody trained."""
    root = tmp_path_factory.mktemp("sweep")
    made = []
    for layer in MLP_LAYERS:
        made.append(mlp_run(root / f"layer_{layer}", tiny_mlps, layer, random_transcoder(layer)))
    return made


class TheMlp:
    """The MLP of a layer with all behind it, in the place of its transcoder."""

    def __init__(self, lm: LanguageModel, subject: Subject) -> None:
        block = lm.blocks[subject.layer]
        # Copies, which the hooks of the model are not on.
        self._modules = deepcopy((block.mlp, block.post_feedforward_layernorm))
        self.b_dec = subject.sae.b_dec
        self.W_skip = None

    @torch.inference_mode()
    def __call__(self, rows: Tensor) -> Tensor:
        for module in self._modules:
            rows = module(rows)
        return rows


def with_saes(runs: Sequence[Subject], made: Callable[[Subject], Any]) -> list[Subject]:
    return [replace(subject, sae=made(subject)) for subject in runs]


def measured(
    lm: LanguageModel,
    subjects: Sequence[Subject],
    runs: Sequence[Subject],
    options: Options,
    linear_of: Callable[[Subject], LinearMap | None] = linear.fitted,
) -> dict[str, Any]:
    """The figures of some transcoders; linear maps are those of `runs`."""
    layers = []
    for subject, run in zip(subjects, runs, strict=True):
        assert run.point and run.target
        layers.append(Layer(subject, run.point, run.target, linear_of(run)))
    read = choose(runs, 200)
    losses = spliced.measure(lm, layers, read, NOWHERE)
    first, *rows = study.figures_of(losses, spliced.ways(layers))
    counted = {"documents": len(np.unique(losses.document)), "tokens": len(losses.document)}
    of_runs = [{"layer": subject.layer, "run": "x"} for subject in runs]
    figures = {"clean": first, "rows": rows, "runs": of_runs, "model": "tiny", "model_layers": 12}
    return {**figures, **counted, "verdict": study.verdict({**figures, **counted}, options)}


def test_the_mlps_themselves_pass_and_cost_nothing(lm: LanguageModel, runs: list[Subject]) -> None:
    def constant(run: Subject) -> LinearMap:
        mean = run.mean.float()
        return LinearMap(torch.zeros(64, 64), torch.zeros(64), mean, 1)

    # The embedded model's MLPs are nearly linear: a good linear map costs no more than they do.
    exact = with_saes(runs, lambda run: TheMlp(lm, run))
    figures = measured(lm, exact, runs, Options(), constant)
    own = find(figures, TRANSCODERS)
    assert abs(own["difference"]["value"]) < 1e-4 and own["kl"]["value"] < 1e-4
    assert find(figures, IDENTITY)["largest_difference"] == 0
    assert figures["verdict"]["passes"], figures["verdict"]
    outcome = outcome_of(figures)
    assert outcome.summary[0].startswith("The replaced model passes")
    assert len(outcome.tables) == 2 and len(outcome.tables[1].rows) == len(MLP_LAYERS)


def test_worthless_transcoders_do_not_pass(lm: LanguageModel, runs: list[Subject]) -> None:
    """Random directions; the mean alone; and a linear map in the skip, without latents."""
    figures = measured(lm, runs, runs, Options())
    conditions = figures["verdict"]["conditions"]
    assert not figures["verdict"]["passes"] and not conditions["linear maps cost more"]
    assert find(figures, IDENTITY)["largest_difference"] == 0
    assert outcome_of(figures).summary[0].startswith("The replaced model does not pass")

    def of_mean(run: Subject) -> SAE:
        return replace(run.sae, W_dec=torch.zeros_like(run.sae.W_dec), b_dec=run.mean.float())

    figures = measured(lm, with_saes(runs, of_mean), runs, Options())
    assert find(figures, TRANSCODERS)["loss_recovered"]["value"] == pytest.approx(0, abs=1e-3)
    assert not figures["verdict"]["passes"]

    def of_skip(run: Subject) -> SAE:
        fit = linear.fitted(run)
        assert fit
        as_skip = {"b_in": fit.mean_in, "b_dec": fit.mean_out, "W_skip": fit.W}
        return replace(run.sae, W_dec=torch.zeros_like(run.sae.W_dec), **as_skip)

    figures = measured(lm, with_saes(runs, of_skip), runs, Options(least_recovered=0))
    assert find(figures, TRANSCODERS)["below_linear"]["value"] == pytest.approx(0, abs=1e-6)
    assert not figures["verdict"]["conditions"]["linear maps cost more"]


def test_losses_are_those_of_a_plain_loop(lm: LanguageModel, runs: list[Subject]) -> None:
    """Both layers replaced, each reading what the replaced model gives it; BOS stays."""
    read = choose(runs, 60)
    layers = [Layer.of(run) for run in runs]
    found = spliced.measure(lm, layers, read, NOWHERE)
    piece = read[0][0]
    handles = []
    for run, of_run in zip(runs, read[0], strict=True):
        kept = torch.from_numpy(of_run.kind == ORDINARY)[:, None]
        assert not kept[0] and kept[1:].all()
        block = lm.blocks[run.layer]
        seen: dict[str, Tensor] = {}

        def note(_m: Any, inputs: Any, _o: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = inputs[0][0]

        def change(
            _m: Any,
            _i: Any,
            output: Tensor,
            run: Subject = run,
            kept: Tensor = kept,
            seen: dict[str, Tensor] = seen,
        ) -> Tensor:
            return torch.where(kept, run.sae(seen["x"]), output[0])[None]

        handles.append(block.mlp.register_forward_hook(note))
        handles.append(block.post_feedforward_layernorm.register_forward_hook(change))
    with torch.inference_mode():
        logits = lm.causal(torch.tensor([piece.ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    expected = cross_entropy(logits[:-1], torch.tensor(piece.ids[1:]), reduction="none")
    names = [(way.name, way.where, way.layers) for way in spliced.ways(layers)]
    row = 1 + names.index((TRANSCODERS, TRAINED, MLP_LAYERS))
    own = found.ce[row][found.document == piece.document]
    np.testing.assert_allclose(own[: len(expected)], expected, atol=1e-3)


def test_the_command_writes_its_page(
    tiny_mlps: Store, runs: list[Subject], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "run": None,
        "runs": str(runs[0].run.parent),
        "store": None,
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "model": {"path": None, "revision": "main", "dtype": None},
        "study": {"name": "replacement", "tokens": 200},
    }
    study.compare(settings)
    assert "does not pass" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "replacement.json").read_text())
    assert not record["figures"]["verdict"]["passes"]
    assert [run["layer"] for run in record["figures"]["runs"]] == list(MLP_LAYERS)
    page = (tmp_path / "out" / "replacement.html").read_text()
    assert "does not pass" in page and MEAN in page and LINEAR in page
    assert not list((tmp_path / "out").glob("studies/kept/*"))

    for changed in ({"runs": None}, {"run": "x"}):
        with pytest.raises(SettingError, match="study=replacement takes runs="):
            study.compare({**settings, **changed})


def test_what_is_no_transcoder_of_an_mlp_is_refused(tiny_run: Path, runs: list[Subject]) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(SettingError, match=r"the SAE of layer 5 in .*write mlp_out"):
        study.open_all([runs[0].run, tiny_run], None, cpu)
    with pytest.raises(SettingError, match=r"two transcoders of layer 0"):
        study.open_all([runs[0].run, runs[0].run], None, cpu)


def test_a_transcoder_is_spliced_in_place_of_its_mlp(
    lm: LanguageModel, runs: list[Subject]
) -> None:
    """The MLP itself recovers all; the linear map and the skip alone stand beside it."""
    subject = replace(runs[1], sae=TheMlp(lm, runs[1]))
    fit = linear.fitted(runs[1])
    (port,) = subject.ports.writes
    (where,) = splice.splices(subject).values()
    how = splice.replacements(replace(subject, sae=runs[1].sae), port)
    assert {"identity", "transcoder", "random", "skip", "linear", "mean", "zero"} == {
        way.name for way in how
    }
    how = [
        way._replace(rows=lambda x, _: subject.sae(x)) if way.name == "transcoder" else way
        for way in how
    ]
    assert fit
    read = [piece for (piece,) in choose([subject], 300)]
    found = splice.figures_of(splice.measure(lm, where, read, (ORDINARY,), how), how)
    rows = {(row["name"], row["where"]): row for row in found}
    assert rows["identity", ALL]["largest_difference"] == 0
    for place in (ALL, TRAINED):
        assert rows["transcoder", place]["largest_difference"] < 1e-4
        recovered = rows["transcoder", place]["loss_recovered_of_mean"]["value"]
        assert recovered == pytest.approx(1, abs=1e-3)
        assert rows["mean", place]["difference"]["value"] > 0


def test_options() -> None:
    settings = dict(OmegaConf.load("conf/study/replacement.yaml"))
    assert settings.pop("name") == "replacement"
    assert build(Options, "study", settings) == Options()
    for wrong in ({"tokens": 1}, {"least_recovered": 1.5}, {"most_ce_increase": -1.0}):
        (name,) = wrong
        with pytest.raises(SettingError, match=rf"study\.{name}="):
            build(Options, "study", wrong)


def test_study_names_the_model(runs: list[Subject]) -> None:
    """A study of one subject has the identity that kept losses follow from."""
    asked = Study("replacement", runs[0], {}, MODEL)
    assert asked.identity["reads"] == ["mlp_in_0"] and "layer" not in asked.identity
