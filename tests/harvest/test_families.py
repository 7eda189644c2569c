"""Every causal family of transformers is harvested right, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from data.errors import SettingError
from harvest.model import LanguageModel, ModelConfig, load
from harvest.selfcheck import choose_isolation
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
from tests.harvest.models import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = sorted(families().keys() - UNTRIED.keys())
GROUPS = [FAMILIES[first::8] for first in range(8)]


def listed(verdicts: list[Verdict]) -> set[str]:
    """The rows of the page that tell these verdicts."""
    return {line for line in page(verdicts).splitlines() if line.startswith("| ")}


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_every_family_is_right_or_refused_as_the_page_says(tmp_path: Path, group: int) -> None:
    verdicts = [tried(family, tmp_path) for family in GROUPS[group]]
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


def test_a_threshold_counts_only_where_a_context_crosses_it(tmp_path: Path) -> None:
    """Phi's longrope takes its factors from the longest piece of a batch."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 30,
        "partial_rotary_factor": 1.0,
    }
    folder = save_family(tmp_path, "phi3")
    lm = opened(folder, rope_parameters=rope, original_max_position_embeddings=30)
    assert choose_isolation(lm, [2], 28) == "packed"
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4.0)
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
