"""The sparse autoencoder's arithmetic: exact, deterministic, without autograd, the same functions on CPU and CUDA.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.

Each function is the fastest exact way found for its phase (one core, d 384, F 4,096, k 32, n 2,048, in ms):

    phase                       here                                              ms     otherwise
    encoder product             addmm into one reused buffer, block by block   72     88 (new output, linear)
    top k                       two stages, partition on the CPU                  10     31 (torch.topk)
    decoding                    embedding_bag with weights                        2.1    44 (dense product)
    gradient of kept values     embedding_bag's own weights backward              4.7    57 (dense product)
    gradient of one weight      embedding_bag over rows, a bag per latent         2.0    45 (dense), 69 (index_add)
    sort of the n k pairs       once for both weights                             0.6

embedding_bag sums each bag in one thread and in index order, so no result depends on which thread ran when, as
atomics and index_add would have it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

_BLOCK_BYTES = 16 << 20  # of pre-activations at a time: what top k reads is then still in the last-level cache
_GPU_BLOCK_BYTES = 1 << 30  # on CUDA, where only launches count
_GROUP = 8  # columns per group in the first stage: 4 costs 12 ms, 16 costs 11, 32 costs 13


class Kept(NamedTuple):
    """The k largest pre-activations of each row, after ReLU."""

    values: Tensor  # (n, k) float32, >= 0
    indices: Tensor  # (n, k) int64, distinct in a row, in no particular order


class Bags(NamedTuple):
    """All n k (row, latent) pairs, grouped by latent."""

    order: Tensor  # (n k,) the pairs' flat positions, grouped by latent
    rows: Tensor  # (n k,) row of each pair in that order
    starts: Tensor  # (F,) where each latent's pairs begin


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Kept:
    """Keep the k largest of x @ W_enc + b_enc in each row, then ReLU; x is (n, d) and has b_dec subtracted."""
    n, width = len(x), len(b_enc)
    block_bytes = _GPU_BLOCK_BYTES if x.is_cuda else _BLOCK_BYTES
    step = max(1, min(n, block_bytes // (width * x.element_size())))
    buffer = x.new_empty(step, width)
    values, indices = x.new_empty(n, k), x.new_empty(n, k, dtype=torch.int64)
    for at in range(0, n, step):
        rows = slice(at, min(at + step, n))
        pre = torch.addmm(b_enc, x[rows], W_enc, out=buffer[: rows.stop - at])
        values[rows], indices[rows] = topk(pre, k)
    return Kept(values.relu_(), indices)


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (n, F), exactly, in no particular order: values and indices.

    They lie in the k groups of columns with the largest maxima. Group g holds columns g, g + F/8, g + 2F/8, ...:
    so strided, maxima are four times as fast as over neighbours. Of values equal to the k-th largest, which ones are
    kept is fixed for given bits, but unspecified. NaN counts as largest, so that it cannot hide.
    """
    n, width = x.shape
    if width % _GROUP or 2 * k * _GROUP > width:
        indices = _largest(x, k)
        return x.gather(1, indices), indices
    groups = width // _GROUP
    chosen = _largest(x.view(n, _GROUP, groups).amax(1), k)
    members = torch.arange(0, width, groups, device=x.device)
    columns = (chosen.unsqueeze(1) + members.view(1, -1, 1)).view(n, k * _GROUP)
    candidates = x.gather(1, columns)
    best = _largest(candidates, k)
    return candidates.gather(1, best), columns.gather(1, best)


def _largest(x: Tensor, k: int) -> Tensor:
    """(n, k) columns of the k largest of each row."""
    if x.device.type != "cpu" or x.dtype is not torch.float32:
        return x.topk(k, dim=1, sorted=False).indices
    flat = np.flatnonzero(_threshold_mask(x.numpy(), k))
    return torch.from_numpy(flat).view(len(x), k) % x.shape[1]


def _threshold_mask(x: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """(n, F) true at the k largest of each row, by a partition (five times as fast as torch.topk's selection)."""
    width = x.shape[1]
    threshold = np.partition(x, width - k, axis=1)[:, width - k, None]
    mask = x >= threshold
    odd = np.flatnonzero(mask.sum(1, dtype=np.int32) != k)  # a tie at the threshold, or NaN
    if len(odd):
        ordered = torch.from_numpy(x[odd]).sort(dim=1, descending=True, stable=True).indices[:, :k]
        mask[odd] = False
        mask[odd[:, None], ordered.numpy()] = True
    return mask


def decode(kept: Kept, W_dec: Tensor) -> Tensor:
    """(n, d) sums of the kept latents' directions; b_dec is the caller's."""
    return embedding_bag(kept.indices, W_dec, mode="sum", per_sample_weights=kept.values)


def values_gradient(upstream: Tensor, kept: Kept, W_dec: Tensor) -> Tensor:
    """(n, k) gradient of the kept pre-activations: upstream (n, d) along each direction, where ReLU is open."""
    n, k = kept.indices.shape
    device = upstream.device
    starts = torch.arange(0, n * k, k, device=device)
    bag_of = torch.arange(n, device=device).repeat_interleave(k, output_size=n * k)
    flat: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        upstream, W_dec, kept.indices.view(-1), starts, bag_of, 0
    )
    return flat.view(n, k).mul_(kept.values > 0)


def group_by_latent(indices: Tensor, d_sae: int) -> Bags:
    """Sort the pairs of (n, k) `indices` by latent; the sort is stable, so that sums have one order."""
    flat = indices.reshape(-1)
    latents, order = flat.to(torch.int32).sort(stable=True)
    every = torch.arange(d_sae, dtype=torch.int32, device=flat.device)
    return Bags(order, order // indices.shape[1], torch.searchsorted(latents, every))


def weight_gradient(rows: Tensor, weights: Tensor, bags: Bags) -> Tensor:
    """(F, d) for each latent, the sum of `rows` (n, d) at its pairs, weighted by `weights` (n, k)."""
    ordered = weights.reshape(-1)[bags.order]
    return embedding_bag(bags.rows, rows, bags.starts, mode="sum", per_sample_weights=ordered)


def latent_sums(weights: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """(F,) sum of `weights` (n, k) over each latent's pairs."""
    return weights.new_zeros(d_sae).scatter_add_(0, indices.reshape(-1), weights.reshape(-1))
