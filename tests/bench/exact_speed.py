"""What exact top k from a bf16 product costs beside the product: `python -m tests.bench.exact_speed
[--weights FILE] [--out FILE]`.

On a CPU without bf16 products the product is computed beforehand, in float32 of the same operands,
and taken as given: `given` below. The other phases of train.exact.encode are real, and stand beside
torch's and OpenBLAS's whole encode of the same rows. All are CPU time, the least of --repeats, in
turns. `--bf16_ms` is what the product takes where it is known, and gives the sum.

Weights are normal ones, whose pre-activations are the most crowded; --weights has others: a
safetensors file with x (n, d), encoder (F, d) and b_enc (F,).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from residual_saes.train import exact, product
from tests.bench.outcome import finish

PHASES = {
    "round, norms": "Cheap.of",
    "search": "_scan",
    "bars of pairs": "_refined",
    "scores": "scored",
}


def timed(call: Callable[[], Any]) -> float:
    """CPU ms of one call."""
    began = time.process_time()
    call()
    return 1e3 * (time.process_time() - began)


def phases(call: Callable[[], Any]) -> dict[str, float]:
    """CPU ms of the phases of one call of train.exact.encode; `select` is the rest."""
    took = dict.fromkeys(PHASES, 0.0)

    def around(phase: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            result = own(*given, **named)
            took[phase] += 1e3 * (time.process_time() - began)
            return result

        return run

    with ExitStack() as stack:
        for phase, name in PHASES.items():
            owner: Any = exact.Cheap if "." in name else exact
            own = getattr(owner, name.split(".")[-1])
            stack.enter_context(mock.patch.object(owner, name.split(".")[-1], around(phase, own)))
        whole = timed(call)
    return {**took, "select": whole - sum(took.values()), "all but the product": whole}


def with_product(cheap: exact.Cheap) -> Tensor:
    """(n, F) bfloat16 p, as a CPU with bf16 products has it."""
    pre = torch.addmm(cheap.bias.float(), cheap.x.float(), cheap.encoder.float().T)
    return pre.bfloat16()


def measure(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, repeats: int) -> dict[str, Any]:
    """Every way in turns."""
    cheap = exact.Cheap.of(x, encoder, b_enc, b_enc.abs(), wide=False)
    p = with_product(cheap)
    found = list[int]()
    scored = exact.scored

    def blocks(cheap: exact.Cheap, block_bytes: int | None) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, exact.blocks.BLOCK_BYTES // (2 * p.shape[1]))
        for first in range(0, len(p), step):
            rows = slice(first, min(first + step, len(p)))
            yield rows, p[rows]

    def counted(*given: Any) -> Tensor:
        found.append(len(given[3]))
        return scored(*given)

    every: dict[str, list[float]] = {}
    for _ in range(repeats):
        for by in ("torch", "openblas"):
            ms = timed(lambda by=by: product.encode(x, encoder, b_enc, k, by=by))  # type: ignore[misc]
            every.setdefault(f"{by}, whole", []).append(ms)
        with (
            mock.patch.object(exact.Cheap, "blocks", blocks),
            mock.patch.object(exact, "scored", counted),
        ):
            for phase, ms in phases(lambda: exact.encode(x, encoder, b_enc, k)).items():
                every.setdefault(phase, []).append(ms)
    least = {name: min(values) for name, values in every.items()}
    return {
        "ms": least,
        "candidates_per_row": found[0] / len(x),
        "bound_over_length": float((cheap.widest / x.norm(dim=1)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.exact_speed")
    for name, default in {"d": 384, "d_sae": 4096, "k": 32, "rows": 2048, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weights", type=Path, help="x, encoder and b_enc in place of normal ones")
    parser.add_argument("--bf16_ms", type=float, help="of the product, where it was measured")
    parser.add_argument("--out", type=Path, help="write it there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    drawn = torch.Generator().manual_seed(0)
    if asked.weights:
        given = load_file(asked.weights)
        x, encoder, b_enc = given["x"], given["encoder"], given["b_enc"]
    else:
        x = torch.randn(asked.rows, asked.d, generator=drawn)
        encoder = torch.randn(asked.d_sae, asked.d, generator=drawn).div_(asked.d**0.5)
        b_enc = torch.zeros(asked.d_sae)
    figures = measure(x, encoder, b_enc, asked.k, asked.repeats)
    if asked.bf16_ms:
        figures["ms"]["bf16, whole"] = asked.bf16_ms + figures["ms"]["all but the product"]
    shape = {"rows": len(x), "d": x.shape[1], "d_sae": len(encoder), "k": asked.k}
    finish({**shape, "weights": "given" if asked.weights else "normal"}, figures, asked.out)


if __name__ == "__main__":
    main()
