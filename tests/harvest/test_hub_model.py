"""Models from a hub of our own on this machine: what is downloaded, and what it makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import Gemma4ForCausalLM  # noqa: F401 (before the processes of the checks fork)

from residual_saes.data.errors import SettingError
from residual_saes.data.store.store import Store
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest import spine
from residual_saes.harvest.command import command
from residual_saes.harvest.hub_model import complete
from residual_saes.harvest.model import ModelConfig, load
from residual_saes.harvest.weight_files import INDEX, SINGLE, is_tower
from tests.harvest.models import save_model
from tests.harvest.spine_here import SpineHere
from tests.harvest.test_command import settings
from tests.stand_in_hub import MODEL, Alone, serving

EMBEDDED_FILES = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir()}
DESCRIPTION = {name for name in EMBEDDED_FILES if name.endswith((".json", ".jinja"))}
# What a repository may hold beside what is used.
BESIDE = {
    "consolidated.safetensors": b"another layout",
    "original/model.safetensors": b"another layout",
    "original/params.json": b"{}",
    "model.gguf": b"another format",
    "onnx/model.onnx": b"another format",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    "LICENSE.txt": b"words",
}
CHAT = [
    {"role": "user", "content": "Sam has 3 apples and buys 4 more. How many apples has Sam?"},
    {"role": "assistant", "content": "3 + 4 = 7\n#### 7"},
]


def harvest(folder: str, store: str, *overrides: str) -> str:
    """Harvest chats with the hub's model; what was printed."""
    chats = Path(folder) / "chats.jsonl"
    chats.write_text((json.dumps({"messages": CHAT}) + "\n") * 60)
    with (
        redirect_stderr(StringIO()) as told,
        redirect_stdout(StringIO()) as printed,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(spine, "SpineProcess", SpineHere)
        command(
            settings(
                "model=tiny",
                f"model.path={MODEL}",
                f"text.path={chats}",
                "text.messages=messages",
                "tokens=1280",
                "context=64",
                "layer=2",
                f"store={folder}/{store}",
                *overrides,
            )
        )
    return told.getvalue() + printed.getvalue()


# -- checks, each in a process of its own ----------------------------------------------------------


def check_the_embedded_model(folder: str) -> None:
    assert "chat_template" not in json.loads(EMBEDDED_FILES["tokenizer_config.json"])
    with serving({**EMBEDDED_FILES, **BESIDE}, MODEL) as hub:
        planned = harvest(folder, "s.zarr", "action=plan")
        assert "\nhours " in planned
        assert set(hub.downloads) == DESCRIPTION  # a plan reads headers, by ranges, and no weight
        assert {name for name, _, _ in hub.ranges} == {SINGLE}
        hub.downloads.clear()
        told = harvest(folder, "s.zarr")
        assert hub.downloads == [SINGLE]
        assert re.search(rf"2\.8 MB .*{MODEL}.*{SINGLE}", told), told
        hub.downloads.clear()
        there = complete(MODEL, "main")
        assert hub.downloads == []
    assert complete(MODEL, "main") == there  # the hub is gone, and the cache is not


def check_offline(folder: str) -> None:
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # as the variable of that name would
    lm = load(ModelConfig(MODEL, dtype="float32"), deepest=2)
    recorded = dict(Store.open(Path(folder, "s.zarr")).manifest["model"])
    assert recorded == {**lm.identity, "chat_template": lm.tokenizer.template_digest}


def check_shards(folder: str) -> None:
    """A model that sees, in three files: the one of its towers alone stays where it is."""
    source = Path(folder, "model")
    hub_files = sharded(source)
    with serving({**hub_files, **BESIDE}, MODEL) as hub:
        harvest(folder, "s.zarr", "model.dtype=bfloat16")
        weights = {name for name in hub.downloads if name.endswith(".safetensors")}
        assert weights == {f"model-0000{number}-of-00003.safetensors" for number in (1, 3)}
        # A later start asks for nothing.
        hub.downloads.clear()
        complete(MODEL, "main")
        there, here = (
            load(ModelConfig(path, dtype="float32"), head=True) for path in (MODEL, str(source))
        )
        assert hub.downloads == []
    weights = here.causal.state_dict()
    for name, weight in there.causal.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def check_refusals(folder: str) -> None:
    no_weights = {name: data for name, data in EMBEDDED_FILES.items() if name != SINGLE}
    with serving({**no_weights, **BESIDE}, MODEL) as hub:
        for status, code in ((401, "GatedRepo"), (403, "GatedRepo"), (404, "RepoNotFound")):
            hub.faults = [(hub.api, (status, {"X-Error-Code": code}))]
            refused(folder, f"model.path={MODEL}", "HF_TOKEN")
        refused(folder, MODEL, "nothing", more=["model.revision=nothing"])
        refused(folder, SINGLE, INDEX)
    with serving(BESIDE, MODEL):
        refused(folder, MODEL, "config.json")


def refused(folder: str, *facts: str, more: list[str] | None = None) -> None:
    with pytest.raises(SettingError) as caught:
        harvest(folder, "none.zarr", *(more or []))
    assert "\n" not in str(caught.value)
    for fact in facts:
        assert fact in str(caught.value), caught.value
    assert not Path(folder, "none.zarr").exists()


def sharded(folder: Path) -> dict[str, bytes]:
    """A multimodal model's files, its towers in the second of three shards."""
    save_model(folder, "gemma4_multimodal")
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    towers = [name for name in names if is_tower(name)]
    text = [name for name in names if not is_tower(name)]
    assert len(towers) > 3
    parts = [text[:9], towers, text[9:]]
    weight_map: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        files[file] = save({name: tensors[name] for name in part}, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["chat_template.jinja"] = EMBEDDED_FILES["chat_template.jinja"]
    for path in folder.glob("*.json"):
        files[path.name] = path.read_bytes()
    return files


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_embedded_model_is_a_hub_model_too(alone: Alone, tmp_path: Path) -> None:
    alone.run(check_the_embedded_model, tmp_path / "cache", str(tmp_path))
    alone.run(check_offline, tmp_path / "cache", str(tmp_path))
    recorded = dict(Store.open(tmp_path / "s.zarr").manifest["model"])
    local = load(ModelConfig(str(MODEL_DIR), dtype="float32"), deepest=2)
    assert recorded.pop("chat_template") == local.tokenizer.template_digest
    assert recorded.pop("id") == MODEL
    assert recorded == {name: value for name, value in local.identity.items() if name != "id"}


@pytest.mark.parametrize("check", [check_shards, check_refusals])
def test_against_a_hub(check: Callable[[str], None], alone: Alone, tmp_path: Path) -> None:
    alone.run(check, tmp_path / "cache", str(tmp_path))


def test_towers_are_told_by_their_names() -> None:
    for name in (
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.embed_audio.embedding_projection.weight",
        "multi_modal_projector.linear_1.weight",
    ):
        assert is_tower(name), name
    for name in (
        "model.language_model.layers.0.mlp.gate_proj.weight",
        "language_model.model.layers.3.cross_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "transformer.h.0.attn.c_attn.weight",
        "lm_head.weight",
        "model.image_newline",
    ):
        assert not is_tower(name), name
