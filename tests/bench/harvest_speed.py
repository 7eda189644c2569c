"""How much of the bare forward's speed a harvest keeps: `python -m tests.bench.harvest_speed [--out FILE]`.

A harvest needs at least the truncated forward passes of its batches. So the figure is a share: tokens/s of the whole
harvest into a new store (text, tokens, checks at start, forward, permutation, statistics, compression, syncs, commits)
over tokens/s of those passes alone, in alternating rounds of one process, so that a busy machine slows both.
Loading the model is part of neither. The model is random, of Gemma 4's architecture, with the embedded tokenizer.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4TextConfig

from data.store import Store
from data.text import TinyText
from data.tiny import MODEL_DIR
from harvest.lm import LanguageModel, ModelConfig, forward_inputs, load, run
from harvest.loop import harvest
from harvest.plan import HarvestConfig
from tests.bench.outcome import finish


def save_model(folder: Path, width: int, layers: int) -> None:
    """A random Gemma 4 of `width` and `layers`, every sixth layer with full attention."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = Gemma4TextConfig(
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        head_dim=64,
        global_head_dim=128,
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=layers // 3,
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bare(store: Store, lm: LanguageModel, layers: tuple[int, ...]) -> float:
    """Seconds of the forward passes of every batch of the store, with the residuals taken and dropped."""
    rows = store.manifest["batch"]
    began = time.perf_counter()
    for unit in range(store.units):
        tokens, starts = store.tokens(unit), store.piece_starts(unit)
        for at in range(0, len(tokens), rows):
            run(lm, forward_inputs(tokens[at : at + rows], starts[at : at + rows], lm.isolation), layers)
    if lm.config.device.startswith("cuda"):
        torch.cuda.synchronize()  # the last pass counts too
    return time.perf_counter() - began


def measure(width: int, depth: int, tokens: int, context: int, rounds: int, device: str) -> dict[str, Any]:
    """Alternate whole harvests and bare passes."""
    folder = Path(tempfile.mkdtemp())
    layers = (depth // 2, depth - 2)
    try:
        save_model(folder / "model", width, depth)
        pairs = []
        for number in range(rounds + 1):
            lm = load(
                ModelConfig(str(folder / "model"), dtype="float32" if device == "cpu" else "bfloat16", device=device)
            )
            config = HarvestConfig(folder / f"{number}.zarr", layers, tokens, context)
            began = time.perf_counter()
            store = harvest(config, lm, TinyText())
            pairs.append((time.perf_counter() - began, bare(store, lm, layers)))
            shutil.rmtree(config.store)
        whole, alone = zip(*pairs[1:], strict=True)  # the first round warms caches
        shares = [bare_s / whole_s for whole_s, bare_s in pairs[1:]]
        return {
            "harvest_tokens_per_s": store.rows / statistics.median(whole),
            "forward_tokens_per_s": store.rows / statistics.median(alone),
            "share": statistics.median(shares),
            "share_lowest": min(shares),
            "share_highest": max(shares),
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.harvest_speed")
    for name, default in (("width", 256), ("depth", 12), ("tokens", 32_768), ("context", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out = shape.pop("out")
    finish(shape, measure(**shape), out)


if __name__ == "__main__":
    main()
