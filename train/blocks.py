"""Pre-activations x @ W_enc + b_enc, by blocks of rows.

Shapes: n rows, d = d_model, F = d_sae.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Matmul = Literal["fp32", "tf32", "bf16"]  # what the operands of the encoder product are rounded to

# Of pre-activations at a time: top k then reads them from the last-level cache.
BLOCK_BYTES = 16 << 20
GPU_BLOCK_BYTES = 1 << 30  # on CUDA, where only launches count


def rows_at_a_time(x: Tensor, width: int, itemsize: int, block_bytes: int | None) -> int:
    """Rows of a block whose pre-activations have `itemsize` bytes each.

    Args:
        block_bytes: of pre-activations at a time; None: BLOCK_BYTES, on CUDA GPU_BLOCK_BYTES.
    """
    if block_bytes is None:
        block_bytes = GPU_BLOCK_BYTES if x.is_cuda else BLOCK_BYTES
    return max(1, min(len(x), block_bytes // (width * itemsize)))


def pre_activations(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    matmul: Matmul = "fp32",
    block_bytes: int | None = None,
    by: str = "torch",
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of x @ W_enc + b_enc; the next block overwrites the one before.

    Args:
        by: torch, or openblas: numpy's library, of fp32 on a CPU.
    """
    n, width = len(x), len(b_enc)
    step = rows_at_a_time(x, width, x.element_size(), block_bytes)
    buffer = x.new_empty(step, width)
    if matmul == "bf16":
        x = x.bfloat16()
        encoder = encoder.bfloat16()
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        out = buffer[: rows.stop - start]
        if matmul == "bf16":
            bf16_product_(out, x[rows], encoder).add_(b_enc)
        elif by == "openblas":
            openblas_product_(out, x[rows], encoder).add_(b_enc)
        else:
            with tf32(matmul == "tf32"):
                torch.addmm(b_enc, x[rows], encoder.T, out=out)
        yield rows, out


def bf16_product_(out: Tensor, x: Tensor, encoder: Tensor) -> Tensor:
    """x @ W_enc of bfloat16 operands into the float32 `out`; returns `out`.

    Sums are float32. On the CPU the result is rounded to bfloat16.
    """
    if x.is_cuda:
        return torch.mm(x, encoder.T, out_dtype=torch.float32, out=out)
    return out.copy_(x @ encoder.T)


def wide_bf16_product_(out: Tensor, x: Tensor, encoder: Tensor) -> Tensor:
    """As bf16_product_, and not rounded on a CPU either."""
    if x.is_cuda:
        return bf16_product_(out, x, encoder)
    return torch.mm(x.float(), encoder.float().T, out=out)


def openblas_product_(out: Tensor, x: Tensor, encoder: Tensor) -> Tensor:
    """x @ W_enc by numpy's OpenBLAS, by as many threads as torch has, into `out`; returns `out`."""
    library = openblas_threads()
    assert library is not None
    with library.limit(limits=torch.get_num_threads()):
        np.matmul(x.detach().numpy(), encoder.detach().numpy().T, out=out.numpy())
    return out


@cache
def openblas_threads() -> Any | None:
    """What sets the threads of numpy's OpenBLAS; None: numpy multiplies by another library."""
    from threadpoolctl import ThreadpoolController  # 13 ms to find libraries: only where needed

    found = ThreadpoolController().select(internal_api="openblas")
    every = [one.filepath for one in found.lib_controllers]
    own = [path for path in every if "numpy.libs" in path] or every  # scipy's wheel has its own
    return found.select(filepath=own[0]) if len(own) == 1 else None


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let CUDA round operands of float32 products to TF32's 10 bits, or forbid it.

    The setting before comes back.
    """
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32" if on else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def above(pre: Tensor, threshold: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns and rows of the elements above `threshold`, and NaN.

    Args:
        first: number of the block's first row.
    """
    # Device sync: nonzero must know how many there are. On the CPU numpy compares twice as fast,
    # and finds several times as fast.
    if pre.is_cuda:
        flat = (pre <= threshold).logical_not_().view(-1).nonzero().view(-1)
    else:
        below = pre.numpy() <= threshold.numpy()
        flat = torch.from_numpy(np.flatnonzero(np.logical_not(below, out=below)))
    rows = flat.div(pre.shape[1], rounding_mode="floor")
    return pre.view(-1)[flat], flat - rows * pre.shape[1], rows + first
