"""The sparse autoencoder's arithmetic: exact, deterministic, the same functions on CPU and CUDA.

train/product.py has the encoder, and train/functions.py makes autograd functions of these. On CUDA
the sparse ones are those of train/gpu.py; all speeds here are the CPU's.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.

Each function is the fastest exact way found for its phase (one core, d 384, F 4,096, k 32, n 2,048,
in ms):

    phase                    here                                       ms   otherwise
    top k                    two stages, partition on the CPU           10   31 (torch.topk)
    decoding                 embedding_bag with weights                2.1   44 (dense product)
    gradient of kept values  embedding_bag's weights backward          4.7   57 (dense product)
    gradient of one weight   embedding_bag, a bag per latent           2.0   45 (dense)
                                                                             69 (index_add)
    sort of the n k pairs    once for both weights                     0.6

embedding_bag sums each bag in one thread and in index order, so no result depends on which thread
ran when, as atomics and index_add would have it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from residual_saes.train import gpu

_CACHED_BYTES = 16 << 20  # of a table that is gathered whole: about half a last-level cache
_SLICE_BYTES = 2 << 20  # of a larger one at a time
_LEAST_COLUMNS = 64
_OFTEN = 8  # pairs for each row of table and result; with 4 it took longer than without
_LANES = 16  # float32 of a cache line
_GROUP = 8  # columns per group in the first stage: 4 costs 12 ms, 16 costs 11, 32 costs 13


class Kept(NamedTuple):
    """The kept latents of n rows as p pairs (row, latent), row by row.

    TopK keeps k of each row, other activations any number. A row's pairs are a bag, over which
    sums run. `rows` and `starts` may name smaller bags than rows: Matryoshka's dictionaries.
    """

    values: Tensor  # (p,) float32 activations, >= 0
    indices: Tensor  # (p,) int64 latents, distinct in a row, in no particular order
    rows: Tensor  # (p,) int64, ascending
    starts: Tensor  # (n,) int64, where each row's pairs begin

    @classmethod
    def even(cls, values: Tensor, indices: Tensor) -> Kept:
        """The same number of pairs in each row: (n, k) values and indices."""
        n, k = indices.shape
        rows = torch.arange(n * k, device=indices.device) // k
        starts = torch.arange(
            0, n * k, k, device=indices.device
        )  # in one piece: kernels read it so
        # Of one column a reshape is a view in steps.
        flat = (values.reshape(-1).contiguous(), indices.reshape(-1).contiguous())
        return cls(*flat, rows, starts)

    def active(self) -> Tensor:
        """(n,) int64 latents above 0 in each row."""
        positive = (self.values > 0).to(torch.int64)
        return torch.zeros_like(self.starts).scatter_add_(0, self.rows, positive)


class Bags(NamedTuple):
    """All pairs, grouped by latent."""

    order: Tensor  # (p,) the pairs' positions, grouped by latent
    starts: Tensor  # (F,) where each latent's pairs begin


def starts_of(bags: Tensor, count: int) -> Tensor:
    """(count,) where the pairs of each of `count` bags begin, given each pair's bag, ascending."""
    return torch.searchsorted(bags, torch.arange(count, device=bags.device))


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (n, F), exactly, in no particular order: values and indices.

    The k largest lie in the k groups of columns with the largest maxima. Group g holds columns g, g
    + F/8, g + 2F/8, ...: strided maxima are four times as fast as maxima over neighbours. Of values
    equal to the k-th largest, which ones are kept is fixed for given bits, but unspecified. NaN
    counts as largest, so that it cannot hide.
    """
    if x.is_cuda:
        return gpu.topk(x, k)
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


def largest(values: Tensor, count: int) -> Tensor:
    """(count,) ascending positions of the largest of (p,) values; NaN counts as largest."""
    if values.is_cuda or values.dtype is not torch.float32:
        return values.topk(count, sorted=False).indices.sort().values
    return _largest(values.unsqueeze(0), count).view(-1)


def _largest(x: Tensor, k: int) -> Tensor:
    """(n, k) columns of the k largest of each row."""
    if x.dtype is not torch.float32:
        return x.topk(k, dim=1, sorted=False).indices
    flat = np.flatnonzero(_threshold_mask(x.numpy(), k))
    return torch.from_numpy(flat).view(len(x), k) % x.shape[1]


def _threshold_mask(x: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """(n, F) true at the k largest of each row.

    By a partition, five times as fast as torch.topk's selection.
    """
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
    """(bags, d) sums of the kept latents' directions; the caller adds b_dec."""
    if W_dec.is_cuda:
        return gpu.decode(*kept, W_dec)
    return _sums(kept.indices, W_dec, kept.starts, kept.values)


def _sums(indices: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """(bags, d) sums of each bag's rows of `table` times their weights, in the pairs' order.

    A table that fits no cache is gathered a few columns at a time. Each sum remains the same to the
    bit. That takes a copy of the table and of the result, so it pays where each of their rows is
    met several times.

    Args:
        indices: (p,) each pair's row of `table` (m, d).
        starts: (bags,) where each bag's pairs begin.
        weights: (p,).
    """
    rows, width = table.shape
    step = max(_LEAST_COLUMNS, _SLICE_BYTES // max(1, rows * table.element_size()))
    few = len(indices) < _OFTEN * max(rows, len(starts))
    if few or table.numel() * table.element_size() <= _CACHED_BYTES or width <= step:
        return embedding_bag(indices, table, starts, mode="sum", per_sample_weights=weights)
    result = table.new_empty(len(starts), width)
    for first in range(0, width, step):
        part = table[:, first : first + step].contiguous()
        result[:, first : first + step] = embedding_bag(
            indices, part, starts, mode="sum", per_sample_weights=weights
        )
    return result


def values_gradient(
    upstream: Tensor, kept: Kept, W_dec: Tensor, bags: Bags | None = None
) -> Tensor:
    """(p,) the gradients of the kept values.

    Each is the product of the pair's direction with its bag's row of `upstream` (bags, d).

    Args:
        bags: the pairs by latent, if that has been done. A CPU then takes them in that order: a
            direction stays in the cache for all its pairs, and `upstream` is smaller than W_dec.
            The bits are the same where all rows are aligned alike.
    """
    if W_dec.is_cuda:
        return gpu.values_gradient(upstream, *kept[1:], W_dec)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward
    if bags is None or W_dec.shape[1] % _LANES:
        flat: Tensor = products(upstream, W_dec, kept.indices, kept.starts, kept.rows, 0)
        return flat
    order = bags.order
    rows, latents = kept.rows.index_select(0, order), kept.indices.index_select(0, order)
    ordered = products(W_dec, upstream, rows, bags.starts, latents, 0)
    return torch.empty_like(ordered).scatter_(0, order, ordered)


def group_by_latent(indices: Tensor, d_sae: int) -> Bags:
    """Sort pairs by their latents `indices` (p,), stably: sums then have one order."""
    latents, order = indices.to(torch.int32).sort(stable=True)
    every = torch.arange(d_sae, dtype=torch.int32, device=indices.device)
    return Bags(order, torch.searchsorted(latents, every))


def weight_gradient(source: Tensor, weights: Tensor, rows: Tensor, bags: Bags) -> Tensor:
    """(F, d) for each latent, the sum over its pairs of weight * source[row].

    Args:
        source: (m, d).
        weights: (p,).
        rows: (p,) the pairs' rows of `source`.
        bags: the pairs by latent.
    """
    if source.is_cuda:
        return gpu.weight_gradient(source, weights, rows, *bags)
    order = bags.order
    by_latent = rows.index_select(0, order)  # five times as fast as rows[order]
    return _sums(by_latent, source, bags.starts, weights.index_select(0, order))


def latent_sums(weights: Tensor, indices: Tensor, d_sae: int, bags: Bags | None = None) -> Tensor:
    """(F,) sum of `weights` (p,) over each latent's pairs, whose latents are `indices` (p,).

    Args:
        bags: the same pairs grouped by latent, if that has been done.
    """
    if weights.is_cuda:
        return gpu.latent_sums(weights, *(bags or group_by_latent(indices, d_sae)))
    return weights.new_zeros(d_sae).scatter_add_(0, indices, weights)
