"""Gemma 4 E4B's true shape on a CPU: memory and rows. Needs 16 GB of disk, and 20 minutes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from residual_saes.data.site import HookPoint
from residual_saes.data.store.store import Store
from residual_saes.harvest.decoder import find_blocks, meta_decoder
from residual_saes.harvest.isolation import forward_inputs
from residual_saes.harvest.site import tap
from tests.harvest.models import E4B, Bare, save_tokenizer

LAYERS = [21, 27]
ANONYMOUS_BYTES = 8e9
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights, written shard by shard: a layer each, and what lies beside the layers."""
    root = tmp_path_factory.mktemp("e4b")
    if shutil.disk_usage(root).free < 20e9:
        pytest.skip("needs 20 GB of disk")
    folder = root / "model"
    folder.mkdir()
    weights = meta_decoder(E4B).state_dict()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        number = name.split(".")[1] if name.startswith("layers.") else name.split(".")[0]
        shards.setdefault(f"model-{number}.safetensors", {})[name] = weight
    torch.manual_seed(0)
    noise = torch.randn(1 << 24)
    weight_map: dict[str, str] = {}
    for file, tensors in shards.items():
        filled: dict[str, torch.Tensor] = {}
        for name, weight in tensors.items():
            filled[f"model.{name}"] = random(noise, weight)
            weight_map[f"model.{name}"] = file
        save_file(filled, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    E4B.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**said, "architectures": ["Gemma4ForCausalLM"]})
    )
    save_tokenizer(folder)
    yield folder
    shutil.rmtree(root)


def random(noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A tensor of a weight's shape: norms near 1, matrices that keep a row's size."""
    count = weight.numel()
    start = count % 1009
    repeats = -(-(count + start) // len(noise))
    values = noise.to(torch.bfloat16).repeat(repeats)[start : start + count].view(weight.shape)
    if weight.ndim < 2:
        return 1 + values / 16
    scaled: torch.Tensor = values * weight.shape[-1] ** -0.5
    return scaled


def test_e4b_stays_below_8_gb_and_its_rows_are_an_untruncated_runs(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 40)
    store_path = tmp_path / "s.zarr"
    command = [sys.executable, "-m", "harvest", f"model.path={folder}", "model.dtype=bfloat16"]
    command += [f"layer={LAYERS}", f"text.path={tmp_path}/text.txt", "tokens=256", "context=64"]
    command += ["batch=2", "unit=128", "device=cpu", f"store={store_path}"]
    with (tmp_path / "said").open("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.05)
        log.seek(0)
        said = log.read()
    assert process.returncode == 0, said
    print(f"anonymous memory at its peak: {peak / 1e9:.2f} GB\n{said}")
    assert 0 < peak < ANONYMOUS_BYTES
    assert "packed" in said

    store = Store.open(str(store_path))
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for unit in range(store.units):
        (inputs,) = forward_inputs(store.tokens(unit), store.piece_starts(unit), "packed")
        with torch.inference_mode(), tap(Bare(find_blocks(whole.base_model)), LAYERS) as taken:
            whole.base_model(input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False)
        for layer in LAYERS:
            rows = taken[HookPoint(layer)].flatten(0, 1)
            expected = rows[torch.from_numpy(store.permutation(unit))]
            stored = torch.from_numpy(store.residuals(layer, unit)).view(torch.bfloat16)
            assert torch.equal(stored, expected)
            assert np.isfinite(stored.float().numpy()).all()


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not a mapped file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
