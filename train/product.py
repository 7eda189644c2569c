"""The encoder: pre-activations, and what is kept of them, in the fastest right way of this machine.

Three ways give the float32 SAE's own kept latents:

    torch     torch.addmm: the reference, whose bits the tests fix
    openblas  numpy's matrix product, on a CPU: 2/3 of MKL's time at d 2,560 on Zen 3
    bf16      a bf16 product finds candidates, float32 decides among them: train/exact.py

`way` chooses by a trial, once for each shape. Float32 rounds in another order in each way, so a run
that is to repeat its bits has to pin what was chosen before.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from residual_saes.data import tuning
from residual_saes.data.errors import SettingError
from residual_saes.data.tuning import Choice
from residual_saes.train import blocks, exact
from residual_saes.train.blocks import Matmul
from residual_saes.train.kernels import Kept, largest, starts_of, topk

WAYS = ("torch", "openblas", "bf16")

SMALL = 1 << 20  # weights of an encoder; one with fewer is not worth a trial

_SAMPLE = 64  # rows by which encode_batch guesses its bound
# Weights from which OpenBLAS is tried: at d 384, F 4,096 it is as fast as MKL on Zen 3, and the
# clock would choose the bits.
_OPENBLAS = 1 << 22
_FEWEST = 512  # rows for which rounding the encoder to bf16 is worth its time
_TRIAL_WEIGHTS = 1 << 22  # of a CPU's trial, at most: all ways are linear in d_sae

_pinned: dict[tuple[int, int, str], str] = {}
_chosen: dict[tuple[int, int, str], Choice] = {}


def way(d: int, d_sae: int, device: torch.device | str) -> str:
    """The way of this process for a shape: pinned, or found by a trial when first asked for."""
    key = (d, d_sae, torch.device(device).type)
    if key in _pinned:
        return _pinned[key]
    if d * d_sae < SMALL:
        return WAYS[0]
    return choice(*key).chosen


def choice(d: int, d_sae: int, device: torch.device | str) -> Choice:
    """What a trial found, whose result this process keeps."""
    key = (d, d_sae, torch.device(device).type)
    if key not in _chosen:
        names = ways(key[2])
        if "openblas" in names and d * d_sae < _OPENBLAS:
            names.remove("openblas")
        _chosen[key] = _tried(*key, names)
    return _chosen[key]


def pin(d: int, d_sae: int, device: torch.device | str, name: str) -> str:
    """Fix the way of a shape until `unpin`; the one that is fixed: the first that was.

    Raises:
        SettingError: there is no such way here.
    """
    kind = torch.device(device).type
    if name not in ways(kind):
        raise SettingError(
            f"the encoder product's way {name!r} is not to be had on this {kind}, which has "
            f"{', '.join(ways(kind))}; go on where it began, or start a new run="
        )
    return _pinned.setdefault((d, d_sae, kind), name)


def unpin() -> None:
    """Fix no way any more."""
    _pinned.clear()


def known() -> dict[tuple[int, int, str], Choice]:
    """The trials of this process, by (d, d_sae, kind of device)."""
    return dict(_chosen)


def ways(kind: str) -> list[str]:
    """The ways that a kind of device can go."""
    found = ["torch"]
    if kind == "cpu" and blocks.openblas_threads() is not None:
        found.append("openblas")
    if _multiplies_bf16(kind):
        found.append("bf16")
    return found


def _multiplies_bf16(kind: str) -> bool:
    """Whether the device has bf16 products; emulated ones take ten times as long as float32's."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    is_fast: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return kind == "cpu" and is_fast


def _tried(d: int, d_sae: int, kind: str, names: list[str]) -> Choice:
    """Try ways on random rows and weights of a shape; on a CPU with _TRIAL_WEIGHTS at most."""
    what = f"encoder product {d} x {d_sae}"
    if len(names) == 1:
        return Choice(what, names[0], ())
    width = d_sae if kind == "cuda" else min(d_sae, max(_TRIAL_WEIGHTS // d, 256))
    k = max(1, width // 128)
    drawn = torch.Generator().manual_seed(0)
    encoder = torch.randn(min(width, 1024), d, generator=drawn).div_(d**0.5).to(kind)
    turned = [encoder.roll(turn, 1) for turn in range(-(-width // len(encoder)))]
    encoder = torch.cat(turned)[:width]  # as good as drawn, and sooner there
    rows = 8 * _FEWEST if kind == "cuda" else _FEWEST if "bf16" in names else 64
    x = torch.randn(rows, d, generator=drawn).to(kind)
    b_enc = torch.randn(width, generator=drawn).mul_(0.1).to(kind)
    few = x[:8]
    pre = few.double() @ encoder.double().T + b_enc
    wanted = pre.topk(k).values.sort(1).values
    near = 1e-5 * float(pre.abs().amax())
    candidates: dict[str, Callable[[], Kept]] = {}
    for name in names:
        candidates[name] = partial(encode, x, encoder, b_enc, k, by=name)

    def fault(kept: Kept) -> str | None:
        """Whether the latents and values kept are those of float64, up to float32's rounding."""
        own = pre.gather(1, kept.indices.view(-1, k)[: len(few)])
        off = (own.relu() - kept.values.view(-1, k)[: len(few)]).abs().amax()
        missed = (own.sort(1).values - wanted).abs().amax()
        worst = float(torch.maximum(off, missed))
        return None if worst <= near else f"off by {worst:.2g} from float64"

    if "bf16" in names:
        over = exact.of_bound(few, encoder, b_enc, kind == "cuda")
        if not over <= 1:
            del candidates["bf16"]
    seconds = 0.1 if kind == "cuda" else 2e-8 * d * width  # 31 ms at d 384, F 4,096; 84 at most
    return tuning.choose(what, candidates, fault, seconds=seconds, device=kind)


def _way(x: Tensor, encoder: Tensor, matmul: Matmul, by: str | None) -> str:
    """The way that is asked for, or this process's; lossy operands and float64 have one alone."""
    if matmul != "fp32" or x.dtype is not torch.float32:
        return "torch"
    if by is None:
        by = way(encoder.shape[1], len(encoder), x.device)
        if by == "bf16" and len(x) < _FEWEST:
            return "torch"
    return by


def encode(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    k: int,
    matmul: Matmul = "fp32",
    block_bytes: int | None = None,
    by: str | None = None,
) -> Kept:
    """Keep the k largest of x @ W_enc + b_enc in each row, then apply ReLU.

    Args:
        x: (n, d), less b_dec.
        encoder: (F, d), W_enc transposed.
        block_bytes: of pre-activations at a time; None: BLOCK_BYTES, on CUDA GPU_BLOCK_BYTES.
        by: the way, of fp32; None: this process's.
    """
    by = _way(x, encoder, matmul, by)
    if by == "bf16":
        return exact.encode(x.contiguous(), encoder.contiguous(), b_enc, k, block_bytes)
    values = x.new_empty(len(x), k)
    indices = x.new_empty(len(x), k, dtype=torch.int64)
    for rows, pre in blocks.pre_activations(x, encoder, b_enc, matmul, block_bytes, by):
        values[rows], indices[rows] = topk(pre, k)
    return Kept.even(values.relu_(), indices)


def encode_above(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    matmul: Matmul = "fp32",
    block_bytes: int | None = None,
    by: str | None = None,
) -> Kept:
    """Keep the elements of x @ W_enc + b_enc above `threshold`, () or (F,), and NaN; no ReLU."""
    by = _way(x, encoder, matmul, by)
    if by == "bf16":
        whole = (x.contiguous(), encoder.contiguous())
        return exact.encode_above(*whole, b_enc, threshold, block_bytes)
    parts = []
    for rows, pre in blocks.pre_activations(x, encoder, b_enc, matmul, block_bytes, by):
        parts.append(blocks.above(pre, threshold, rows.start))
    return _joined(parts, len(x))


def encode_batch(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    k: int,
    matmul: Matmul = "fp32",
    block_bytes: int | None = None,
    by: str | None = None,
) -> Kept:
    """Keep the n k largest positive elements of all of x @ W_enc + b_enc; fewer if there are fewer.

    A bound drops most elements block by block. It is estimated from a sample of rows, so that
    1.5 n k elements pass. If too few pass, a second pass keeps all that are positive.
    """
    by = _way(x, encoder, matmul, by)
    if by == "bf16":
        kept = exact.encode_batch(x.contiguous(), encoder.contiguous(), b_enc, k, block_bytes)
    else:
        kept = _likely(x, encoder, b_enc, k, matmul, block_bytes, by)
    if len(kept.values) <= len(x) * k:
        return kept
    chosen = largest(kept.values, len(x) * k)
    rows_of_pairs = kept.rows[chosen]
    starts = starts_of(rows_of_pairs, len(x))
    return Kept(kept.values[chosen], kept.indices[chosen], rows_of_pairs, starts)


def _likely(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    k: int,
    matmul: Matmul,
    block_bytes: int | None,
    by: str,
) -> Kept:
    """The n k largest elements, and more; or all that are positive, of which there may be fewer."""
    bound = None
    parts = []
    for rows, pre in blocks.pre_activations(x, encoder, b_enc, matmul, block_bytes, by):
        if bound is None:
            sample = pre[:_SAMPLE].reshape(-1)
            rank = min(len(sample), 3 * k * min(len(pre), _SAMPLE) // 2)
            bound = sample.topk(rank, sorted=False).values.amin().nan_to_num(0.0).clamp_min(0)
        parts.append(blocks.above(pre, bound, rows.start))
    kept = _joined(parts, len(x))
    if len(kept.values) < len(x) * k and bound is not None and bound > 0:
        return encode_above(x, encoder, b_enc, x.new_zeros(()), matmul, block_bytes, by)
    return kept


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], n: int) -> Kept:
    values, indices, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    return Kept(values, indices, rows, starts_of(rows, n))
