"""SAEBench's core metrics against its definitions over whole matrices, and SAEBench itself.

SAEBench may live in an environment of its own, whose interpreter INTEROP_PYTHON names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.peers import saebench, saebench_metrics
from residual_saes.analyze.studies.quality import quality
from residual_saes.analyze.studies.splice import ALL
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import order
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.rows.split import Policy, held_out_units
from residual_saes.harvest.model import ModelConfig
from residual_saes.train import sae_file
from residual_saes.train.sae import SAE
from tests.analyze.conftest import LAYER, D, F, K, Made, make_run
from tests.conftest import BOS

N, CONTEXT, UNIT, PROMPTS = 4096, 32, 128, 2  # 32 units, two of them held out, of two batches each
SILENT = 7  # a latent that never fires
BLIND = 9  # a latent without an encoder direction
RARE = 11  # a latent below 1 %
FILE = "run_custom_sae_eval_results.json"


@pytest.fixture(scope="module", params=["topk", "thresholds"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run with outliers among its held-out rows, and edge cases among its latents."""
    values = (
        torch.randn(N, D, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.5, 3, D)
        + 1
    )
    values[UNIT * torch.from_numpy(order.held_out(N // UNIT, 7)) + 40] *= 100
    run = make_run(
        tmp_path_factory.mktemp("saebench"), values.bfloat16().view(torch.uint16).numpy()
    )
    W_enc, W_dec, b_enc, b_dec = (tensor.clone() for tensor in run.sae.tensors().values())
    W_enc += 0.3 * torch.randn(W_enc.shape, generator=torch.Generator().manual_seed(5))
    b_enc[SILENT] = -1e4
    W_enc[:, BLIND] = 0
    b_enc[RARE] -= 5
    threshold = torch.linspace(1, 3, F) if request.param == "thresholds" else None
    sae = SAE.of(W_enc, W_dec, b_enc, b_dec, K, threshold)
    sae_file.write_final(sae, 1.0, run.run)
    return run._replace(sae=sae)


class Reference:
    """Held-out rows as SAEBench would get them: (batches, prompts, context, ...), in float64."""

    def __init__(self, made: Made) -> None:
        units = held_out_units(made.store)
        shape = (-1, PROMPTS, CONTEXT)
        at = np.concatenate([np.arange(unit * UNIT, (unit + 1) * UNIT) for unit in units])
        tokens = np.concatenate([made.store.tokens(unit).ravel() for unit in units])
        self.x = made.rows[at]
        self.f = dense(made.sae, self.x)
        self.hat = self.f @ made.sae.W_dec.double().numpy() + made.sae.b_dec.double().numpy()
        norms = np.linalg.norm(self.x, axis=1).reshape(-1, UNIT)
        outlier = (norms > 10 * np.median(norms, axis=1, keepdims=True)).ravel()
        assert outlier.sum() >= len(units)
        self.mask = ((tokens != BOS) & ~outlier).reshape(shape)
        self.x, self.f, self.hat = (
            rows.reshape(*self.mask.shape, -1) for rows in (self.x, self.f, self.hat)
        )

    def batches(self) -> list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
        """x, x_hat and f of the rows that count, batch by batch."""
        every = zip(self.x, self.hat, self.f, self.mask, strict=True)
        return [(x[mask], hat[mask], f[mask]) for x, hat, f, mask in every]


def dense(sae: SAE, x: NDArray[np.float64]) -> NDArray[np.float64]:
    W_enc, b_enc, b_dec = (tensor.double().numpy() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec))
    pre = (x - b_dec) @ W_enc + b_enc
    if sae.threshold is not None:
        return np.where(pre > sae.threshold.double().numpy(), pre, 0)
    return np.where(pre >= np.sort(pre, axis=1)[:, -K][:, None], np.maximum(pre, 0), 0)


@pytest.fixture(scope="module")
def reference(made: Made) -> Reference:
    return Reference(made)


def study_of(run: Path) -> Study:
    model = ModelConfig(EMBEDDED, dtype="float32")
    return Study("saebench", Subject.open(run, None, torch.device("cpu")), {"rows": 1e6}, model)


def perform(run: Path) -> Outcome:
    """The study, with batches of PROMPTS prompts and blocks of 16 latents."""
    small = partial(saebench.saebench, batch_tokens=PROMPTS * CONTEXT, block=16)
    return study_of(run).perform(replace(saebench.DEFINITION, run=small))


def written(run: Path) -> dict[str, Any]:
    """What is in the only results file."""
    (path,) = (run / "studies" / "saebench").rglob("*eval_results.json")
    assert path.parent.name == "core" and path.name == f"{run.name}_custom_sae_eval_results.json"
    found: dict[str, Any] = json.loads(
        path.read_text(), parse_constant=pytest.fail
    )  # NaN, Infinity: no JSON
    return found


@pytest.fixture
def results(made: Made) -> dict[str, Any]:
    perform(made.run)  # once for each kind of SAE: afterwards it finds its results
    return written(made.run)


# -- every field -----------------------------------------------------------------------------------


def test_figures_of_rows(results: dict[str, Any], reference: Reference) -> None:
    batches, found = reference.batches(), results["eval_result_metrics"]
    assert len({len(x) for x, _, _ in batches}) > 1  # a mean over batches is not that over rows
    error = [((x - hat) ** 2).sum(1) for x, hat, _ in batches]
    s = np.mean([(x**2).sum(1).mean() for x, _, _ in batches])
    r = np.mean([squares.mean() for squares in error])
    about = [((x - x.mean(0)) ** 2).sum(1) for x, _, _ in batches]
    x, hat, f = map(np.concatenate, zip(*batches, strict=True))
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(hat, axis=1)
    expected = {
        "explained_variance": 1 - r / (s - (s / D) ** 2),
        "explained_variance_legacy": np.mean(1 - np.concatenate(error) / np.concatenate(about)),
        "mse": np.mean(np.concatenate([squares / len(squares) for squares in error])),
        "cossim": np.mean((x * hat).sum(1) / norm / norm_hat),
        "l2_norm_in": norm.mean(),
        "l2_norm_out": norm_hat.mean(),
        "l2_ratio": (norm_hat / norm).mean(),
        "relative_reconstruction_bias": np.mean(
            [(b * b).sum() / (a * b).sum() for a, b, _ in batches]
        ),
        "l0": (f != 0).sum(1).mean(),
        "l1": f.sum(1).mean(),
    }
    measured = found["reconstruction_quality"] | found["shrinkage"] | found["sparsity"]
    assert measured == pytest.approx(expected, rel=1e-5)
    tokens = {
        "total_tokens_eval_reconstruction": 0,
        "total_tokens_eval_sparsity_variance": reference.mask.size,
    }
    assert found["token_stats"] == tokens


def test_figures_of_latents(results: dict[str, Any], reference: Reference, made: Made) -> None:
    fires = (reference.f > 0) & reference.mask[..., None]
    rows, prompts = fires.sum((0, 1, 2)), fires.any(2).sum((0, 1))
    assert rows[SILENT] == 0 and (rows != prompts).any()
    W_enc, W_dec = made.sae.W_enc.double().numpy().T, made.sae.W_dec.double().numpy()
    with np.errstate(invalid="ignore"):
        unit = W_enc / np.linalg.norm(W_enc, axis=1, keepdims=True)
        expected = {
            "index": np.arange(F),
            "feature_density": rows / reference.mask.sum(),
            "consistent_activation_heuristic": rows / prompts,
            "encoder_bias": made.sae.b_enc.double().numpy(),
            "encoder_norm": np.linalg.norm(W_enc, axis=1),
            "encoder_decoder_cosine_sim": (unit * W_dec).sum(1),
            "max_decoder_cosine_sim": (W_dec @ W_dec.T - 9 * np.eye(F)).max(1),
            "max_encoder_cosine_sim": (
                np.nan_to_num(unit) @ np.nan_to_num(unit).T - 9 * np.eye(F)
            ).max(1),
        }
    details = results["eval_result_details"]
    assert [latent.keys() for latent in details] == [expected.keys()] * F
    for name, column in expected.items():
        values = np.array([latent[name] for latent in details])
        np.testing.assert_allclose(
            values, np.nan_to_num(column, nan=-1.0), rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert details[SILENT]["consistent_activation_heuristic"] == -1  # as SAEBench writes 0 / 0
    assert details[BLIND]["encoder_decoder_cosine_sim"] == -1

    density = expected["feature_density"]
    assert (
        (density > 0.1).any() and (density < 0.1).any() and ((density > 0) & (density < 0.01)).any()
    )
    misc = {
        "freq_over_1_percent": (density > 0.01).mean(),
        "freq_over_10_percent": (density > 0.1).mean(),
        "normalized_freq_over_1_percent": density[density > 0.01].sum() / density.sum(),
        "normalized_freq_over_10_percent": density[density > 0.1].sum() / density.sum(),
        "average_max_encoder_cosine_sim": expected["max_encoder_cosine_sim"].mean(),
        "average_max_decoder_cosine_sim": expected["max_decoder_cosine_sim"].mean(),
        "frac_alive": (density > 0).mean(),
    }
    assert results["eval_result_metrics"]["misc_metrics"] == pytest.approx(misc, rel=1e-5)


def test_beside_saebenchs_figure_stands_the_one_of_study_quality(
    results: dict[str, Any], made: Made
) -> None:
    ours = results["eval_result_unstructured"]
    theirs = quality(Subject.open(made.run, None, torch.device("cpu")), 10**6)
    subset = theirs["variance_explained"]["as trained"]
    assert ours["variance_explained_centred"]["value"] == pytest.approx(subset["centred"], rel=1e-9)
    assert ours["variance_explained_centred"]["interval"] == pytest.approx(
        subset["centred_95"], rel=1e-9
    )
    assert ours["mse_per_element"] == pytest.approx(theirs["mse_per_element"], rel=1e-9)
    assert (ours["rows"], ours["documents"]) == (theirs["rows"], theirs["documents"])
    wrong = results["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    assert wrong == pytest.approx(
        1 - (1 - subset["centred"]) * ours["variance"] / ours["explained_variance_divisor"],
        rel=0.02,
    )
    assert abs(wrong - subset["centred"]) > 0.01


def test_what_was_evaluated_is_said(results: dict[str, Any], made: Made) -> None:
    config, sae = results["eval_config"], results["sae_cfg_dict"]
    assert (config["model_name"], config["llm_dtype"], config["dataset"]) == (
        "nobody/none",
        "float32",
        "made up",
    )
    assert (config["batch_size_prompts"], config["context_size"]) == (PROMPTS, CONTEXT)
    assert config["n_eval_sparsity_variance_batches"] == 4
    architecture = "topk" if made.sae.threshold is None else "jumprelu"
    assert (sae["architecture"], sae["d_in"], sae["d_sae"], sae["training_tokens"]) == (
        architecture,
        D,
        F,
        1024,
    )
    assert sae["metadata"]["hook_name"] == f"blocks.{LAYER}.hook_resid_post"


@pytest.mark.parametrize(
    ("unit", "context", "prompts"),
    [(65_536, 1024, 2), (65_536, 128, 16), (65_536, 4096, 1), (3000, 100, 10)],
)
def test_batches_are_as_large_as_saebenchs(unit: int, context: int, prompts: int) -> None:
    assert saebench_metrics.prompts_of_batch(unit, context) == prompts


# -- losses ----------------------------------------------------------------------------------------


def do_splice(run: Path, *, zero: float = 8.0) -> None:
    """Leave what study=splice leaves, with losses that are known."""

    def row(name: str, where: str, ce: float, kl: float | None = None) -> dict[str, Any]:
        return {
            "name": name,
            "where": where,
            "ce": {"value": ce},
            **({} if kl is None else {"kl": {"value": kl}}),
        }

    rows = [row("clean", "", 2.0), row("sae", ALL, 3.5, 0.75), row("zero", ALL, zero, 5.0)]
    rows += [row("sae", "rows as trained", 9, 9), row("zero", "rows as trained", 99, 99)]
    study = replace(study_of(run), name="splice", options={"zero": zero})
    study.perform(Definition(lambda _: Outcome({"rows": rows, "replaced": {ALL: 130}}, [])))


def test_losses_are_those_of_study_splice(made: Made, tmp_path: Path) -> None:
    run = shutil.copytree(made.run, tmp_path / "run")
    perform(run)
    none, before = written(run)["eval_result_metrics"], written(run)["eval_id"]
    for kind in ("model_behavior_preservation", "model_performance_preservation"):
        assert set(none[kind].values()) == {-1}
    assert not written(run)["eval_config"]["compute_kl"]

    do_splice(run)
    perform(run)
    results = written(run)
    kl = {"kl_div_score": 0.85, "kl_div_with_ablation": 5, "kl_div_with_sae": 0.75}
    ce = {
        "ce_loss_score": 0.75,
        "ce_loss_with_ablation": 8,
        "ce_loss_with_sae": 3.5,
        "ce_loss_without_sae": 2,
    }
    assert results["eval_result_metrics"]["model_behavior_preservation"] == kl
    assert results["eval_result_metrics"]["model_performance_preservation"] == ce
    assert results["eval_result_metrics"]["token_stats"]["total_tokens_eval_reconstruction"] == 130
    assert results["eval_config"]["n_eval_reconstruction_batches"] == 3
    assert results["eval_config"]["compute_kl"] and results["eval_config"]["compute_ce_loss"]
    assert results["eval_id"] != before

    do_splice(run, zero=2.0)  # an ablation that costs nothing
    perform(run)
    assert (
        written(run)["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"] == -1
    )

    do_splice(run)
    sae = study_of(run).subject.sae
    sae_file.write_final(
        replace(sae, b_enc=sae.b_enc + 0.01), 1.0, run
    )  # another SAE than the losses are of
    perform(run)
    assert set(written(run)["eval_result_metrics"]["model_performance_preservation"].values()) == {
        -1
    }


# -- the file --------------------------------------------------------------------------------------


def test_the_file_is_made_once_and_again_where_it_is_gone(made: Made, tmp_path: Path) -> None:
    run = shutil.copytree(made.run, tmp_path / "run")
    perform(run)
    first, path = written(run), run / "studies" / "saebench" / "core" / FILE
    perform(run)
    assert written(run) == first
    path.unlink()
    perform(run)
    assert written(run)["eval_id"] == first["eval_id"]
    assert written(run)["eval_result_metrics"] == first["eval_result_metrics"]
    moved = run.rename(tmp_path / "other")
    perform(moved)
    assert written(moved)["sae_lens_release_id"] == "other"  # `written`: the former file is gone


def test_refusals(made: Made) -> None:
    study = study_of(made.run)
    with pytest.raises(SettingError, match=r"study\.rows=0"):
        saebench.saebench(replace(study, options={"rows": 0}))
    with pytest.raises(SettingError, match=r"study\.row "):
        saebench.saebench(replace(study, options={"row": 1}))
    subject = replace(study.subject, policy=Policy(drop_tokens=tuple(range(1000))))
    subject.__dict__["moments"] = study.subject.moments
    with pytest.raises(StoreError, match=r"s\.zarr"):
        saebench_metrics.measure(subject, 10**6)


# -- SAEBench itself -------------------------------------------------------------------------------

PYTHON = os.environ.get("INTEROP_PYTHON", sys.executable)
# SAEBench's evaluation of a model and of a store that hold our rows, to its own file; then its
# readers on ours.
SCRIPT = """
import json, sys
from pathlib import Path
from types import SimpleNamespace as Space
from unittest.mock import MagicMock

# What loads models and SAEs, and what draws: slow to import, and nothing that is called here uses it.
for name in ("sae_lens", "sae_lens.loading", "sae_lens.loading.pretrained_saes_directory", "sae_lens.saes",
             "sae_lens.saes.sae", "sae_lens.training", "sae_lens.training.activations_store", "transformer_lens",
             "transformer_lens.hook_points", "tabulate", "matplotlib", "matplotlib.pyplot", "matplotlib.colors",
             "matplotlib.lines", "plotly", "plotly.graph_objects", "seaborn"):
    sys.modules[name] = MagicMock()

import jsonschema, numpy as np, sae_bench, torch
from sae_bench.evals.core import main
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.eval_output import CoreEvalOutput
from pydantic import TypeAdapter

given = {name: torch.from_numpy(value) for name, value in np.load("given.npz").items()}
path = Path(sys.argv[1])
ours = json.loads(path.read_text())
batches = iter(range(len(given["x"])))
now = []

def tokens(prompts):
    now[:] = [next(batches)]
    assert prompts == given["mask"].shape[1]
    return given["mask"][now[0]].long()  # token 0 is ignored

cfg = Space(hook_name="blocks.3.hook_resid_post", hook_head_index=None, hook_layer=3, d_sae=given["f"].shape[-1],
            architecture_str="topk", to_dict=lambda: ours["sae_cfg_dict"])
sae = Space(cfg=cfg, device="cpu", encode=lambda x: given["f"][now[0]], decode=lambda f: given["hat"][now[0]],
            W_enc=given["W_enc"], W_dec=given["W_dec"], b_enc=given["b_enc"])
store = Space(get_batch_tokens=tokens, context_size=given["mask"].shape[2])
model = Space(run_with_cache=lambda *_, names_filter, **__: (None, {names_filter[0]: given["x"][now[0]]}))
config = CoreEvalConfig(**ours["eval_config"])
scalars, latents = main.run_evals(sae, store, model, config, ignore_tokens={0})
scalars["misc_metrics"] = main.calculate_misc_metrics(latents)
for kind in ("model_behavior_preservation", "model_performance_preservation"):
    scalars[kind] = ours["eval_result_metrics"][kind]
result = {"eval_cfg": config, "metrics": scalars, "feature_metrics": latents, "sae_id": "custom_sae", "sae_set": "run"}
main.save_single_eval_result(
    main.replace_nans_with_negative_one(result), ours["eval_id"], "Unknown", "Unknown", "theirs.json", sae)
assert path.name == Path(main.general_utils.get_results_filepath("", "run", "custom_sae")).name

taken = TypeAdapter(CoreEvalOutput).validate_python(ours)
assert json.loads(taken.to_json()) == ours, "a field was changed or left out"
schema = Path(sae_bench.__file__).parent / "evals/core/eval_output_schema_core.json"
jsonschema.validate(ours, json.loads(schema.read_text()))

from sae_bench.sae_bench_utils import graphing_utils
found = graphing_utils.find_eval_results_files([str(path.parent.parent)])
assert found == [str(path)], found
(read,) = graphing_utils.get_eval_results(found).values()
assert (read["sae_class"], read["train_tokens"]) == ("topk", 1024)
(short,) = graphing_utils.get_core_results(found).values()
assert short == {"l0": 4.0, "ce_loss_score": -1} and read["l0"] == 4.0, short
"""


@pytest.mark.parametrize("made", ["topk"], indirect=True)
def test_saebench_finds_the_same(made: Made, reference: Reference, tmp_path: Path) -> None:
    """Its own functions on the same rows give the same file, and its classes, schema and plots take
    ours.
    """
    needed = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('sae_bench', 'jsonschema'))))"
    if subprocess.run([PYTHON, "-c", needed], check=False).returncode:
        pytest.skip(
            "sae_bench and jsonschema are not installed: set INTEROP_PYTHON to an interpreter that has them"
        )
    perform(made.run)
    weights = {
        name: getattr(made.sae, name).double().numpy() for name in ("W_enc", "W_dec", "b_enc")
    }
    given = {
        "x": reference.x,
        "hat": reference.hat,
        "f": reference.f,
        "mask": reference.mask,
        **weights,
    }
    np.savez(tmp_path / "given.npz", **given)
    path = made.run / "studies" / "saebench" / "core" / FILE
    subprocess.run([PYTHON, "-c", SCRIPT, str(path)], check=True, cwd=tmp_path)
    ours, theirs = written(made.run), json.loads((tmp_path / "theirs.json").read_text())
    assert ours.keys() == theirs.keys()
    flat_ours, flat_theirs = dict(flat(ours)), dict(flat(theirs))
    differing = ("datetime_epoch_millis", "eval_result_unstructured")
    compared = [name for name in flat_theirs if not name.startswith(differing)]
    assert len(compared) > 8 * F
    for name in compared:
        value = flat_theirs[name]
        assert flat_ours[name] == (
            pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
        )


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Leaves with their paths."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in flat(item, f"{name}.{key}".strip("."))]
    return [(name, value)]
