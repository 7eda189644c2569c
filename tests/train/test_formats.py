"""Exports compute what the run's SAE computes, by our own readers. tests/train/test_libraries.py
has the libraries' own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from residual_saes.data.errors import PipelineError
from residual_saes.train.export.command import command
from residual_saes.train.export.format import About, find, names
from residual_saes.train.ports import ports_of
from residual_saes.train.run import CONFIG
from residual_saes.train.sae import SAE
from residual_saes.train.sae_file import FILE, load

D, F, K = 12, 40, 4
PORTS = {
    "sae": ports_of("sae", [21], ["resid_post"], None),
    "transcoder": ports_of("transcoder", [21], ["mlp_in"], None),
    "crosscoder": ports_of("crosscoder", [21, 27], ["resid_post"], None),
}
ABOUT = About("google/gemma-4-E4B", PORTS["sae"], 1024, "fineweb")


def about(kind: str) -> About:
    """Of a kind as `made` takes it."""
    return ABOUT._replace(ports=PORTS.get(kind.split()[0], PORTS["sae"]))


def made(kind: str) -> SAE:
    """An SAE of D columns in all: topk, thresholds; after transcoder or crosscoder, with skip."""
    draw = torch.Generator().manual_seed(0)
    W_dec = torch.randn(F, D, generator=draw)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec.T.clone() + 0.1 * torch.randn(D, F, generator=draw)
    b_enc, b_dec = 0.1 * torch.randn(F, generator=draw), torch.randn(D, generator=draw)
    threshold = None if "topk" in kind else torch.rand(F, generator=draw)
    threshold = torch.full((F,), 0.4) if "one threshold" in kind else threshold
    b_in = torch.randn(D, generator=draw) if "transcoder" in kind else None
    W_skip = torch.randn(D, D, generator=draw) if "skip" in kind else None
    return SAE.of(W_enc.contiguous(), W_dec, b_enc, b_dec, K, threshold, b_in, W_skip)


def rows() -> torch.Tensor:
    return 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 1


def written(folder: Path, name: str, sae: SAE, of: About = ABOUT) -> Path:
    for file, content in find(name).write(sae, of).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return next(path for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")).parent


KINDS = (
    *("topk", "thresholds", "transcoder topk", "transcoder topk skip", "transcoder thresholds"),
    *("transcoder thresholds skip", "crosscoder topk", "crosscoder one threshold"),
)
TAKEN = {
    "circuit_tracer": KINDS[2:6],
    "dictionary_learning": ("topk", "thresholds", "crosscoder one threshold"),
    "saelens": tuple(kind for kind in KINDS[:6] if kind != "transcoder topk skip"),
    "safetensors": KINDS,
    "sparsify": ("topk", "transcoder topk", "transcoder topk skip"),
}
CASES = [(name, kind) for name, kinds in TAKEN.items() for kind in kinds]


def test_what_a_library_has_not_is_refused_with_what_takes_it() -> None:
    assert sorted(TAKEN) == names()
    for name in names():
        for kind in set(KINDS) - {*TAKEN[name]}:
            with pytest.raises(PipelineError) as caught:
                find(name).write(made(kind), about(kind))
            others = re.findall(r"to=(\w+)", str(caught.value))
            assert "\n" not in str(caught.value)
            assert others and all(kind in TAKEN[other] for other in others), caught.value


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_written_reads_back_as_the_same_function(
    tmp_path: Path, name: str, kind: str
) -> None:
    sae, x = made(kind), rows()
    folder = written(tmp_path, name, sae, about(kind))
    again = find(name).read(folder)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)
    assert find(name).origin(folder).ports() == about(kind).ports
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(F), rtol=0, atol=1e-6)


def test_the_only_hookpoint_of_sparsifys_folder_is_taken(tmp_path: Path) -> None:
    sae = made("topk")
    written(tmp_path, "sparsify", sae)
    torch.testing.assert_close(find("sparsify").read(tmp_path).W_enc, sae.W_enc)
    (tmp_path / "layers.21").rename(tmp_path / "layers.5")
    written(tmp_path, "sparsify", sae)
    with pytest.raises(PipelineError, match=r"layers\.21, layers\.5"):
        find("sparsify").read(tmp_path)


# -- other people's --------------------------------------------------------------------------------


def test_decoders_that_are_not_unit_are_made_so_where_that_is_exact(tmp_path: Path) -> None:
    """SAELens' TopK that selects by norm, and its ReLU SAEs, whose biases and decoders are free."""
    plain, x = made("topk"), rows()
    scales = torch.linspace(0.5, 3, F)
    free = SAE.of(plain.W_enc, plain.W_dec * scales[:, None], plain.b_enc, plain.b_dec, K)
    folder = written(tmp_path, "saelens", free)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "rescale_acts_by_decoder_norm": True}))
    found = find("saelens").read(folder)
    pre = ((x - free.b_dec) @ free.W_enc + free.b_enc) * scales
    top = pre.topk(K, dim=1)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(
        found(x), f @ (free.W_dec / scales[:, None]) + free.b_dec, rtol=1e-5, atol=1e-5
    )

    config |= {"architecture": "standard", "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    found = find("saelens").read(folder)
    relu = (x @ free.W_enc + free.b_enc).relu()
    torch.testing.assert_close(found(x), relu @ free.W_dec + free.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        (
            "saelens",
            "cfg.json",
            {"architecture": "gated"},
            "architecture gated",
        ),
        (
            "saelens",
            "cfg.json",
            {"normalize_activations": "layer_norm"},
            "normalize_activations=layer_norm",
        ),
        ("sparsify", "cfg.json", {"skip_connection": True}, "skip_connection=true"),
        (
            "sparsify",
            "cfg.json",
            {"activation": "groupmax"},
            "activation groupmax",
        ),
    ],
)
def test_what_cannot_be_taken_is_one_line(
    tmp_path: Path, name: str, file: str, change: dict, said: str
) -> None:
    folder = written(tmp_path, name, made("topk"))
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **change}))
    with pytest.raises(PipelineError, match=re.escape(said)):
        find(name).read(folder)
    (folder / file).write_text("{")
    with pytest.raises(PipelineError, match=re.escape(str(folder / file))):
        find(name).read(folder)


# -- the command -----------------------------------------------------------------------------------


def export(*overrides: str) -> None:
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        command(OmegaConf.to_container(compose("export", list(overrides)), resolve=True))


def a_run(folder: Path, sae: SAE, /, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save({**sae.tensors(), "k": sae.k}, folder / FILE)
    source = {"model": ABOUT.model, "context": ABOUT.context, "text": ABOUT.text}
    config = {"settings": {"layer": 21, **settings}, "environment": {}, "source": source}
    (folder / CONFIG).write_text(yaml.safe_dump(config))
    return folder


def test_the_command_writes_all_that_take_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", made("topk"))
    export(f"run={run}")
    taking = sorted(name for name in names() if "topk" in TAKEN[name])
    assert sorted(path.name for path in (run / "export").iterdir()) == taking
    assert "circuit_tracer: circuit-tracer has no sae" in capsys.readouterr().err
    x = rows()
    for name in taking:
        folder = run / "export" / name
        again = find(name).read(folder)
        torch.testing.assert_close(again(x), load(run / FILE)(x), rtol=1e-5, atol=1e-5)
    export(f"run={run}", "to=[saelens]", f"out={tmp_path / 'elsewhere'}")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["saelens"]


def test_its_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no run is that could be meant
    run = a_run(tmp_path / "made" / "run", made("thresholds"))
    for overrides, named in [
        ((), "run="),
        ((f"run={run}", "to=onnx"), "to=onnx"),
        ((f"run={run}", "to=sparsify"), "to=saelens"),
        ((f"run={tmp_path / 'none'}",), str(tmp_path / "none")),
    ]:
        with pytest.raises(PipelineError, match=re.escape(named)):
            export(*overrides)


def transcoders(
    root: Path, layers: Sequence[int], kind: str = "transcoder topk skip"
) -> list[Path]:
    settings = {"site": "mlp_in", "sae": {"kind": "transcoder", "skip": "skip" in kind}}
    return [a_run(root / f"L{layer}", made(kind), layer=layer, **settings) for layer in layers]


def test_transcoders_of_several_layers_are_one_set_of_circuit_tracer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = transcoders(tmp_path / "runs", [1, 0])
    out = tmp_path / "runs" / "export" / "circuit_tracer"
    for named in (
        "[{}]".format(",".join(map(str, runs))),
        f"'{tmp_path}/runs/L*'",
        tmp_path / "runs",
    ):
        shutil.rmtree(out, ignore_errors=True)
        export(f"run={named}", "to=circuit_tracer")
        config = yaml.safe_load((out / "config.yaml").read_text())
        assert config["transcoders"] == ["topk_layer_0.safetensors", "topk_layer_1.safetensors"]
        assert (config["activation"], config["k"]) == ("topk", K)
        for layer in (0, 1):
            file = out / f"topk_layer_{layer}.safetensors"
            found = find("circuit_tracer").origin(file).ports()
            assert found == ports_of("transcoder", [layer], ["mlp_in"], None)
            again = find("circuit_tracer").read(file)
            torch.testing.assert_close(again(rows()), load(runs[0] / FILE)(rows()))
        assert "gap" not in capsys.readouterr().err
    export(f"run={runs[0]}", "to=circuit_tracer")
    assert "without a gap, and this has 1" in capsys.readouterr().err
    export(f"run='{tmp_path}/runs/L*'", "to=safetensors", f"out={tmp_path / 'each'}")
    assert (tmp_path / "each" / "L1" / "safetensors" / "sae.safetensors").is_file()


def test_transcoders_that_are_no_set_are_refused(tmp_path: Path) -> None:
    (first,) = transcoders(tmp_path / "a", [0])
    for number, (layer, kind, name) in enumerate(
        (
            (0, "transcoder topk skip", "mlp_in of layer 0"),
            (1, "transcoder topk", "skip"),
            (1, "transcoder thresholds skip", "k"),
        )
    ):
        (other,) = transcoders(tmp_path / str(number), [layer], kind)
        with pytest.raises(PipelineError, match=name):
            export(f"run=[{first},{other}]", "to=circuit_tracer")
    with pytest.raises(PipelineError, match="no run"):
        export(f"run='{tmp_path}/x*'", "to=circuit_tracer")


def test_a_crosscoders_file_lists_its_targets_with_widths_and_scales(tmp_path: Path) -> None:
    of = about("crosscoder topk")._replace(scales={"21": 0.5, "27": 2.0}, widths=(6,))
    folder = written(tmp_path, "safetensors", made("crosscoder topk"), of)
    config = json.loads((folder / "config.json").read_text())
    assert config["reads"] == config["writes"] == ["21", "27"]
    assert config["widths"] == {"21": 6, "27": 6} and config["scales"] == {"21": 0.5, "27": 2.0}
    assert find("safetensors").origin(folder).scales == {"21": 0.5, "27": 2.0}
    for wrong in ({"21": 0.5}, {"21": 0.5, "27": -1}, [0.5, 2.0]):
        (folder / "config.json").write_text(json.dumps({**config, "scales": wrong}))
        with pytest.raises(PipelineError, match="scales"):
            find("safetensors").origin(folder)
