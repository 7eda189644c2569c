"""Harvests of random weights in the shape of Gemma 4 E4B: whole ones, and the bare forward."""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from residual_saes.data import tuning
from residual_saes.data.device import free_bytes
from residual_saes.data.text.sources import TinyText
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.data.tuning import Choice
from residual_saes.harvest import attention_trial
from residual_saes.harvest.cost import cost
from residual_saes.harvest.tokens import Tokenizer
from tests.bench.gpu_check.notes import Notes
from tests.bench.harvest_speed import SHAPES as BENCH
from tests.bench.harvest_speed import Shape, one_round, peak_flops
from tests.bench.kernel_speed import Clock
from tests.harvest.models import CONFIGS

AIM = 100_000  # tokens/s up to layer 21
E4B = BENCH["e4b"]
_SMALL: Any = copy.deepcopy(CONFIGS["gemma4"])
_SMALL.vocab_size = _SMALL.vocab_size_per_layer_input = 1024
TOY = Shape(_SMALL, (2, 4), tokens=1024, context=64, batch=4, unit=256)
TINY = {"part": {"whole": TOY}, "attention": {"whole": TOY}}
_SHARE = 0.3  # of the card's peak, which a harvest is expected to reach
_ROOM = 1.5  # bytes of disk free, over those of the rows
_MEMORY = 22e9  # bytes: E4B's weights while they are made, two batches


def part(device: torch.device, notes: Notes, whole: Shape = E4B) -> None:
    """Both layers, and the upper one alone; attention by SDPA."""
    documents = [one.content for one in islice(TinyText().documents(None), 2000)]
    began = time.perf_counter()
    ids = Tokenizer.load(MODEL_DIR).encode(documents)
    speed = sum(map(len, ids)) / (time.perf_counter() - began)
    notes.figure("text into tokens, alone", speed, "tokens/s")
    for layers in dict.fromkeys((whole.layers, whole.layers[:1])):
        name = "+".join(f"L{layer}" for layer in layers)
        with notes.piece(f"harvest to {name}"):
            _harvest(replace(whole, layers=layers), name, device, notes)


def attention(device: torch.device, notes: Notes, whole: Shape = E4B) -> None:
    """The upper layer, attention by the fastest way that the card has, as in a long harvest."""
    shape, choose, chosen = replace(whole, layers=whole.layers[:1]), tuning.choose, list[Choice]()

    def kept(*given: Any, **named: Any) -> Choice:
        chosen.append(choose(*given, **named))
        return chosen[-1]

    worth = mock.patch.object(attention_trial, "WORTH_TRYING", 0)
    with worth, mock.patch.object(tuning, "choose", kept):
        _harvest(shape, f"L{shape.layers[0]}, attention tried", device, notes, seconds=3)
    for choice in chosen:
        notes.table("choice", choice.table())


def _harvest(
    shape: Shape, name: str, device: torch.device, notes: Notes, seconds: float = 10
) -> None:
    """One whole harvest of some seconds, then the bare forward passes of its units."""
    if device.type == "cuda":
        gc.collect()  # the model before this one
        torch.cuda.empty_cache()
    free = free_bytes(device) or 0
    if device.type == "cuda" and free < _MEMORY:
        notes.table(
            "left out", [f"needs {_MEMORY / 1e9:.0f} GB of the card; {free:,} bytes are free"]
        )
        return
    product = 1e3 * Clock(device, 3).rates["bf16"]  # FLOP/s of a large one
    notes.figure("a large product in bfloat16", product / 1e12, "TFLOP/s")
    flop = cost(shape.config, shape.layers, "bfloat16", shape.batch, shape.context).flop
    folder = Path(tempfile.mkdtemp())
    try:
        if device.type == "cuda":
            tokens = _SHARE * seconds * product / flop
            shape = sized(shape, tokens, shutil.disk_usage(folder).free)
        found = one_round(shape, device.type, folder)
    finally:
        shutil.rmtree(folder)
    aim = AIM if len(shape.layers) == 1 else None
    speed, bare = shape.tokens / found["units_s"], shape.tokens / found["forward_s"]
    notes.figure(f"harvest to {name}, once begun", speed, "tokens/s", aim)
    notes.figure(f"harvest to {name}, whole", shape.tokens / found["harvest_s"], "tokens/s")
    notes.figure(f"harvest to {name}, bare forward", bare, "tokens/s")
    for what, peak in (("large product", product), ("data sheet", peak_flops(device))):
        for who, rate in (("harvest", speed), ("bare forward", bare)) if peak else ():
            mfu = 100 * rate * flop / peak
            notes.figure(f"MFU of the {who} to {name}, of the {what}", mfu, "%")
    lines = [f"{shape.tokens:,} tokens, {flop / 1e9:.2f} GFLOP a token"]
    notes.table(f"harvest to {name}", [*lines, *(f"{one:<10}{found[one]:8.2f} s" for one in found)])


def sized(shape: Shape, tokens: float, room: float) -> Shape:
    """A harvest of so many tokens, whose rows fit on the disk with `room` bytes free."""
    rows = shape.config.hidden_size * 2 * len(shape.layers)
    most = min(tokens, room / _ROOM / rows, shape.tokens)
    return replace(shape, tokens=max(2, int(most / shape.unit)) * shape.unit)
