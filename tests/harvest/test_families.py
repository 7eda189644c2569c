"""Every causal family of transformers is harvested right, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from residual_saes.data.errors import SettingError
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.model_folder import read_config
from residual_saes.harvest.selfcheck import choose_isolation
from tests.harvest.families import (
    ALLOWED,
    PAGE,
    UNTRIED,
    Verdict,
    families,
    page,
    save_family,
    tried,
)
from tests.harvest.models import enlarge_, save_model, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
GROUPS = 24


def listed(verdicts: list[Verdict]) -> set[str]:
    """The rows of the page that tell these verdicts."""
    return {line for line in page(verdicts).splitlines() if line.startswith("| ")}


@pytest.mark.parametrize(
    "group", [0, *(pytest.param(group, marks=pytest.mark.long) for group in range(1, GROUPS))]
)
def test_every_family_is_right_or_refused_as_the_page_says(tmp_path: Path, group: int) -> None:
    every = sorted(families().keys() - UNTRIED.keys())
    verdicts = [tried(family, tmp_path) for family in every[group::GROUPS]]
    assert {v.family: v.error for v in verdicts if not v.error <= ALLOWED} == {}
    missing = listed(verdicts) - set(PAGE.read_text().splitlines())
    assert not missing, "python -m tests.harvest.families writes the page anew"


def test_the_page_has_all_families_and_no_others() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert sorted(name for name in names if name != "family") == sorted(families())


# -- what decides how documents stay apart ---------------------------------------------------------


def opened(folder: Path, **said: Any) -> LanguageModel:
    """A model whose config.json also says this."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    return load(ModelConfig(str(folder), dtype="float32"), deepest=2)


def test_a_model_that_reads_its_padding_runs_each_piece_alone(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "llama")
    assert choose_isolation(opened(folder), [2], 40) == "packed"
    assert choose_isolation(opened(folder, is_causal=False), [2], 40) == "alone"


@pytest.mark.parametrize("threshold", [8, 16, 30])
def test_a_threshold_counts_only_where_a_context_crosses_it(tmp_path: Path, threshold: int) -> None:
    """Phi's longrope takes its factors from the longest piece of a batch."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": threshold,
        "partial_rotary_factor": 1.0,
    }
    folder = save_family(tmp_path, "phi3")
    lm = opened(folder, rope_parameters=rope, original_max_position_embeddings=threshold)
    assert choose_isolation(lm, [2], threshold) == "packed"
    assert choose_isolation(lm, [2], 40) == "alone"


def test_a_model_that_remembers_the_longest_piece_is_refused(tmp_path: Path) -> None:
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    lm = opened(save_family(tmp_path, "llama"), rope_parameters=rope, max_position_embeddings=8)
    with pytest.raises(SettingError, match="LlamaModel"):
        choose_isolation(lm, [2], 40)


def test_a_last_layer_that_gives_no_residual_is_refused(tmp_path: Path) -> None:
    """XLM lists its attentions apart; nothing reads what the last one gives."""
    folder = save_family(tmp_path, "xlm")
    lm = load(ModelConfig(str(folder), dtype="float32"))
    with pytest.raises(SettingError, match="layer 3 of XLMModel"):
        choose_isolation(lm, [3], 40)


def test_bfloat16_noise_decides_nothing(tmp_path: Path) -> None:
    """40 random layers, whose rows in bfloat16 differ by more than the 2 % of an ignored mask."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        bos_token_id=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=40,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    enlarge_(model)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    lm = load(ModelConfig(str(tmp_path), dtype="bfloat16"), deepest=38)
    before = {name: weight.clone() for name, weight in lm.blocks[0].named_parameters()}
    assert choose_isolation(lm, [20, 38], 40) == "packed"
    for name, weight in lm.blocks[0].named_parameters():  # its float32 weights are gone again
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before[name])


def test_a_store_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    """Where several ways are right, the one on record is tried first."""
    lm = opened(save_family(tmp_path, "llama"))
    assert choose_isolation(lm, [2], 40, "padded") == "padded"


# -- what config.json says beside the model's function ---------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"output_hidden_states": True, "output_attentions": False, "use_cache": False},
        {"torch_dtype": "float16", "return_dict": False},
    ],
)
def test_how_a_configuration_would_run_the_model_does_not_matter(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    lm = opened(save_family(tmp_path, "llama"), **said)
    assert choose_isolation(lm, [0, 2], 40) == "packed"


@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "unheard of"},
        {"bits": 4},
        {},
        "gptq",
    ],
)
def test_a_quantised_model_without_its_library_is_one_line(tmp_path: Path, method: Any) -> None:
    folder = save_family(tmp_path, "llama")
    with pytest.raises(SettingError, match=str(folder)):
        opened(folder, quantization_config=method)


def test_quantised_weights_of_a_multimodal_model_are_refused(tmp_path: Path) -> None:
    """The method stands beside the text part, which would be read as if it had none."""
    path = save_model(tmp_path, "gemma4_multimodal") / "config.json"
    said = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(SettingError, match="fp8"):  # before any weight is read
        read_config(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"hidden_size": 64},
        {"vocab_size": 301},
        {"num_attention_heads": 3},
        {"hidden_act": "no such function"},
        {"model_type": "no_such_model"},
        {"auto_map": {"AutoModel": "modeling_mine.Mine"}, "model_type": "mine"},
        {"rope_parameters": {"rope_type": "no such rope"}},
    ],
)
def test_a_configuration_that_cannot_be_is_one_line(tmp_path: Path, said: dict[str, Any]) -> None:
    folder = save_family(tmp_path, "llama")
    with pytest.raises(SettingError):
        choose_isolation(opened(folder, **said), [0], 40)
