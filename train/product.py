"""The encoder: pre-activations, and what is kept of them, in the fastest right way of this machine.

Three ways give the float32 SAE's own kept latents:

    torch     torch.addmm: the reference, whose bits the tests fix
    openblas  numpy's matrix product, on a CPU: 0.66 of MKL's time at d 2,560 on Zen 3
    bf16      a bf16 product finds candidates, float32 decides among them: train/exact.py

`way` chooses by a trial, once for each shape. Float32 rounds in another order in each way, so a run
that is to repeat its bits has to pin what was chosen before.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from residual_saes.data import tuning
from residual_saes.data.errors import SettingError
from residual_saes.data.tuning import Choice
from residual_saes.train import blocks
from residual_saes.train.blocks import Matmul
from residual_saes.train.kernels import Kept, starts_of, topk

WAYS = ("torch", "openblas", "bf16")

_SAMPLE = 64  # rows by which encode_batch guesses its bound
# Weights of an encoder; one with fewer is not worth a trial. At d 384, F 4,096 the two libraries are
# equal on Zen 3, and the clock would choose the bits.
_SMALL = 1 << 22
_TRIAL_WEIGHTS = 1 << 22  # of the dictionary in a trial, at most: all ways are linear in d_sae
_TRIAL_ROWS = 64

_pinned: dict[tuple[int, int, str], str] = {}
_chosen: dict[tuple[int, int, str], Choice] = {}


def way(d: int, d_sae: int, device: torch.device | str) -> str:
    """The way of this process for a shape: pinned, or found by a trial when first asked for."""
    key = (d, d_sae, torch.device(device).type)
    if key in _pinned:
        return _pinned[key]
    if d * d_sae < _SMALL:
        return WAYS[0]
    if key not in _chosen:
        _chosen[key] = _tried(*key)
    return _chosen[key].chosen


def pin(d: int, d_sae: int, device: torch.device | str, name: str) -> None:
    """Fix the way of a shape, as a run has recorded it.

    Raises:
        SettingError: there is no such way here.
    """
    kind = torch.device(device).type
    if name not in ways(kind):
        raise SettingError(
            f"the encoder product's way {name!r} is not to be had on this {kind}, which has "
            f"{', '.join(ways(kind))}; go on where it began, or start a new run="
        )
    _pinned[d, d_sae, kind] = name


def known() -> dict[tuple[int, int, str], Choice]:
    """The trials of this process, by (d, d_sae, kind of device)."""
    return dict(_chosen)


def ways(kind: str) -> list[str]:
    """The ways that a kind of device can go."""
    if kind == "cpu" and blocks.openblas_threads() is not None:
        return ["torch", "openblas"]
    return ["torch"]


def _tried(d: int, d_sae: int, kind: str) -> Choice:
    """Try the ways on random rows and weights of a shape, its d_sae cut to _TRIAL_WEIGHTS."""
    names = ways(kind)
    what = f"encoder product {d} x {d_sae}"
    if len(names) == 1:
        return Choice(what, names[0], ())
    width = min(d_sae, max(_TRIAL_WEIGHTS // d, 256))
    k = max(1, width // 128)
    drawn = torch.Generator().manual_seed(0)
    encoder = torch.randn(min(width, 1024), d, generator=drawn)
    turned = [encoder.roll(turn, 1) for turn in range(-(-width // len(encoder)))]
    encoder = torch.cat(turned)[:width].div_(d**0.5)  # rolled: cheaper to draw, and as independent
    x = torch.randn(_TRIAL_ROWS, d, generator=drawn)
    b_enc = torch.randn(width, generator=drawn).mul_(0.1)
    few = 8
    exact = x[:few].double() @ encoder.T.double() + b_enc
    wanted = exact.topk(k).values.sort(1).values
    candidates: dict[str, Callable[[], Kept]] = {}
    given = (x.to(kind), encoder.to(kind), b_enc.to(kind), k)
    for name in names:
        candidates[name] = partial(encode, *given, by=name)

    def fault(kept: Kept) -> str | None:
        """Whether the kept latents and their values are those of float64, up to its rounding."""
        indices = kept.indices.view(-1, k)[:few].cpu()
        values = kept.values.view(-1, k)[:few].cpu().double()
        near = 1e-5 * float(exact.abs().amax())
        own = exact.gather(1, indices)
        worst = max(
            float((own.relu() - values).abs().max()),
            float((own.sort(1).values - wanted).abs().max()),
        )
        return None if worst <= near else f"off by {worst:.2g} from float64"

    seconds = 2e-8 * d * width  # 31 ms at d 384, F 4,096; 84 ms from d 2,560, F 1,638 on
    return tuning.choose(what, candidates, fault, seconds=seconds, device=kind)


def _pre_activations(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    matmul: Matmul,
    block_bytes: int | None,
    by: str | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of pre-activations, by the way that is asked for, or this process's."""
    if matmul != "fp32" or x.dtype is not torch.float32:
        by = "torch"
    by = by or way(encoder.shape[1], len(encoder), x.device)
    return blocks.pre_activations(x, encoder, b_enc, matmul, block_bytes, by == "openblas")


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
    values = x.new_empty(len(x), k)
    indices = x.new_empty(len(x), k, dtype=torch.int64)
    for rows, pre in _pre_activations(x, encoder, b_enc, matmul, block_bytes, by):
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
    parts = []
    for rows, pre in _pre_activations(x, encoder, b_enc, matmul, block_bytes, by):
        parts.append(_above(pre, threshold, rows.start))
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
    bound = None
    parts = []
    for rows, pre in _pre_activations(x, encoder, b_enc, matmul, block_bytes, by):
        if bound is None:
            sample = pre[:_SAMPLE].reshape(-1)
            rank = min(len(sample), 3 * k * min(len(pre), _SAMPLE) // 2)
            bound = sample.topk(rank, sorted=False).values.amin().nan_to_num(0.0).clamp_min(0)
        parts.append(_above(pre, bound, rows.start))
    kept = _joined(parts, len(x))
    if len(kept.values) < len(x) * k and bound is not None and bound > 0:
        kept = encode_above(x, encoder, b_enc, x.new_zeros(()), matmul, block_bytes, by)
    if len(kept.values) <= len(x) * k:
        return kept
    chosen = kept.values.topk(len(x) * k, sorted=False).indices.sort().values
    rows_of_pairs = kept.rows[chosen]
    starts = starts_of(rows_of_pairs, len(x))
    return Kept(kept.values[chosen], kept.indices[chosen], rows_of_pairs, starts)


def _above(pre: Tensor, threshold: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns and rows of the elements above `threshold`, and NaN.

    Args:
        first: number of the block's first row.
    """
    mask = (pre <= threshold).logical_not_()
    # Device sync: nonzero must know how many there are. On the CPU numpy's is several times as
    # fast.
    if pre.is_cuda:
        flat = mask.view(-1).nonzero().view(-1)
    else:
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    rows = flat.div(pre.shape[1], rounding_mode="floor")
    return pre.view(-1)[flat], flat - rows * pre.shape[1], rows + first


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], n: int) -> Kept:
    values, indices, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    return Kept(values, indices, rows, starts_of(rows, n))
