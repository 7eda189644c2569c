"""Each phase of a training step on CUDA beside its limit: `python -m tests.bench.kernel_speed
[--out FILE]`.

The limit is what this device did in the same run: bytes that must move over the bandwidth of a
copy, and operations over the rate of a large square product of the same precision. `NAME_of_limit`
is limit over time, 1 is best. Gathers count every pair's row; what they find in the L2 cache moves
faster than the copy, so theirs may be above 1. `_dense` is the same result by dense products (in
TF32), `_torch` by torch's own sparse or fused operation.

Rows and weights are random normal ones, so all latents fire about equally often: the worst case for
caches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tests.bench.outcome import finish

_PRECISIONS = {
    "fp32": "highest",
    "tf32": "high",
}  # names that torch.set_float32_matmul_precision has for them


class Clock:
    """Milliseconds of phases, and the limits of this device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.figures: dict[str, float] = {}
        on_gpu = device.type == "cuda"
        source = torch.randn((1 << 28) if on_gpu else 1000, device=device)
        copied = torch.empty_like(source)
        self.bandwidth = (
            2 * source.nbytes / self.milliseconds(lambda: copied.copy_(source))
        )  # bytes/ms
        side = 8192 if on_gpu else 8
        self.rates = {
            name: 2 * side**3 / self._product(side, name) for name in ("fp32", "tf32", "bf16")
        }  # per ms
        self.figures["copy_GB_per_s"] = self.bandwidth / 1e6
        self.figures |= {
            f"matmul_{name}_TFLOP_per_s": rate / 1e9 for name, rate in self.rates.items()
        }

    def milliseconds(self, phase: Callable[[], object]) -> float:
        """Median of one call, after two that warm up. Caches are not flushed: at full size no input
        fits into them.
        """
        times: list[float] = []
        for number in range(self.repeats + 2):
            if self.device.type == "cuda":
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                began.record()
                phase()
                ended.record()
                torch.cuda.synchronize()
                elapsed = began.elapsed_time(ended)
            else:
                at = time.perf_counter()
                phase()
                elapsed = (time.perf_counter() - at) * 1e3
            if number >= 2:
                times.append(elapsed)
        return statistics.median(times)

    def _product(self, side: int, precision: str) -> float:
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(side, side, device=self.device).to(kind) for _ in range(2))
        out = torch.empty_like(a)
        with _matmul(precision):
            return self.milliseconds(lambda: torch.mm(a, b, out=out))

    def phase(
        self,
        name: str,
        call: Callable[[], object],
        *,
        moved: int = 0,
        flops: tuple[str, int] = ("", 0),
    ) -> None:
        """Time a phase that moves so many bytes, and does so many operations of a precision."""
        took = self.milliseconds(call)
        precision, operations = flops
        limit = max(
            moved / self.bandwidth, operations / self.rates[precision] if operations else 0.0
        )
        self.figures |= {f"{name}_ms": took, f"{name}_of_limit": limit / took}


class _matmul:
    """float32 products in this precision within the block."""

    def __init__(self, precision: str) -> None:
        self.wanted = _PRECISIONS.get(precision, "highest")

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


class Problem:
    """One batch's tensors in the shapes of training; the pairs are those of a real top k."""

    def __init__(self, device: torch.device, d: int, d_sae: int, k: int, batch: int) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.k, self.d_sae = k, d_sae
        self.x, self.upstream = (
            torch.randn(batch, d, generator=draw, device=device) for _ in range(2)
        )
        self.W_dec = torch.nn.functional.normalize(
            torch.randn(d_sae, d, generator=draw, device=device)
        )
        self.b_enc = torch.zeros(d_sae, device=device)
        self.pre = torch.empty(batch, d_sae, device=device)
        torch.addmm(self.b_enc, self.x, self.W_dec.T, out=self.pre)
        kept = self.pre.topk(k, dim=1)
        self.values, self.indices = kept.values.relu().view(-1), kept.indices.view(-1)
        self.dense = torch.zeros_like(self.pre).scatter_(1, kept.indices, kept.values.relu())
        self.starts = torch.arange(0, batch * k, k, device=device)

    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """order, source and starts_by_latent, by one stable sort."""
        latents, order = self.indices.to(torch.int32).sort(stable=True)
        every = torch.arange(self.d_sae, dtype=torch.int32, device=latents.device)
        return order, order // self.k, torch.searchsorted(latents, every)


@torch.no_grad()
def measure(
    device: torch.device, d: int, d_sae: int, k: int, batch: int, repeats: int
) -> dict[str, Any]:
    """Every phase's milliseconds and share of its limit."""
    clock, problem = Clock(device, repeats), Problem(device, d, d_sae, k, batch)
    _encoder(clock, problem)
    _top_k(clock, problem)
    _pairs(clock, problem)
    _gradients(clock, problem)
    _adam(clock, problem)
    return clock.figures


def _encoder(clock: Clock, p: Problem) -> None:
    operations = 2 * p.pre.numel() * p.x.shape[1]
    for precision in ("fp32", "tf32", "bf16"):
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        x, W, b, out = (tensor.to(kind) for tensor in (p.x, p.W_dec.T, p.b_enc, p.pre))
        moved = x.nbytes + W.nbytes + out.nbytes
        with _matmul(precision):
            product = _call(torch.addmm, b, x, W, out=out)
            clock.phase(f"encoder_{precision}", product, moved=moved, flops=(precision, operations))


def _call(function: Callable[..., object], *given: Any, **named: Any) -> Callable[[], object]:
    """The call, for later: a lambda in a loop would see the loop's last values."""
    return lambda: function(*given, **named)


def _top_k(clock: Clock, p: Problem) -> None:
    from residual_saes.train import triton_kernels

    ours, theirs = triton_kernels.topk(p.pre, p.k)[0], p.pre.topk(p.k, dim=1).values
    assert torch.equal(ours.sort(dim=1, descending=True).values, theirs), "top k is not exact"
    clock.phase("topk", lambda: triton_kernels.topk(p.pre, p.k), moved=p.pre.nbytes)
    clock.phase("topk_torch", lambda: p.pre.topk(p.k, dim=1, sorted=False), moved=p.pre.nbytes)


def _pairs(clock: Clock, p: Problem) -> None:
    from residual_saes.train import triton_kernels

    d, rows, narrow = p.x.shape[1], (len(p.x), p.k), p.W_dec.bfloat16()
    moved = len(p.indices) * d * p.W_dec.element_size()
    pairs, flops = (p.indices, p.starts), ("tf32", 2 * p.dense.numel() * d)
    indices, values = p.indices.view(rows), p.values.view(rows)
    torch.testing.assert_close(
        triton_kernels.decode(p.values, *pairs, p.W_dec),
        embedding_bag(indices, p.W_dec, mode="sum", per_sample_weights=values),
        rtol=1e-4,
        atol=1e-4,
    )
    clock.phase("decode", lambda: triton_kernels.decode(p.values, *pairs, p.W_dec), moved=moved)
    clock.phase(
        "decode_bf16", lambda: triton_kernels.decode(p.values, *pairs, narrow), moved=moved // 2
    )
    bags = _call(embedding_bag, indices, p.W_dec, mode="sum", per_sample_weights=values)
    clock.phase("decode_torch", bags, moved=moved)
    clock.phase(
        "values_gradient",
        lambda: triton_kernels.values_gradient(p.upstream, *pairs, p.W_dec),
        moved=moved,
    )
    half = _call(triton_kernels.values_gradient, p.upstream, *pairs, narrow)
    clock.phase("values_gradient_bf16", half, moved=moved // 2)
    with _matmul("tf32"):
        clock.phase("decode_dense", lambda: p.dense @ p.W_dec, flops=flops)
        dense = _call(lambda: (p.upstream @ p.W_dec.T).gather(1, indices))
        clock.phase("values_gradient_dense", dense, flops=flops)


def _gradients(clock: Clock, p: Problem) -> None:
    from residual_saes.train import triton_kernels

    order, source, starts = p.grouped()
    d, flops = p.x.shape[1], ("tf32", 2 * p.dense.numel() * p.x.shape[1])
    moved = len(order) * d * p.x.element_size()
    clock.phase("sort", p.grouped, moved=2 * p.indices.nbytes)
    sparse = _call(triton_kernels.weight_gradient, p.x, p.values, order, source, starts, p.d_sae)
    clock.phase("weight_gradient", sparse, moved=moved)
    sums = _call(triton_kernels.latent_sums, p.values, order, starts)
    clock.phase("latent_sums", sums, moved=order.nbytes + p.values.nbytes)
    bags = _call(embedding_bag, source, p.x, starts, mode="sum", per_sample_weights=p.values[order])
    clock.phase("weight_gradient_torch", bags, moved=moved)
    with _matmul("tf32"):
        clock.phase("weight_gradient_dense", lambda: p.dense.T @ p.x, flops=flops)


def _adam(clock: Clock, p: Problem) -> None:
    """torch's fused Adam, alone and with what a decoder on the unit sphere adds: whether a fused
    kernel would pay.
    """
    weight, gradient = p.W_dec.clone(), torch.randn_like(p.W_dec) * 1e-6
    weight.grad, moved = gradient, 7 * weight.nbytes
    optimizer = torch.optim.Adam([weight], lr=1e-4, fused=True)
    clock.phase("adam", optimizer.step, moved=moved)

    def sphere() -> None:
        optimizer.step()
        weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))

    clock.phase("adam_sphere", sphere, moved=moved)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernel_speed")
    for name, default in (
        ("d", 2560),
        ("d_sae", 32_768),
        ("k", 128),
        ("batch", 8192),
        ("repeats", 20),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    given = vars(parser.parse_args())
    out = given.pop("out")
    if not torch.cuda.is_available():
        sys.exit(
            "no CUDA device: these kernels run on one alone; "
            "on a CPU use `python -m tests.bench.train_speed`"
        )
    finish(given, measure(torch.device("cuda"), **given), out)


if __name__ == "__main__":
    main()
