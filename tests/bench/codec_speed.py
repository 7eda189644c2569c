"""What each codec costs and saves: `python -m tests.bench.codec_speed [--rows real] [--out FILE]`.

Bytes per token, share of variance lost (ordinary rows, against the rows as the model gave them),
and GB of decoded bfloat16 per CPU second, chunk by chunk. Two kinds of rows: synthetic ones at
Gemma's width, normal times an uneven length, with massive channels; and real ones, residuals of the
embedded model on its own problems, which are only 64 wide. int8's statistics come from the first
half of the rows, as a store's come from its first unit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data.store.codec import NAMES, exact, is_lossless
from residual_saes.data.store.int8 import squared_errors, standardisation
from residual_saes.data.store.kinds import ORDINARY, describe
from residual_saes.data.store.moments import Moments
from residual_saes.data.store.scales import Int8
from residual_saes.data.store.zarr_bfloat16 import to_bits
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.data.tiny.problems import document, problems
from tests.bench.outcome import finish

_LAYER = 6  # the middle of the embedded model


def synthetic(n: int, d: int = 2560) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Bits of (n, d) rows, ten of whose channels have means of 60 to 400 deviations; no BOS."""
    rng = np.random.default_rng(0)
    deviation, length = np.exp(rng.normal(0, 0.5, d)), rng.lognormal(0, 0.25, n)
    mean = rng.normal(size=d) * 0.3 * deviation
    mean[rng.choice(d, 10, replace=False)] *= np.geomspace(200, 1300, 10)
    bits = np.empty((n, d), np.uint16)
    for at in range(0, n, 1024):
        part = slice(at, min(at + 1024, n))
        normal = rng.standard_normal((part.stop - at, d), np.float32)
        bits[part] = to_bits((normal * deviation * length[part, None] + mean).astype(np.float32))
    return bits, np.zeros(n, np.bool_)


def real(n: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Bits of (n, 64) residuals of the embedded model on its own problems, and which rows are
    BOS.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32, trust_remote_code=False
    ).eval()
    bits, found, stream = [], 0, problems("train")
    while found < n:
        texts = [tokenizer.bos_token + document(problem) for problem in islice(stream, 64)]
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch, output_hidden_states=True).hidden_states[_LAYER + 1]
        inside = batch["attention_mask"].bool()
        first = torch.zeros_like(inside)
        first[:, 0] = True
        bits.append((states[inside].bfloat16().view(torch.uint16).numpy(), first[inside].numpy()))
        found += len(bits[-1][0])
    rows, bos = (np.concatenate(parts)[:n] for parts in zip(*bits, strict=True))
    order = np.random.default_rng(0).permutation(n)
    return rows[order], bos[order]


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of this thread, on which everything here runs: a busy machine changes them
    little.
    """
    began = time.thread_time()
    action()
    return time.thread_time() - began


def measure(
    rows: NDArray[np.uint16], bos: NDArray[np.bool_], chunk: int, rounds: int
) -> dict[str, Any]:
    """The figures of every codec, in alternating rounds."""
    half, whole = (
        describe(torch.from_numpy(rows[:n]).view(torch.bfloat16), torch.from_numpy(bos[:n]), chunk)
        for n in (len(rows) // 2, len(rows))
    )
    first = Moments(int(half.counts[ORDINARY]), *half.moments[ORDINARY])
    codecs = {
        name: exact(name, 2) if is_lossless(name) else Int8(standardisation(first))
        for name in NAMES
    }
    chunks = [rows[at : at + chunk] for at in range(0, len(rows), chunk)]
    out = np.empty_like(rows[:chunk])
    figures: dict[str, Any] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        for name, codec in codecs.items():
            encoded = [codec.encode(part) for part in chunks]
            encode = seconds(lambda codec=codec: [codec.parts(part) for part in chunks])
            decode = seconds(
                lambda codec=codec, encoded=encoded: [codec.decode(data, out) for data in encoded]
            )
            if number:  # the first round warms caches and the allocator
                times[name].append((encode, decode))
            figures[f"{name}_bytes_per_token"] = sum(map(len, encoded)) / len(rows)
    for name, codec in codecs.items():
        encode, decode = (
            rows.nbytes / 1e9 / statistics.median(column)
            for column in zip(*times[name], strict=True)
        )
        lost = squared_errors(rows, codec.stored(rows))[whole.kinds == ORDINARY].sum()
        figures |= {f"{name}_encode_GB_per_s": encode, f"{name}_decode_GB_per_s": decode}
        figures[f"{name}_variance_lost"] = f"{lost / whole.moments[ORDINARY, 1].sum():.2e}"
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.codec_speed")
    parser.add_argument("--rows", choices=("synthetic", "real"), default="synthetic")
    for name, default in (("count", 16_384), ("chunk", 1024), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out = shape.pop("out")
    assert shape["count"] % shape["chunk"] == 0, (
        "whole chunks: --count must be a multiple of --chunk"
    )
    rows, bos = synthetic(shape["count"]) if shape["rows"] == "synthetic" else real(shape["count"])
    finish(
        {**shape, "width": rows.shape[1]}, measure(rows, bos, shape["chunk"], shape["rounds"]), out
    )


if __name__ == "__main__":
    main()
