"""The kernels of a training step against dense sums in float64, at the shape of a run.

Errors are shares of the largest element of what is right. float32 sums of some 128 terms err by
1e-6 of it, products in TF32 by 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from residual_saes.train import gpu, kernels, product
from residual_saes.train import ways as run_ways
from residual_saes.train.blocks import Matmul
from residual_saes.train.kernels import Kept
from residual_saes.train.ways import Ways
from tests.bench import kernel_speed
from tests.bench.gpu_check.notes import Notes
from tests.bench.kernel_speed import Problem

CLOSE = 1e-5  # of sums in float32
BLOCK = 1024  # rows that are computed in float64 at a time


class Size(NamedTuple):
    """An SAE and a batch of its rows."""

    d: int
    d_sae: int
    k: int
    batch: int  # rows


RUN, TOY = Size(2560, 32_768, 128, 8192), Size(16, 128, 4, 64)
TINY = {"part": {"size": TOY}}  # of a part's function, what a CPU is given


class Way(NamedTuple):
    """How pre-activations are computed."""

    matmul: Matmul
    product: str  # of product.WAYS
    # What a pre-activation of normal entries may err by, over |x| |w| / sqrt(d): some ten times its
    # standard deviation.
    rounding: float


WAYS = {
    "fp32": Way("fp32", "torch", 2e-5),
    "tf32": Way("tf32", "torch", 8 * 2.0**-10),
    "bf16": Way("bf16", "torch", 8 * 2.0**-7),
    "exact": Way("fp32", "bf16", 2e-5),  # fp32's k largest, found by a product in bfloat16
}


def ways_on(device: torch.device) -> dict[str, Way]:
    """Those that there are on a device."""
    there = {name: way for name, way in WAYS.items() if way.product in product.ways(device.type)}
    if device.type != "cuda":
        del there["tf32"]
    return there


@contextmanager
def pinned(way: Way, size: Size, device: torch.device) -> Iterator[Ways]:
    """Within the block all goes as in a run of this shape, whose product is this way."""
    run_ways.forget()
    product.pin(size.d, size.d_sae, device, way.product)
    shape = run_ways.Shape(size.d, *size)
    try:
        yield run_ways.settle(shape, device, way.matmul, None)
    finally:
        run_ways.forget()


@torch.no_grad()
def part(device: torch.device, notes: Notes, size: Size = RUN) -> None:
    """Every kernel against its reference, and its speed beside its limit."""
    problem = Problem(device, *size)
    draw = torch.Generator(device).manual_seed(1)
    problem.b_enc = torch.randn(size.d_sae, generator=draw, device=device) / 8
    for what, compare in COMPARED.items():
        with notes.piece(what):
            notes.check(what, compare(problem))
    with notes.piece("ways of a run"), pinned(WAYS["fp32"], size, device) as settled:
        for choice in settled.choices:
            notes.table(choice.what, choice.table())
        for what in {*settled.taken} & {*COMPARED}:
            if settled.taken[what] != gpu.FIRST:
                notes.check(f"{what}, {settled.taken[what]}", COMPARED[what](problem))
    with notes.piece("encode"):
        encoders(problem, size, device, notes)
    del problem
    if device.type == "cuda":
        with notes.piece("speeds of kernels"):
            found = kernel_speed.measure(device, *size, repeats=5)
            notes.table("speeds of kernels", [f"{name:<28}{found[name]:12.3f}" for name in found])


# -- sums over pairs -------------------------------------------------------------------------------


def apart(found: Tensor, right: Tensor) -> str | None:
    """How far a result is from what it must be; None: no further than float32 rounds."""
    if not bool(torch.isfinite(found).all()):
        return "not finite"
    error = float((found.double() - right).abs().amax() / right.abs().amax())
    return None if error <= CLOSE else f"error {error:.1e}, allowed {CLOSE:.0e}"


def by_rows(p: Problem, compute: Callable[[slice], Tensor]) -> Tensor:
    """Float64 results of blocks of rows, one below the other."""
    return torch.cat([compute(slice(at, at + BLOCK)) for at in range(0, len(p.x), BLOCK)])


def kept_of(p: Problem) -> Kept:
    return Kept.even(p.values.view(-1, p.k), p.indices.view(-1, p.k))


def topk(p: Problem) -> str | None:
    values, columns = kernels.topk(p.pre, p.k)
    if not torch.equal(values, p.pre.gather(1, columns)):
        return "values are not those of their columns"
    if bool((columns.sort(dim=1).values.diff(dim=1) <= 0).any()):
        return "a column is kept twice"
    wanted = p.pre.topk(p.k, dim=1).values
    differ = int((values.sort(dim=1, descending=True).values != wanted).any(1).sum())
    return f"{differ} of {len(values)} rows keep others" if differ else None


def decode(p: Problem) -> str | None:
    W_dec = p.W_dec.double()
    right = by_rows(p, lambda rows: p.dense[rows].double() @ W_dec)
    return apart(kernels.decode(kept_of(p), p.W_dec), right)


def values_gradient(p: Problem) -> str | None:
    W_dec, indices = p.W_dec.double(), p.indices.view(-1, p.k)
    right = by_rows(p, lambda rows: (p.upstream[rows].double() @ W_dec.T).gather(1, indices[rows]))
    return apart(kernels.values_gradient(p.upstream, kept_of(p), p.W_dec), right.view(-1))


def weight_gradient(p: Problem) -> str | None:
    right = torch.zeros_like(p.W_dec, dtype=torch.float64)
    for at in range(0, len(p.x), BLOCK):
        rows = slice(at, at + BLOCK)
        right += p.dense[rows].double().T @ p.x[rows].double()
    kept, bags = kept_of(p), kernels.group_by_latent(p.indices, p.d_sae)
    return apart(kernels.weight_gradient(p.x, kept.values, kept.rows, bags), right)


def latent_sums(p: Problem) -> str | None:
    right = p.dense.sum(0, dtype=torch.float64)
    return apart(kernels.latent_sums(p.values, p.indices, p.d_sae), right)


COMPARED = {
    "topk": topk,
    "decode": decode,
    "values_gradient": values_gradient,
    "weight_gradient": weight_gradient,
    "latent_sums": latent_sums,
}


# -- the encoder -----------------------------------------------------------------------------------


def encoders(p: Problem, size: Size, device: torch.device, notes: Notes) -> None:
    """Every way's kept latents, and fp32's of a whole batch and above a threshold."""
    found: dict[str, Kept] = {}
    for name, way in ways_on(device).items():
        with notes.piece(f"encode, {name}"), pinned(way, size, device):
            found[name] = product.encode(p.x, p.W_dec, p.b_enc, p.k, way.matmul)
    scale = float(p.x.norm(dim=1).amax()) / size.d**0.5  # all directions have norm 1
    worst = {name: [0.0, 0.0] for name in found}  # error of a value; a latent below the k-th
    W_enc, b_enc = p.W_dec.double().T, p.b_enc.double()
    for at in range(0, len(p.x), BLOCK):
        rows = slice(at, at + BLOCK)
        pre = p.x[rows].double() @ W_enc + b_enc
        kth = pre.topk(p.k, dim=1).values[:, -1:]
        for name, kept in found.items():
            indices = kept.indices.view(-1, p.k)[rows]
            own = pre.gather(1, indices)
            off = (kept.values.view(-1, p.k)[rows] - own.relu()).abs().nan_to_num(torch.inf)
            twice = indices.sort(dim=1).values.diff(dim=1) == 0
            below = torch.inf if bool(twice.any()) else float((kth - own).amax())
            worst[name] = [max(worst[name][0], float(off.amax())), max(worst[name][1], below)]
    for name, (off_by, below) in worst.items():
        allowed = WAYS[name].rounding * scale
        said = f"values err by {off_by:.1e}, the least kept is {below:.1e} below the k-th"
        wrong = f"{said}; allowed {allowed:.1e}"
        held = off_by <= allowed and below <= 2 * allowed
        notes.check(f"encode, {name}", None if held else wrong, said)
    with notes.piece("encode_batch, encode_above"), pinned(WAYS["fp32"], size, device):
        x = p.x[: 2 * BLOCK]
        notes.check("encode_batch, encode_above", ragged(p, x, x.double() @ W_enc + b_enc, scale))


def ragged(p: Problem, x: Tensor, pre: Tensor, scale: float) -> str | None:
    """The kept of a whole batch, and those above a threshold: their values and their number."""
    allowed, wanted = WAYS["fp32"].rounding * scale, len(x) * p.k
    least = float(pre.view(-1).topk(wanted).values[-1])
    threshold = torch.tensor(least, dtype=torch.float32, device=pre.device)
    batch = product.encode_batch(x, p.W_dec, p.b_enc, p.k)
    above = product.encode_above(x, p.W_dec, p.b_enc, threshold)
    for kept in (batch, above):
        right = pre[kept.rows, kept.indices]
        error = float((kept.values - right).abs().amax())
        if not (error <= allowed and float(right.amin()) >= least - 2 * allowed):
            return f"values err by {error:.1e}, the least is {float(right.amin()):.4f}"
    few, many = int((pre > least + allowed).sum()), int((pre > least - allowed).sum())
    if len(batch.values) != wanted or not few <= len(above.values) <= many:
        return f"{len(batch.values)} and {len(above.values)} kept, not {wanted}, {few} to {many}"
    return None
