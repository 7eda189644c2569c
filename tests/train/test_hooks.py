"""The names of hook points in transformers' modules are where a harvest takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from residual_saes.data.site import SITES, HookPoint
from residual_saes.harvest.model import ModelConfig, load
from residual_saes.harvest.site import tap
from residual_saes.train.export import sparsify
from residual_saes.train.export.hooks import family, module
from residual_saes.train.export.origin import of_hook
from tests.harvest.families import save_family
from tests.harvest.models import COMPOSITE, save_model
from tests.train.test_formats import about, made

pytestmark = pytest.mark.filterwarnings("ignore")
LAYER = 2
FAMILIES = [
    *("gemma4", "gpt2", "gpt_neox", "llama"),
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            "gemma",
            "gemma2",
            "gemma3_text",
            "mistral",
            "phi3",
            "qwen2",
            "qwen3",
            "smollm3",
        )
    ),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_modules_hold_the_values_of_its_sites(tmp_path: Path, name: str) -> None:
    folder = (save_model if name == "gemma4" else save_family)(tmp_path, name)
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    lm = load(ModelConfig(str(folder), dtype="float32"))
    known = family(architecture)
    assert known is not None
    points = [HookPoint(LAYER, site) for site in SITES if site in known.sites]
    found: dict[str, torch.Tensor] = {}

    def keep(site: str, of_input: bool) -> Any:
        def hook(_module: Any, inputs: Any, options: Any, output: Any) -> None:
            value = [*inputs, *options.values()][0] if of_input else output
            found[site] = value[0] if isinstance(value, tuple) else value

        return hook

    for point in points:
        path, _, side = f".{known.sites[point.site]}".rpartition(".")
        place = lm.blocks[LAYER].get_submodule(path.removeprefix("."))
        place.register_forward_hook(keep(point.site, side == "input"), with_kwargs=True)
    with tap(lm, points) as taken, torch.inference_mode():
        lm.decoder(input_ids=torch.arange(20, 40).reshape(2, 10), use_cache=False)
    for point in points:
        torch.testing.assert_close(found[point.site], taken[point], rtol=0, atol=0)

    with torch.device("meta"):
        whole = getattr(transformers, architecture)(AutoConfig.from_pretrained(folder))
    assert len(whole.get_submodule(known.layers)) == len(lm.blocks)


def test_the_layers_of_a_model_that_sees_are_named_in_it() -> None:
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(COMPOSITE["gemma3"])
    name = module(HookPoint(LAYER), type(whole).__name__)
    assert name == f"model.language_model.layers.{LAYER}.output"
    assert whole.get_submodule(name.removesuffix(".output")) is not None


def test_of_an_unknown_family_no_module_is_named() -> None:
    for architecture in (None, "", "OlmoForCausalLM", "xLlamaForCausalLM"):
        assert module(HookPoint(LAYER), architecture) is None
    assert module(HookPoint(LAYER, "resid_mid"), "GPTNeoXForCausalLM") is None


def test_what_an_mlps_module_gives_is_mlp_out_in_families_without_a_post_norm() -> None:
    for name in ("layers.5.mlp", "blocks.5.mlp.hook_out"):
        ports = of_hook(name).ports("LlamaForCausalLM")
        assert ports is not None and ports.writes[0].point == HookPoint(5, "mlp_out")
        assert of_hook(name).ports("Gemma3ForCausalLM") is of_hook(name).ports() is None


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_sparsifys_folder_is_a_modules_where_it_is_one(tmp_path: Path, architecture: str) -> None:
    of = about("transcoder topk")._replace(architecture=architecture)
    files = sparsify.write(made("transcoder topk"), of)
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    name = {"Llama": "layers.21.mlp", "Gemma": "layers.21.mlp_out"}[architecture[:5]]
    assert {Path(file).parent.name for file in files} == {name}
    assert sparsify.origin(tmp_path).ports(architecture) == of.ports
