"""Residuals equal the whole model's for each document alone, in every family."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from weakref import ref

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.gemma4 import modeling_gemma4

from residual_saes.data.errors import PipelineError, SettingError
from residual_saes.data.machine import is_out_of_memory
from residual_saes.data.site import HookPoint
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import FileText
from residual_saes.harvest import spine
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.forward import batch_residuals, forward, scatter
from residual_saes.harvest.isolation import attention_mask, forward_inputs
from residual_saes.harvest.loop import OutOfMemory, harvest
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.site import tap
from tests.harvest.models import COMPOSITE, CONFIGS, VOCABULARY, Bare, save_composite, save_model
from tests.harvest.spine_here import SpineHere

FAMILIES = tuple(CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _text_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spine, "SpineProcess", SpineHere)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in FAMILIES}


def open_model(folder: Path) -> LanguageModel:
    return load(ModelConfig(str(folder), dtype="float32"))


def batch(
    seed: int = 0, rows: int = 3, context: int = 40
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    starts = rng.random((rows, context)) < 0.1
    starts[:, 0] = True
    tokens = np.where(starts, 2, rng.integers(4, VOCABULARY, (rows, context))).astype(np.uint32)
    return tokens, starts


def pieces(starts: NDArray[np.bool_]) -> list[slice]:
    edges = [*np.flatnonzero(starts).tolist(), starts.size]
    return [slice(a, b) for a, b in pairwise(edges)]


def independent(
    folder: Path, tokens: NDArray[np.uint32], starts: NDArray[np.bool_], layer: int
) -> torch.Tensor:
    """(B*T, d) float32 hidden states of transformers, each piece run alone in the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for piece in pieces(starts):
        ids = torch.from_numpy(tokens.ravel()[piece].astype(np.int64))[None]
        with torch.no_grad():
            out.append(model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0])
    return torch.cat(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_used_exactly_where_it_is_right(folders: dict[str, Path], family: str) -> None:
    expected = "padded" if family == "qwen3_5" else "packed"
    assert choose_isolation(open_model(folders[family]), [0, 2], 40) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_documents_do_not_see_each_other(folders: dict[str, Path], family: str, layer: int) -> None:
    """In fp32, against each document run alone: the error is rounding, not another document."""
    lm = open_model(folders[family])
    lm.isolation = choose_isolation(lm, [layer], 40)
    tokens, starts = batch()
    with tap(lm, [layer]) as taken:
        for inputs in forward_inputs(tokens, starts, lm.isolation):
            forward(lm, inputs, attention_mask(lm.decoder.config, inputs.positions))
            reference = independent(folders[family], tokens, starts, layer)
            states = taken[HookPoint(layer)].flatten(0, 1)
            if inputs.inside is not None:
                states = states[inputs.inside]
                reference = reference[inputs.into]
            torch.testing.assert_close(states, reference, rtol=1e-3, atol=1e-4)


def test_packing_without_positions_mixes_documents(folders: dict[str, Path]) -> None:
    """The comparison above can fail: with nothing said about positions, it is far off."""
    tokens, starts = batch()
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        mixed = model(input_ids=ids, output_hidden_states=True).hidden_states[3].flatten(0, 1)
    reference = independent(folders["llama"], tokens, starts, 2)
    assert (mixed - reference).norm() / reference.norm() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_row_is_the_models(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    (tmp_path / "text.txt").write_text("All work and no play. " * 100)
    layers = (1, len(open_model(folders[family]).blocks) - 2)
    config = HarvestConfig(
        tmp_path / "s.zarr", layers, tokens=300, context=30, batch=2, unit=60, chunk=10
    )
    store = harvest(config, open_model(folders[family]), FileText(tmp_path / "text.txt"))
    for unit in range(store.units):
        tokens, starts = store.tokens(unit), store.piece_starts(unit)
        for layer in layers:
            expected = independent(folders[family], tokens, starts, layer)[store.permutation(unit)]
            stored = torch.from_numpy(store.residuals(layer, unit)).view(torch.bfloat16).float()
            # One bf16 rounding of the same number, or of one that fp32 noise put next to it.
            torch.testing.assert_close(stored, expected, rtol=2**-7, atol=1e-3)


def test_pieces_start_with_exactly_one_bos(folders: dict[str, Path], tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"<bos> document {number} " * (number + 1))
    config = HarvestConfig(tmp_path / "s.zarr", (1,), tokens=300, context=30, batch=2, unit=60)
    store = harvest(config, open_model(folders["llama"]), FileText(tmp_path))
    for unit in range(store.units):
        np.testing.assert_array_equal(store.tokens(unit) == 2, store.piece_starts(unit))


def test_text_that_spells_bos_stays_text(folders: dict[str, Path]) -> None:
    (ids,) = open_model(folders["llama"]).tokenizer.encode(["a <bos> b"])
    assert 2 not in ids
    assert len(ids) > 4


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_self_check_catches_a_layer_off_by_one(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    lm = open_model(folders["gemma4"])
    order = [(layer + shift) % lm.n_layers for layer in range(lm.n_layers)]
    neighbours = Bare(torch.nn.ModuleList([lm.blocks[layer] for layer in order]))

    def wrong(_lm: Any, points: Any, **options: bool) -> Any:
        return tap(neighbours, points, **options)

    monkeypatch.setattr("residual_saes.harvest.selfcheck.tap", wrong)
    with pytest.raises(SettingError, match="layer 2 "):
        choose_isolation(lm, [2], 40)


def test_the_self_check_catches_a_wrong_shape(folders: dict[str, Path]) -> None:
    lm = open_model(folders["llama"])
    (one,) = forward_inputs(*batch(), "packed")
    with pytest.raises(PipelineError, match=r"shape \(3, 20, 32\)"):
        scatter(torch.zeros(3, 20, 32), one, torch.empty(120, 32))
    assert lm.d_model == 32


def test_hooks_are_gone_after_an_error(folders: dict[str, Path]) -> None:
    lm = open_model(folders["llama"])
    with pytest.raises(RuntimeError, match="in between"), tap(lm, [0, 1]):
        raise RuntimeError("in between")
    assert not any(block._forward_hooks for block in lm.blocks)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "bfloat16") for family in FAMILIES),
        pytest.param("gemma4", "float32", marks=pytest.mark.long),
        pytest.param("llama", "float32", marks=pytest.mark.long),
    ],
)
def test_truncation_changes_no_bit(
    folders: dict[str, Path], family: str, dtype: Literal["float32", "bfloat16"]
) -> None:
    """Cut ever deeper: above, at and below Gemma 4's layers 4 and 5 that share keys and values."""
    lm = load(ModelConfig(str(folders[family]), dtype=dtype))
    lm.isolation = choose_isolation(lm, range(lm.n_layers), 40)
    passes = forward_inputs(*batch(), lm.isolation)

    def residuals(lm: LanguageModel, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        points = list(map(HookPoint, layers))
        out = {point: torch.zeros(120, 32, dtype=getattr(torch, dtype)) for point in points}
        batch_residuals(lm, passes, points, out)
        return {point.layer: rows for point, rows in out.items()}

    def weights(lm: LanguageModel) -> int:
        return sum(weight.numel() for weight in lm.decoder.parameters() if not weight.is_meta)

    whole = residuals(lm, range(lm.n_layers))
    for deepest in range(lm.n_layers - 1, -1, -1):
        before = weights(lm)
        lm.truncate_(deepest)
        assert weights(lm) < before or deepest == lm.n_layers - 1
        cuts = [lm]
        if deepest in (1, lm.n_layers - 2):
            loaded = load(ModelConfig(str(folders[family]), dtype=dtype), deepest=deepest)
            loaded.isolation = lm.isolation
            assert weights(loaded) == weights(lm)
            cuts.append(loaded)
        for cut in cuts:
            for layer, rows in residuals(cut, range(deepest + 1)).items():
                assert rows.abs().max() > 0
                assert torch.equal(rows, whole[layer]), (deepest, layer)


@pytest.mark.parametrize("family", ["gemma4", "gemma4_multimodal"])
def test_inputs_of_layers_that_are_gone_are_gone(folders: dict[str, Path], family: str) -> None:
    lm = open_model(folders[family])
    above = [ref(weight) for weight in lm.blocks[3].parameters()]
    gc.disable()
    try:
        lm.truncate_(2)
        assert above and all(weight() is None for weight in above)
    finally:
        gc.enable()
    table: torch.Tensor = lm.decoder.embed_tokens_per_layer.weight
    assert table.shape == (VOCABULARY, 3 * 8)
    assert table.untyped_storage().nbytes() == table.numel() * 4  # and not a view of the whole


def test_towers_are_never_built(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_: object) -> None:
        raise AssertionError("a tower was built")

    monkeypatch.setattr(modeling_gemma4.Gemma4VisionModel, "__init__", built)
    monkeypatch.setattr(modeling_gemma4.Gemma4AudioModel, "__init__", built)
    with pytest.raises(AssertionError, match="a tower was built"):
        AutoModelForCausalLM.from_pretrained(folders["gemma4_multimodal"])
    lm = open_model(folders["gemma4_multimodal"])
    names = {name.split(".")[0] for name, _ in lm.decoder.named_parameters()}
    assert names == {
        "embed_tokens",
        "embed_tokens_per_layer",
        "layers",
        "norm",
        "per_layer_model_projection",
        "per_layer_projection_norm",
    }


@pytest.mark.parametrize("family", COMPOSITE)
def test_a_composites_text_decoder_is_the_wholes(tmp_path: Path, family: str) -> None:
    folder = save_composite(tmp_path, family)
    whole = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        .get_decoder()
        .state_dict()
    )
    ours = open_model(folder).decoder.state_dict()
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_settings_beside_the_weights_are_part_of_the_identity(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["gemma4_multimodal"], folder)

    def changed(where: str, **values: object) -> dict[str, str]:
        recorded = json.loads((folders["gemma4_multimodal"] / "config.json").read_text())
        (recorded if where == "" else recorded[where]).update(values)
        (folder / "config.json").write_text(json.dumps(recorded))
        return open_model(folder).identity

    first = changed("")
    assert changed("", transformers_version="9.9.9", _name_or_path="elsewhere") == first
    assert changed("text_config", dtype="float32") == first
    assert changed("vision_config", hidden_act="relu") == first
    other = changed("text_config", sliding_window=4)
    assert {name for name in first if first[name] != other[name]} == {"config"}


def test_out_of_memory_is_known_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**60, np.uint8)
    assert is_out_of_memory(torchs.value)
    assert is_out_of_memory(numpys.value)
    assert is_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    )
    with pytest.raises(RuntimeError) as shapes:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(shapes.value)
    assert not is_out_of_memory(ValueError("out of memory"))
    error = OutOfMemory(unit=7, batch=16, context=8)
    assert "unit 7" in str(error) and "16 rows" in str(error) and "oom=halve" in str(error)


def test_incomplete_and_damaged_models_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"model .* layers.1.mlp.up_proj.weight"):
        open_model(folder)
    data = (folders["llama"] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SettingError, match=str(folder)):
        open_model(folder)
    shutil.copytree(folders["gemma4_multimodal"], folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"model .* layers.1.mlp.up_proj.weight"):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(SettingError, match="siglip_vision_model"):
        open_model(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=str(tmp_path / "empty")):
        open_model(tmp_path / "empty")


def test_another_model_on_the_same_store_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("All work and no play. " * 100)
    config = HarvestConfig(tmp_path / "s.zarr", (1,), tokens=200, context=20, batch=2, unit=40)
    harvest(config, open_model(folders["llama"]), FileText(tmp_path / "text.txt"))
    with pytest.raises(
        PipelineError,
        match=r"model.architecture .*'LlamaForCausalLM'.*'GPT2LMHeadModel'",
    ):
        harvest(config, open_model(folders["gpt2"]), FileText(tmp_path / "text.txt"))
    assert Store.open(config.store).complete(1)


def test_a_layer_added_later_equals_one_harvested_at_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("All work and no play. " * 100)
    source = FileText(tmp_path / "text.txt")
    both = HarvestConfig(tmp_path / "one.zarr", (1, 3), tokens=200, context=20, batch=2, unit=40)
    first = dataclasses.replace(both, store=tmp_path / "two.zarr", layers=(1,))
    together = harvest(both, open_model(folders["gemma4"]), source)
    harvest(first, open_model(folders["gemma4"]), source)
    later = harvest(dataclasses.replace(first, layers=(3,)), open_model(folders["gemma4"]), source)
    for unit in range(together.units):
        for layer in (1, 3):
            np.testing.assert_array_equal(
                together.residuals(layer, unit), later.residuals(layer, unit)
            )
    assert later.layers == [1, 3]


def test_run_takes_no_cache_and_no_head(folders: dict[str, Path]) -> None:
    lm = open_model(folders["gemma4"])
    assert not hasattr(lm.decoder, "lm_head")
    rows = batch_residuals(lm, forward_inputs(*batch(), "packed"), [HookPoint(1)])[HookPoint(1)]
    assert rows.shape == (120, 32)
    assert rows.dtype == torch.bfloat16


def test_a_model_that_gives_nan_is_stopped(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All work and no play. " * 100)
    config = HarvestConfig(tmp_path / "s.zarr", (1,), tokens=200, context=20, batch=2, unit=40)
    lm = open_model(folders["llama"])
    lm.blocks[1].mlp.down_proj.weight.data[0] = float("nan")
    with pytest.raises(PipelineError, match="layer 1 "):
        harvest(config, lm, FileText(tmp_path / "text.txt"))


def test_a_sink_does_not_hide_wrong_rows_from_the_self_check(folders: dict[str, Path]) -> None:
    """One row of a batch is 2 % off, beside sinks at 1000 times the norm."""

    def off(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, 0] *= 1000
        if len(changed) > 1:
            changed[1, 3] *= 1.02
        return changed

    lm = open_model(folders["llama"])
    lm.blocks[1].register_forward_hook(off)
    assert choose_isolation(lm, [1], 40) == "alone"
    assert choose_isolation(lm, [0], 40) == "packed"
