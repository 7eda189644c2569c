"""The ways of the sparse kernels on CUDA, and which one a dictionary's kernels go.

    kernel            ways besides Triton's
    topk              torch: torch.topk; sort: a stable sort
    decode            torch: embedding_bag; dense: a product with the (n, F) activations
    values_gradient   torch: embedding_bag's backward of weights; dense: all products, of which
                      the pairs' are taken
    weight_gradient   torch: embedding_bag, a bag per latent; dense: a product with the (F, m)
                      activations
    latent_sums       torch: embedding_bag of width 1

No way has atomics or sums in an order that the machine decides, so each gives the same bits each
time; the ways' bits differ from each other. `triton N` is Triton's with other blocks. Triton's own
is taken where none was pinned (train/ways.py measures), of tables that are not float32, and in the
place of a dense product that would need more than _DENSE_BYTES.

Shapes: n rows or smaller bags, d = d_model, F = d_sae, k = kept latents per row, p pairs (row,
latent), distinct, as `kernels.Kept` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

Way = Callable[..., Any]

FIRST = "triton"
_DENSE_BYTES = 1 << 30  # of activations

_pinned: dict[tuple[str, int], str] = {}


def pin(kernel: str, d_sae: int, way: str) -> str:
    """Let a kernel go a way for dictionaries of `d_sae` latents, until `unpin`; the one it goes:
    the first that was pinned.
    """
    assert way in WAYS[kernel], (kernel, way)
    return _pinned.setdefault((kernel, d_sae), way)


def unpin() -> None:
    """Let all kernels go the first way again."""
    _pinned.clear()


def _way(kernel: str, d_sae: int, table: Tensor, bags: int = 0) -> Way:
    """The way to go.

    Args:
        table: what is read; the other ways are of float32.
        bags: by d_sae the shape of what a dense product holds.
    """
    name = _pinned.get((kernel, d_sae), FIRST)
    too_large = name == "dense" and 4 * bags * d_sae > _DENSE_BYTES
    if too_large or table.dtype is not torch.float32:
        name = FIRST
    return WAYS[kernel][name]


# -- the kernels, as train/kernels.py has them -----------------------------------------------------


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns (n, k) of the k largest of each row of (n, F); NaN counts as largest."""
    values, columns = _way("topk", pre.shape[1], pre)(pre, k)
    return values, columns


def decode(values: Tensor, indices: Tensor, rows: Tensor, starts: Tensor, W_dec: Tensor) -> Tensor:
    """(n, d) sums of the kept latents' directions."""
    way = _way("decode", len(W_dec), W_dec, len(starts))
    sums: Tensor = way(values, indices, rows, starts, W_dec)
    return sums


def values_gradient(
    upstream: Tensor, indices: Tensor, rows: Tensor, starts: Tensor, W_dec: Tensor
) -> Tensor:
    """(p,) each pair's row of `upstream` (n, d) along its direction."""
    way = _way("values_gradient", len(W_dec), W_dec, len(starts))
    products: Tensor = way(upstream, indices, rows, starts, W_dec)
    return products


def weight_gradient(
    source: Tensor, weights: Tensor, rows: Tensor, order: Tensor, starts: Tensor
) -> Tensor:
    """(F, d) for each latent, the weighted sum of its pairs' rows of `source` (m, d).

    Args:
        weights, rows: (p,) row by row.
        order: (p,) the pairs' positions, grouped by latent; `starts` (F,) is of this order.
    """
    way = _way("weight_gradient", len(starts), source, len(source))
    sums: Tensor = way(source, weights, rows, order, starts)
    return sums


def latent_sums(weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """(F,) sum of each latent's `weights` (p,); order and starts as for `weight_gradient`."""
    sums: Tensor = _way("latent_sums", len(starts), weights)(weights, order, starts)
    return sums


# -- their ways ------------------------------------------------------------------------------------


def _triton(kernel: str, *given: Any, **blocks: int) -> Any:
    """Triton's way; only CUDA builds of torch bring it."""
    from residual_saes.train import triton_kernels

    return getattr(triton_kernels, kernel)(*given, **blocks)


def _topk_sort(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = pre.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]


def _decode_triton(
    values: Tensor, indices: Tensor, _rows: Tensor, starts: Tensor, W_dec: Tensor, **blocks: int
) -> Any:
    return _triton("decode", values, indices, starts, W_dec, **blocks)


def _decode_torch(
    values: Tensor, indices: Tensor, _rows: Tensor, starts: Tensor, W_dec: Tensor
) -> Tensor:
    return embedding_bag(indices, W_dec, starts, mode="sum", per_sample_weights=values)


def _decode_dense(
    values: Tensor, indices: Tensor, rows: Tensor, starts: Tensor, W_dec: Tensor
) -> Tensor:
    return _dense(values, rows, indices, len(starts), len(W_dec)) @ W_dec


def _values_triton(
    upstream: Tensor, indices: Tensor, _rows: Tensor, starts: Tensor, W_dec: Tensor, **blocks: int
) -> Any:
    return _triton("values_gradient", upstream, indices, starts, W_dec, **blocks)


def _values_torch(
    upstream: Tensor, indices: Tensor, rows: Tensor, starts: Tensor, W_dec: Tensor
) -> Any:
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        upstream, W_dec, indices, starts, rows, 0
    )


def _values_dense(
    upstream: Tensor, indices: Tensor, rows: Tensor, _starts: Tensor, W_dec: Tensor
) -> Tensor:
    return (upstream @ W_dec.T).view(-1)[rows * len(W_dec) + indices]


def _weight_triton(
    source: Tensor, weights: Tensor, rows: Tensor, order: Tensor, starts: Tensor, **blocks: int
) -> Any:
    given = (source, weights, order, rows[order], starts, len(starts))
    return _triton("weight_gradient", *given, **blocks)


def _weight_torch(
    source: Tensor, weights: Tensor, rows: Tensor, order: Tensor, starts: Tensor
) -> Tensor:
    own = weights[order]
    return embedding_bag(rows[order], source, starts, mode="sum", per_sample_weights=own)


def _weight_dense(
    source: Tensor, weights: Tensor, rows: Tensor, order: Tensor, starts: Tensor
) -> Tensor:
    position = torch.arange(len(rows), device=rows.device)
    latents = torch.searchsorted(starts, position, right=True) - 1  # of empty ones, the last
    return _dense(weights[order], latents, rows[order], len(starts), len(source)) @ source


def _sums_torch(weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return embedding_bag(order, weights.unsqueeze(1), starts, mode="sum").view(-1)


def _dense(values: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """(height, width), 0 where there is no pair; pairs are distinct, so no order decides."""
    whole = values.new_zeros(height * width)
    return whole.scatter_(0, rows * width + columns, values).view(height, width)


WAYS: Mapping[str, Mapping[str, Way]] = {
    "topk": {
        FIRST: partial(_triton, "topk"),
        "triton 4096": partial(_triton, "topk", piece=4096),
        "triton 2048": partial(_triton, "topk", piece=2048),
        "torch": partial(torch.topk, sorted=False),
        "sort": _topk_sort,
    },
    "decode": {
        FIRST: _decode_triton,
        "triton 4": partial(_decode_triton, at_once=4),
        "triton 16": partial(_decode_triton, at_once=16),
        "torch": _decode_torch,
        "dense": _decode_dense,
    },
    "values_gradient": {
        FIRST: _values_triton,
        "triton 4": partial(_values_triton, at_once=4),
        "triton 16": partial(_values_triton, at_once=16),
        "torch": _values_torch,
        "dense": _values_dense,
    },
    "weight_gradient": {
        FIRST: _weight_triton,
        "triton 4": partial(_weight_triton, at_once=4),
        "triton 16": partial(_weight_triton, at_once=16),
        "torch": _weight_torch,
        "dense": _weight_dense,
    },
    "latent_sums": {
        FIRST: partial(_triton, "latent_sums"),
        "torch": _sums_torch,
    },
}
