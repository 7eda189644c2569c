"""SAEs of other libraries measured as runs of ours."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from residual_saes.analyze.command import command
from residual_saes.analyze.peers import imported
from residual_saes.analyze.studies.quality import quality
from residual_saes.analyze.subject import Subject
from residual_saes.data import digests
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows import summary
from residual_saes.data.site import HookPoint
from residual_saes.data.store.store import Store
from residual_saes.train.export import bundle, format, golden
from residual_saes.train.export.format import About
from residual_saes.train.export.origin import of_hook
from residual_saes.train.ports import ports_of, recorded_ports
from residual_saes.train.run import read_config, sae_of
from residual_saes.train.sae import SAE
from tests.analyze.conftest import LAYER, Made, make_run, random_rows
from tests.conftest import commit
from tests.train.test_formats import TAKEN

ABOUT = About("nobody/none", ports_of("sae", [LAYER], ["resid_post"], None), 32, "made up")

OF_SAES = sorted(name for name, kinds in TAKEN.items() if "topk" in kinds)


@pytest.fixture
def exported(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names of the made run's SAE in every format."""
    monkeypatch.chdir(tmp_path)
    names = {"reference": f"reference:{made.run}"}
    for name in OF_SAES:
        for file, content in format.find(name).write(made.sae, ABOUT).items():
            (path := tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        names[name] = f"{name}:{path.parent}"
    return names


def test_a_foreign_sae_has_the_figures_of_the_same_one_as_a_run(
    exported: dict[str, str], made: Made, subject: Subject
) -> None:
    expected = quality(subject, 10**6)
    assert {*exported, "circuit_tracer"} == set(imported.READERS)
    for named in exported.values():
        assert imported.is_foreign(named)
        run = imported.run_of(named, made.store.name, None)
        found = quality(Subject.open(run, None, torch.device("cpu")), 10**6)
        assert found["variance_explained"]["as trained"]["centred"] == pytest.approx(
            expected["variance_explained"]["as trained"]["centred"], abs=1e-6
        )
        assert found["l0"] == pytest.approx(expected["l0"])
        before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
        assert imported.run_of(named, made.store.name, LAYER) == run
        assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def analyze(*overrides: str) -> None:
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        command(OmegaConf.to_container(compose("analyze", list(overrides)), resolve=True))


def test_it_is_compared_with_a_run_of_ours(
    exported: dict[str, str], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store is that of ours. Two that are the same SAE cannot be told apart."""
    analyze("study=sweep", f"runs=[{made.run},'{exported['saelens']}']", f"out={tmp_path}")
    (layer,) = json.loads((tmp_path / "sweep.json").read_bytes())["layers"]
    assert [arm["finished"] for arm in layer["arms"]] == [True, True]
    assert len(layer["not_distinguishable"]) == 1
    assert "| arm | variance explained |" in capsys.readouterr().out
    other = f"study.other='{exported['saelens']}'"
    analyze("study=stability", f"run={made.run}", f"store={made.store.name}", other)
    with pytest.raises(SettingError, match="store="):
        analyze("study=sweep", f"runs='{exported['saelens']},{exported['sparsify']}'")


def test_the_command_and_its_refusals(
    exported: dict[str, str], made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = exported["saelens"]
    analyze("study=quality", f"run='{named}'", f"store={made.store.name}")
    assert capsys.readouterr().out.startswith("# quality")
    analyze("study=report", f"run='{named}'", f"store={made.store.name}")
    page = (imported.run_of(named, made.store.name, None) / "report.html").read_text()
    assert "metrics.jsonl" not in page and page.count("<img") > 3  # it was not trained here
    assert "(saelens)</h1>" in page and str(tmp_path.parent) not in page
    assert not imported.is_foreign("runs/saelens:x")
    store = f"store={made.store.name}"
    for overrides, error, name in [
        ((f"run='{named}'",), SettingError, "store="),
        ((f"run='{named}'", store, "layer=4"), SettingError, "layer=4"),
        (("run=saelens:/nowhere", store), StoreError, "/nowhere/cfg.json"),
        ((f"run={made.run}", "layer=3"), SettingError, "layer=3"),
        (("run=saelenz:x", store), SettingError, "run=saelenz:x"),
        ((f"run='{named}'", store, "accept=hook"), SettingError, "accept=hook"),
        ((f"run={made.run}", "accept=model"), SettingError, "accept=model"),
        ((f"run={made.run}", "drop_bos=false"), SettingError, "drop_bos=False"),
        ((f"run='{named}'", store, "drop_outliers=few"), SettingError, "drop_outliers=few"),
    ]:
        with pytest.raises(error, match=re.escape(name)):
            analyze(*overrides)


def test_its_rows_are_those_that_the_policy_says(
    exported: dict[str, str], made: Made, tmp_path: Path
) -> None:
    """The reference keeps BOS and outliers: then what it was trained on is all rows."""
    named = exported["reference"]
    store = f"store={made.store.name}"
    analyze("study=quality", f"run='{named}'", store)
    analyze("study=quality", f"run='{named}'", store, "drop_bos=false", "drop_outliers=false")
    folders = sorted((tmp_path / imported.FOLDER).iterdir())
    explained = {}
    for folder in folders:
        subject = Subject.open(folder, None, torch.device("cpu"))
        found = quality(subject, 10**6)["variance_explained"]
        explained[subject.policy.drop_bos] = {name: found[name]["centred"] for name in found}
    left_out, kept = explained[True], explained[False]
    assert kept["as trained"] == kept["all rows"] == left_out["all rows"]
    assert left_out["as trained"] != left_out["all rows"]


# -- which layer ----------------------------------------------------------------------------------

OTHER = LAYER - 2  # the store's first layer


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run on LAYER of a store that has OTHER too."""
    bits = random_rows()
    made = make_run(tmp_path_factory.mktemp("layers"), bits)
    unit = made.store.unit_tokens
    for number in range(made.store.units):
        commit(made.store, number, {OTHER: bits[number * unit : (number + 1) * unit]})
    summary.write(made.store, OTHER)
    made.store.declare([OTHER])
    return made._replace(store=Store.open(made.store.name))


def saelens(folder: Path, made: Made, **change: Any) -> str:
    """The run's SAE as SAELens', with other metadata; its name."""
    folder.mkdir(exist_ok=True)
    for file, content in format.find("saelens").write(made.sae, ABOUT).items():
        (folder / file).write_bytes(content)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= change
    (folder / "cfg.json").write_text(json.dumps(config))
    return f"saelens:{folder}"


def layer_of(named: str, made: Made, asked: int | None = None) -> int:
    return int(read_config(imported.run_of(named, made.store.name, asked))["settings"]["layer"])


def test_it_is_measured_on_the_layer_that_its_files_say(
    two_layers: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert two_layers.store.layers == [OTHER, LAYER]
    for name in OF_SAES:
        for file, content in format.find(name).write(two_layers.sae, ABOUT).items():
            (path := tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert layer_of(f"{name}:{tmp_path / name}", two_layers) == LAYER
        assert layer_of(f"{name}:{tmp_path / name}", two_layers, LAYER) == LAYER
    assert layer_of(f"reference:{two_layers.run}", two_layers) == LAYER
    for hook, layer in (
        (f"blocks.{OTHER}.hook_resid_post", None),
        ("blocks.{layer}.hook_resid_post", OTHER),
        (f"model.layers.{OTHER}", OTHER),
        (None, OTHER),
    ):
        named = saelens(tmp_path / "s", two_layers, hook_name=hook, hook_layer=layer)
        assert layer_of(named, two_layers) == OTHER


def test_another_layer_site_or_width_is_refused(
    two_layers: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = two_layers.store.name

    def refused(error: type[Exception], *words: str, asked: int | None = None, **change: Any):
        named = saelens(tmp_path / "s", two_layers, **change)
        with pytest.raises(error) as caught:
            imported.run_of(named, store, asked)
        assert all(word in str(caught.value) for word in words), caught.value
        assert "\n" not in str(caught.value)

    refused(SettingError, f"layer={OTHER}", f"of layer {LAYER}", asked=OTHER)
    refused(SettingError, "give layer=", hook_name=None)
    refused(SettingError, "layer=4", f"{OTHER}, {LAYER}", asked=4, hook_name=None)
    refused(SettingError, "layer 7", f"{OTHER}, {LAYER}", hook_name="blocks.7.hook_resid_post")
    hook = "blocks.3.hook_mlp_out"
    refused(SettingError, hook, "layer=3 site=mlp_out", hook_name=hook)
    # TransformerLens' hook_mlp_in and hook_normalized are in front of the norm or of its weight.
    for hook in (
        *("blocks.3.attn.hook_z", "blocks.3.hook_mlp_in", "blocks.3.ln2.hook_normalized"),
        *("model.layers.3.mlp", "encoder"),
    ):
        refused(SettingError, hook, "resid_post", asked=LAYER, hook_name=hook)
    before = f"blocks.{LAYER - 1}.hook_resid_post"
    refused(SettingError, before, asked=LAYER, hook_name=f"blocks.{LAYER}.hook_resid_pre")
    refused(StoreError, "hook_layer 1 and 3", hook_layer=1)
    assert not (tmp_path / "runs").exists()
    named = saelens(tmp_path / "s", two_layers, hook_name=None)
    assert layer_of(named, two_layers, OTHER) == OTHER  # nothing contradicts it


def test_a_reference_file_that_cannot_be_right_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = {**made.sae.tensors(), "k": made.sae.k}
    for name, wrong in (
        ("W_enc", good["W_enc"] / 0),
        ("b_dec", good["b_dec"] * torch.nan),
        ("W_dec", torch.complex(good["W_dec"], good["W_dec"])),
        ("W_dec", torch.zeros(1).expand(10**9)),
        ("b_enc", good["b_enc"].to_sparse()),
        *(("k", wrong) for wrong in ("four", "4", True, 0, -3, 2.5, 10**5000, [[3]], None)),
        *(("k", wrong) for wrong in (float("nan"), float("inf"), torch.tensor([1, 2]))),
        ("k", torch.empty((), device="meta")),
        ("threshold", torch.full_like(good["b_enc"], -1)),
        ("threshold", None),
        ("norm_factor", torch.ones(1)),
    ):
        torch.save({**good, name: wrong}, tmp_path / "sae_final.pt")
        with pytest.raises(StoreError, match=r"sae_final\.pt") as caught:
            imported.run_of(f"reference:{tmp_path / 'sae_final.pt'}", made.store.name, None)
        assert "\n" not in str(caught.value)
    learned = {**good, "W_enc": torch.nn.Parameter(good["W_enc"]), "k": torch.tensor(made.sae.k)}
    torch.save(learned, tmp_path / "sae_final.pt")
    imported.run_of(f"reference:{tmp_path / 'sae_final.pt'}", made.store.name, None)


def test_a_damaged_or_half_made_run_is_refused_and_made_again(
    exported: dict[str, str], made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    run = imported.run_of(exported["saelens"], made.store.name, None)
    whole = {path: path.read_bytes() for path in run.iterdir()}
    assert {path.name for path in whole} == {"config.yaml", "digests.json", "sae_final.pt"}
    for path, content in whole.items():
        for damaged in (bytearray(content), None):
            if damaged is None:
                path.unlink()
            else:
                damaged[len(damaged) // 2] ^= 1
                path.write_bytes(damaged)
                with pytest.raises(StoreError, match=path.name):
                    Subject.open(run, None, torch.device("cpu"))
            capsys.readouterr()
            assert imported.run_of(exported["saelens"], made.store.name, None) == run
            if damaged is not None:
                assert path.name in capsys.readouterr().err
            assert {path: path.read_bytes() for path in run.iterdir()} == whole


def test_another_model_or_context_is_refused_with_both_unless_it_is_accepted(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, context = "nobody/none", made.store.context
    assert made.store.manifest["model"]["id"] == model
    centred = {"center_writing_weights": True}
    for change, said, accept in (
        ({"model_name": "gpt2-small"}, [model, "gpt2-small"], ["model"]),
        ({"context_size": 128}, [str(context), "128"], ["context"]),
        ({"model_name": "b", "context_size": 64}, ["of b", model, "64"], ["model", "context"]),
        # Rows of another function of the same model.
        ({"model_from_pretrained_kwargs": centred}, [model, "center_writing_weights"], ["model"]),
        ({"model_from_pretrained_kwargs": {"revision": "step1000"}}, ["step1000"], ["model"]),
    ):
        named = saelens(tmp_path / "s", made, **change)
        with pytest.raises(SettingError) as caught:
            imported.run_of(named, made.store.name, None)
        assert all(word in str(caught.value) for word in [*said, f"accept=[{','.join(accept)}]"])
        assert "\n" not in str(caught.value)
        with pytest.raises(SettingError, match=re.escape(said[-1])):
            imported.run_of(named, made.store.name, None, {"model", "context"} - {accept[-1]})
        assert not (tmp_path / "runs").exists()
        imported.run_of(named, made.store.name, None, accept)
        shutil.rmtree(tmp_path / "runs")


def test_a_model_is_known_by_its_librarys_name(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for change in (
        {"model_name": "None"},  # without the owner
        {"model_name": None, "context_size": None},
        {"model_from_pretrained_kwargs": {"center_writing_weights": False, "dtype": "bfloat16"}},
    ):
        imported.run_of(saelens(tmp_path / "s", made, **change), made.store.name, None)
    for ours, theirs in (
        ("openai-community/gpt2", "gpt2-small"),
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7b"),
        ("/models/pythia-70m-deduped/", "EleutherAI/pythia-70m-deduped"),
    ):
        assert imported.plain_name(ours) == imported.plain_name(theirs)
    assert imported.plain_name("gpt2-medium") != imported.plain_name("gpt2-small")


def test_sparsifys_run_says_model_and_context(made: Made, tmp_path: Path) -> None:
    sparsify = format.find("sparsify")
    for file, content in sparsify.write(made.sae, ABOUT).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    for run, model, context in (
        (
            {"sae": {}, "model": "EleutherAI/pythia-160m", "ctx_len": 2048},
            "EleutherAI/pythia-160m",
            2048,
        ),
        ({"model": "of another program", "ctx_len": 9}, None, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(run))
        found = sparsify.origin(tmp_path / f"layers.{LAYER}")
        assert found[:5] == (f"layers.{LAYER}", "resid_post", LAYER, model, context)
        assert sparsify.origin(tmp_path) == found


@pytest.mark.parametrize(
    ("hook", "site", "layer"),
    [
        ("blocks.21.hook_resid_post", "resid_post", 21),
        ("blocks.21.hook_out", "resid_post", 21),
        ("blocks.21.hook_mlp_out", "mlp_out", 21),
        ("blocks.21.mlp.hook_in", "mlp_in", 21),
        ("blocks.21.hook_mlp_in", "hook_mlp_in", 21),
        ("mlp_in_layer_21", "mlp_in", 21),
        ("blocks.21.attn.hook_out", "attn.hook_out", 21),
        ("blocks.0.attn.hook_z", "attn.hook_z", 0),
        ("resid_post_layer_8", "resid_post", 8),
        ("mlp_out_layer8", "mlp_out", 8),
        ("layers.5", "resid_post", 5),
        ("layers.5.mlp", "mlp", 5),
        ("transformer.h.11", "resid_post", 11),
        ("model.language_model.layers.27.output", "resid_post", 27),
        ("embed_tokens", "embed_tokens", None),
        ("hook_embed", "hook_embed", None),
    ],
)
def test_hooks_are_known_by_name(hook: str, site: str, layer: int | None) -> None:
    assert of_hook(hook)[:3] == (hook, site, layer)


# -- transcoders and crosscoders -------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of two layers and of what the MLP of the second reads and writes."""
    bits = random_rows()
    store = make_run(tmp_path_factory.mktemp("several"), bits).store
    unit = store.unit_tokens
    points = [HookPoint(OTHER), HookPoint(LAYER, "mlp_in"), HookPoint(LAYER, "mlp_out")]
    for number in range(store.units):
        commit(store, number, dict.fromkeys(points, bits[number * unit : (number + 1) * unit]))
    for point in points:
        summary.write(store, point)
    store.declare(points)
    return Store.open(store.name)


def of_several(kind: str, d: int) -> SAE:
    """A transcoder with a skip, or a crosscoder of two hook points."""
    draw = torch.Generator().manual_seed(0)
    width = d * (1 + (kind == "crosscoder"))
    W_dec = torch.nn.functional.normalize(torch.randn(64, width, generator=draw), dim=1)
    bias = torch.randn(width, generator=draw)
    more = {"b_in": bias * 2, "W_skip": torch.randn(d, d)} if kind == "transcoder" else {}
    threshold = torch.full((64,), 0.5)
    return SAE(W_dec.clone(), W_dec, torch.zeros(64), bias, 8, threshold, **more)


PORTS = {
    "transcoder": ports_of("transcoder", [LAYER], ["mlp_in"], None),
    "crosscoder": ports_of("crosscoder", [OTHER, LAYER], ["resid_post"], None),
}
FORMATS = {
    "transcoder": ["circuit_tracer", "saelens", "safetensors"],
    "crosscoder": ["dictionary_learning", "safetensors"],
}


@pytest.mark.parametrize("kind", PORTS)
def test_others_are_runs_of_what_they_read_and_write(
    several: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sae = of_several(kind, several.d_model)
    about = ABOUT._replace(ports=PORTS[kind])
    x = torch.randn(20, sae.d_model, generator=torch.Generator().manual_seed(1))
    for name in FORMATS[kind]:
        bundle.write(tmp_path / name, golden.files(name, sae, about))
        named = f"{name}:{tmp_path / name}"
        run = imported.run_of(named, several.name, None)
        settings = read_config(run)["settings"]
        assert settings["sae"]["kind"] == kind and recorded_ports(settings) == PORTS[kind]
        torch.testing.assert_close(sae_of(run)[0](x), sae(x), rtol=1e-4, atol=1e-4)
        with pytest.raises(SettingError, match=f"layer {PORTS[kind].reads[0].point.layer}"):
            imported.run_of(named, several.name, 7)


def test_what_a_store_lacks_of_them_is_named(
    several: Store, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sae = of_several("transcoder", several.d_model)
    bundle.write(
        tmp_path / "t", golden.files("saelens", sae, ABOUT._replace(ports=PORTS["transcoder"]))
    )
    adds = re.escape(f"layer={LAYER} site=[mlp_in,mlp_out] store={made.store.name}")
    with pytest.raises(SettingError, match=adds):
        imported.run_of(f"saelens:{tmp_path / 't'}", made.store.name, None)
    # Without the name of what it writes it is no autoencoder.
    (tmp_path / "t" / digests.FILE).unlink()
    config = json.loads((tmp_path / "t" / "cfg.json").read_text())
    del config["metadata"]["hook_name_out"]
    (tmp_path / "t" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="is a transcoder"):
        imported.run_of(f"saelens:{tmp_path / 't'}", several.name, None)
    bundle.write(
        tmp_path / "c",
        golden.files(
            "safetensors",
            of_several("crosscoder", several.d_model),
            ABOUT._replace(ports=ports_of("crosscoder", [LAYER], ["resid_post"], None, 2)),
        ),
    )
    with pytest.raises(SettingError, match="two stores"):
        imported.run_of(f"safetensors:{tmp_path / 'c'}", several.name, None)
