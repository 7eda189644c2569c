"""How much of the bare forward's speed a harvest keeps: `python -m tests.bench.harvest_speed
[--shape e4b]`.

A harvest needs at least the truncated forward passes of its batches. So the figure is a share:
tokens/s of the whole harvest into a new store (text, tokens, checks at start, forward, permutation,
statistics, compression, syncs, commits) over tokens/s of those passes alone, in alternating rounds
of one process, so that a busy machine slows both. Beside it stands what each part would take by
itself: whichever comes nearest to the whole is what limits it.

The models are random and of Gemma 4's architecture, made on the device in its own type, with the
embedded tokenizer and its texts: `small` for any machine, `e4b` in the true shape of Gemma 4 E4B,
15 GB at load, for a large accelerator. Making the model is part of nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModel, Gemma4TextConfig

from residual_saes.data.site import HookPoint
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import TinyText
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest import loop
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.cost import cost
from residual_saes.harvest.decoder import find_blocks
from residual_saes.harvest.forward import batch_residuals
from residual_saes.harvest.isolation import forward_inputs
from residual_saes.harvest.model import LanguageModel, ModelConfig
from residual_saes.harvest.selfcheck import check
from residual_saes.harvest.tokens import Tokenizer
from tests.bench.outcome import finish
from tests.harvest.models import E4B

SMALL = Gemma4TextConfig(
    vocab_size=1024,
    vocab_size_per_layer_input=1024,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    global_head_dim=128,
    sliding_window=256,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=32,
    layer_types=[*["sliding_attention"] * 3, "full_attention"] * 2,
)


# Dense bfloat16, of NVIDIA's data sheets; the first that the card's name has.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,  # SXM
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Shape:
    """What is harvested."""

    config: Gemma4TextConfig
    layers: tuple[int, ...]
    tokens: int
    context: int  # tokens
    batch: int  # rows
    unit: int  # tokens


SHAPES = {
    "small": Shape(SMALL, (3, 6), tokens=131_072, context=512, batch=8, unit=4_096),
    "e4b": Shape(E4B, (21, 27), tokens=1_048_576, context=1_024, batch=16, unit=65_536),
}


def random_model(shape: Shape, device: str) -> LanguageModel:
    """A model of this shape that was never on disk."""
    dtype: Literal["float32", "bfloat16"] = "float32" if device == "cpu" else "bfloat16"
    torch.manual_seed(0)
    with torch.device(device):
        decoder = AutoModel.from_config(copy.deepcopy(shape.config), dtype=getattr(torch, dtype))
    text = decoder.config
    identity = {
        "id": "random",
        "revision": "main",
        "architecture": type(decoder).__name__,
        "weights": "random",
    }
    identity |= {"config": "random", "tokenizer": "embedded", "dtype": dtype}
    tokenizer = Tokenizer.load(MODEL_DIR)
    measures = {
        "bos": tokenizer.bos,
        "d_model": text.hidden_size,
        "n_layers": text.num_hidden_layers,
    }
    return LanguageModel(
        config=ModelConfig("random", dtype=dtype, device=device),
        decoder=decoder.eval().requires_grad_(False),
        blocks=find_blocks(decoder),
        tokenizer=tokenizer,
        d_model=text.hidden_size,
        vocabulary=text.vocab_size,
        n_layers=text.num_hidden_layers,
        deepest=text.num_hidden_layers - 1,
        max_context=text.max_position_embeddings,
        identity=identity | measures,
    )


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the card in bfloat16 by its data sheet; None: it is not among those above."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def seconds_of(work: Callable[[], None], device: str) -> float:
    """Seconds of `work`, with what it left queued on the device."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()  # the last pass counts too
    return time.perf_counter() - began


def forwards(store: Store, lm: LanguageModel, layers: tuple[int, ...]) -> None:
    """The forward passes of every batch of the store, with the residuals taken and dropped."""
    rows = store.manifest["batch"]
    points = list(map(HookPoint, layers))
    for unit in range(store.units):
        tokens, starts = store.tokens(unit), store.piece_starts(unit)
        for at in range(0, len(tokens), rows):
            batch_residuals(
                lm,
                forward_inputs(tokens[at : at + rows], starts[at : at + rows], lm.isolation),
                points,
            )


def copies(lm: LanguageModel, shape: Shape) -> None:
    """As many bytes as the store's residuals, from the device to pinned memory, a batch at a
    time.
    """
    rows = shape.batch * shape.context
    source = torch.zeros(rows, lm.d_model, dtype=torch.bfloat16, device=lm.config.device)
    target = torch.empty_like(source, device="cpu", pin_memory=lm.config.device.startswith("cuda"))
    for _ in range(shape.tokens // rows * len(shape.layers)):
        target.copy_(source, non_blocking=True)


@contextmanager
def clocked(owner: Any, name: str) -> Iterator[list[float]]:
    """Notes the seconds of every call of a class's or module's `name`, in whatever thread."""
    method, seconds = getattr(owner, name), list[float]()

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)


def one_round(shape: Shape, device: str, folder: Path) -> dict[str, float]:
    """Seconds of a whole harvest and of its parts alone."""
    lm = random_model(shape, device)
    config = HarvestConfig(
        folder / "bench.zarr",
        shape.layers,
        shape.tokens,
        shape.context,
        batch=shape.batch,
        unit=shape.unit,
    )
    with clocked(Store, "commit_residuals") as commits, clocked(loop, "make") as units:
        began = time.perf_counter()
        store = loop.harvest(config, lm, TinyText())
        whole = time.perf_counter() - began
    found = {
        "harvest_s": whole,
        "units_s": sum(units),
        "forward_s": seconds_of(lambda: forwards(store, lm, shape.layers), device),
        "copy_s": seconds_of(lambda: copies(lm, shape), device),
        "write_s": sum(commits),
    }
    assert store.rows == shape.tokens
    check(store, lm, config.points)  # a unit's rows have the same bits again
    shutil.rmtree(config.store)
    return found


def measure(shape: Shape, rounds: int, device: str) -> dict[str, Any]:
    """Whole harvests and their parts in turn; medians, and the share's range."""
    folder = Path(tempfile.mkdtemp())
    try:
        every = []
        for _ in range(rounds + 1):
            every.append(one_round(shape, device, folder))
            gc.collect()  # the next round's model needs the memory of this one's
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    finally:
        shutil.rmtree(folder)
    every = every[1:]  # the first warms caches
    median = {name: statistics.median(one[name] for one in every) for name in every[0]}
    shares = [one["forward_s"] / one["harvest_s"] for one in every]
    dtype = "float32" if device == "cpu" else "bfloat16"
    flop = cost(shape.config, shape.layers, dtype, shape.batch, shape.context).flop * shape.tokens
    peak = peak_flops(torch.device(device))
    residuals = shape.tokens * shape.config.hidden_size * 2 * len(shape.layers)
    parts = {
        name: median[name] / median["harvest_s"] for name in ("forward_s", "copy_s", "write_s")
    }
    return {
        **median,
        "harvest_tokens_per_s": shape.tokens / median["harvest_s"],
        "forward_tokens_per_s": shape.tokens / median["forward_s"],
        "share": statistics.median(shares),
        "share_lowest": min(shares),
        "share_highest": max(shares),
        "forward_tflop_per_s": flop / median["forward_s"] / 1e12,
        "forward_mfu": flop / median["forward_s"] / peak if peak else None,
        "harvest_mfu": flop / median["harvest_s"] / peak if peak else None,
        "residuals_gb_per_s": residuals / median["harvest_s"] / 1e9,
        "copy_of_harvest": parts["copy_s"],
        "write_of_harvest": parts["write_s"],
        "limited_by": max(parts, key=lambda name: parts[name]).removesuffix("_s"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.harvest_speed")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    shape = SHAPES[asked.shape]
    said = {name: getattr(shape, name) for name in ("layers", "tokens", "context", "batch", "unit")}
    said = {"shape": asked.shape, **said, "rounds": asked.rounds, "device": asked.device}
    finish(said, measure(shape, asked.rounds, asked.device), asked.out)


if __name__ == "__main__":
    main()
