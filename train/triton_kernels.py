# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton reads the annotations of kernels as code, and knows only its own.)
"""The sparse autoencoder's kernels for CUDA, in Triton: no atomics anywhere, so the same input
gives the same bits.

Imported only where tensors are on CUDA (torch's CUDA wheels bring Triton), or by tests under
Triton's interpreter.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row, p pairs (row, latent). A bag is a
run of consecutive pairs; bag i begins at starts[i] and ends where the next begins, the last at p.
While decoding, bags are rows; for the gradients of weights, the pairs are sorted and bags are
latents. Bags may be empty.

    kernel             bytes that must move, at n 8,192, d 2560, F 32,768, k 128, float32
    topk               n F 4            1.1 GB   pre-activations are read once
    bag_sums           p d 4           10.7 GB   gathered, from the L2 cache: see slice_columns
    values_gradient    p d 4           10.7 GB   the same
    latent_sums        p 12            12.6 MB

All choices of blocks and warps are reasoned and NOT measured: no GPU was at hand, only the code
that Triton 3.9 makes for sm_80 and sm_90 (16-byte loads, no spilled registers). A run therefore
measures others beside them on its own card (train/ways.py); tests/bench/kernel_speed.py measures
each beside its limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# columns that one program of topk holds: 32 keys per thread of 8 warps, so several fit on a
# processor
_PIECE = 8192
# columns per group in topk's first bound: one thread's own, so their maximum needs no other thread
_GROUP = 8
# pairs; a longer bag is summed in parts, else one program would sum a latent that always fires
_CHUNK = 512
# pairs that a program of bag_sums reads at once: 8 independent 16-byte loads per thread in flight
_PAIRS = 8
_SLICE_BYTES = (
    20 << 20
)  # of a table that is gathered from at a time; an H100's L2 is two halves of 25 MB
_ROW_BYTES = 512  # of a row that a warp reads at once, 16 per thread
_LOWEST = tl.constexpr(-(2**31))  # key of no column
_NAN = tl.constexpr(
    2**31 - 2
)  # key of NaN; one less than the largest, so that something lies above it


def _jit(function: Callable[..., Any]) -> Any:
    """triton.jit, for mypy, which knows nothing of it."""
    return triton.jit(function)


def _launch(
    kernel: Any, grid: tuple[int, ...], *given: Tensor | int | float, warps: int, **fixed: int
) -> None:
    """Run one program per cell of `grid` on the first tensor's device; products and sums may be
    fused there. Every tensor lies in one piece: kernels know no strides.
    """
    assert isinstance(given[0], Tensor)
    assert all(x.is_contiguous() for x in given if isinstance(x, Tensor)), kernel
    if 0 not in grid:
        with torch.cuda.device_of(given[0]):
            kernel[grid](*given, num_warps=warps, enable_fp_fusion=True, **fixed)


# -- top k -----------------------------------------------------------------------------------------


def topk(pre: Tensor, k: int, piece: int = _PIECE) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (n, F) float32, exactly: values (n, k) and int64 columns (n, k),
    columns ascending.

    Of values equal to the k-th largest, those in the lowest columns are kept; -0 equals 0. NaN
    counts as largest.

    Rows of more than `piece` columns are taken in pieces: the k largest of a row are among the k
    largest of its pieces.
    """
    assert pre.dtype is torch.float32 and 1 <= k <= pre.shape[1], (pre.dtype, pre.shape, k)
    pre = pre.contiguous()
    n, width = pre.shape
    pieces = -(-width // piece)
    span = (
        -(-width // (pieces * 64)) * 64
    )  # columns per piece, at borders that 16-byte loads can begin at
    if pieces > 1 and 2 * k > width - (pieces - 1) * span:  # pieces would hardly leave anything out
        columns = pre.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        return pre.gather(1, columns), columns
    values = pre.new_empty(n, pieces * k)
    columns = pre.new_empty(n, pieces * k, dtype=torch.int64)
    block = max(128, triton.next_power_of_2(min(span, width)))
    warps = max(1, block // 1024)
    given = (pre, values, columns, width, span, pieces, k)
    sizes = {"BLOCK": block, "GROUPS": max(1, block // _GROUP), "STEP": 128 * warps}
    # 80 registers, without which it takes 93, let a processor hold three programs: one loads while
    # others count.
    _launch(_topk_kernel, (n, pieces), *given, warps=warps, maxnreg=80, **sizes)
    if pieces == 1:
        return values, columns
    values, positions = topk(values, k, piece)
    return values, columns.gather(1, positions)


@_jit
def _keys(source, at, here):
    """int32 keys of the values at `at`, in the order of the floats; below all of them where there
    is no column.
    """
    x = tl.load(source + at, mask=at < here, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(
        bits < 0, bits ^ 0x7FFFFFFF, bits
    )  # of negative values all bits but the sign are turned over
    keys = tl.where(keys == -1, 0, keys)  # -0
    keys = tl.where(x != x, _NAN, keys)
    return tl.where(at < here, keys, _LOWEST)


@_jit
def _narrow(keys, k, low, high):
    """Narrow [low, high), which holds the k-th largest key, by halves: until k keys are >= low, or
    low is that key.

    Expects fewer than k keys >= high. If fewer than k are >= low too, nothing changes. Returns low,
    and how many keys are >= low. At most 32 halvings; on rows without ties at the k-th key some 10
    suffice.
    """
    count = tl.sum((keys >= low).to(tl.int32), axis=0)
    while (count > k) & (high > low + 1):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        found = tl.sum((keys >= middle).to(tl.int32), axis=0)
        enough = found >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count = tl.where(enough, found, count)
    return low, count


@_jit
def _topk_kernel(
    pre,
    values,
    columns,
    width,
    span,
    pieces,
    k,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One piece of one row, into (n, pieces, k) values and columns.

    The keys stay in registers, so a halving costs two instructions per key and no memory. A radix
    select by tl.histogram would need 8 votes per key and digit. Halving is cheaper because it
    starts at a bound that leaves k and a few: the k-th largest of the groups' maxima, which costs
    an eighth as much to find.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = piece * span
    here = tl.minimum(span, width - begin)
    source = pre + row * width + begin
    at = tl.arange(0, BLOCK)
    keys = _keys(source, at, here)
    high = tl.max(keys, axis=0) + 1
    maxima = tl.max(tl.reshape(keys, (BLOCK // GROUPS, GROUPS)), axis=0)
    low, _ = _narrow(maxima, k, tl.min(tl.where(at < here, keys, high), axis=0), high)
    low, count = _narrow(keys, k, low, high)
    # If more than k are >= low, then low is the k-th key itself, tied: take those ties that are
    # left of `right`.
    left, right = tl.full((), 0, tl.int32), here
    while (count > k) & (right > left + 1):
        middle = (left + right) // 2
        taken = (keys > low) | ((keys == low) & (at < middle))
        enough = tl.sum(taken.to(tl.int32), axis=0) >= k
        left = tl.where(enough, left, middle)
        right = tl.where(enough, middle, right)
    # Read again, piece by piece, from the nearest cache: with all slots at once a thread would need
    # 213 registers.
    filled = (row * pieces + piece) * k
    for start in range(0, here, STEP):
        near = start + tl.arange(0, STEP)
        again = _keys(source, near, here)
        chosen = (again > low) | ((again == low) & (near < right))
        slots = filled + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(values + slots, tl.load(source + near, mask=chosen), mask=chosen)
        tl.store(columns + slots, (begin + near).to(tl.int64), mask=chosen)
        filled += tl.sum(chosen.to(tl.int32), axis=0)


# -- sums over bags --------------------------------------------------------------------------------


def decode(
    values: Tensor, indices: Tensor, starts: Tensor, W_dec: Tensor, at_once: int = _PAIRS
) -> Tensor:
    """(n, d) float32 sums of each row's kept directions.

    Args:
        values: (p,) float32, row by row.
        indices: (p,) int64 latents.
        starts: (n,) int64 first pair of each row.
        W_dec: (F, d) float32 or bfloat16; summed in float32.
        at_once: pairs that a program reads at once, a power of 2.
    """
    return _bag_sums(values, indices, starts, W_dec, 0, at_once)


def weight_gradient(
    rows: Tensor,
    weights: Tensor,
    order: Tensor,
    source: Tensor,
    starts_by_latent: Tensor,
    d_sae: int,
    chunk: int = _CHUNK,
    at_once: int = _PAIRS,
) -> Tensor:
    """(F, d) float32: for each latent, the sum of the rows of its pairs, weighted.

    Args:
        rows: (n, d) float32 or bfloat16; weights: (p,) float32, row by row; d_sae: F.
        order: (p,) int64 positions in `weights`, sorted by latent; sums run in this order.
        source: (p,) int64 row of each pair in that order.
        starts_by_latent: (F,) int64 first pair of each latent in that order.
        chunk: pairs; a longer bag is summed in parts.
        at_once: as for decode.
    """
    assert len(starts_by_latent) == d_sae, (len(starts_by_latent), d_sae)
    return _bag_sums(weights[order], source, starts_by_latent, rows, chunk, at_once)


def latent_sums(weights: Tensor, order: Tensor, starts_by_latent: Tensor) -> Tensor:
    """(F,) float32 sum of each latent's `weights` (p,), in the order of `order`: see
    weight_gradient.
    """
    sums, bags = weights.new_empty(len(starts_by_latent)), len(starts_by_latent)
    _launch(
        _sums_kernel,
        (bags,),
        weights,
        order,
        starts_by_latent,
        sums,
        bags,
        len(order),
        warps=1,
        BLOCK=128,
    )
    return sums


def slice_columns(table: Tensor) -> int:
    """Columns that all programs gather at a time, so that this slice of `table` is read from memory
    once.

    Programs start in the order of their number, bags first: while a slice is worked on, its rows
    stay in the L2 cache. A program's threads read 16 bytes each, so at least 512 bytes of a row lie
    together.
    """
    size = table.element_size()
    columns = _ROW_BYTES // size
    while 2 * columns * size * len(table) <= _SLICE_BYTES and columns < min(512, table.shape[1]):
        columns *= 2
    return columns


def _bag_sums(
    weights: Tensor, which: Tensor, starts: Tensor, table: Tensor, chunk: int, at_once: int
) -> Tensor:
    """(bags, d): for each bag, the sum of table[which[i]] * weights[i] over its pairs i.

    Bags of more than `chunk` pairs (0: none) are summed in parts: the pairs are cut at every
    `chunk`-th position, whatever bag they are of, one program sums what a long bag has in one part,
    and these sums are added in order. A part has pairs of two long bags at most, that of its first
    pair and that of its last.
    """
    assert table.is_contiguous()
    bags, pairs, d = len(starts), len(which), table.shape[1]
    columns = slice_columns(table)
    blocks, warps = -(-d // columns), columns * table.element_size() // _ROW_BYTES
    sums = table.new_empty(bags, d, dtype=torch.float32)
    parts, sizes = sums, {"CHUNK": chunk, "P": at_once, "D": columns}
    if 0 < chunk < pairs:
        begins = torch.arange(0, pairs, chunk, device=starts.device)
        edges = torch.stack((begins, (begins + (chunk - 1)).clamp_(max=pairs - 1)), dim=1).view(-1)
        owners = (
            torch.searchsorted(starts, edges, right=True) - 1
        )  # the last bag that begins there or before
        parts = sums.new_empty(len(edges), d)
        given = (weights, which, starts, table, owners, parts, bags, pairs, d)
        _launch(_part_kernel, (len(edges), blocks), *given, warps=warps, **sizes)
    given = (weights, which, starts, table, parts, sums, bags, pairs, d)
    _launch(_bag_kernel, (bags, blocks), *given, warps=warps, **sizes)
    return sums


@_jit
def _bounds(starts, bag, bags, pairs):
    """First pair of a bag, and the first behind it."""
    return tl.load(starts + bag), tl.load(starts + bag + 1, mask=bag + 1 < bags, other=pairs)


@_jit
def _weighted_sum(weights, which, table, first, behind, columns, d, P: tl.constexpr):
    """(columns,) sum over the pairs from `first` to before `behind`."""
    total = tl.zeros(columns.shape, tl.float32)
    for at in range(first, behind, P):
        pair = at + tl.arange(0, P)
        live = pair < behind
        weight = tl.load(weights + pair, mask=live, other=0.0)
        index = tl.load(which + pair, mask=live, other=0)
        cells = table + index[:, None] * d + columns[None, :]
        tile = tl.load(cells, mask=live[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tile * weight[:, None], axis=0)
    return total


@_jit
def _part_kernel(
    weights,
    which,
    starts,
    table,
    owners,
    parts,
    bags,
    pairs,
    d,
    CHUNK: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    """Sum one long bag's pairs inside one part, into (parts, 2, d).

    `owners` (parts, 2): the bags of the part's first and last pair.
    """
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * D + tl.arange(0, D)
    begin = slot // 2 * CHUNK
    first, behind = _bounds(starts, tl.load(owners + slot), bags, pairs)
    same = (slot % 2 == 1) & (first <= begin)  # the last pair's bag is the first pair's
    if (behind - first > CHUNK) & (not same):
        first, behind = tl.maximum(begin, first), tl.minimum(begin + CHUNK, behind)
        total = _weighted_sum(weights, which, table, first, behind, columns, d, P)
        tl.store(parts + slot * d + columns, total, mask=columns < d)


@_jit
def _bag_kernel(
    weights,
    which,
    starts,
    table,
    parts,
    sums,
    bags,
    pairs,
    d,
    CHUNK: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    """One bag's sum, from its pairs or, if it has more than CHUNK, from its parts."""
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * D + tl.arange(0, D)
    first, behind = _bounds(starts, bag, bags, pairs)
    if CHUNK > 0 and behind - first > CHUNK:
        total = tl.zeros(columns.shape, tl.float32)
        for part in range(first // CHUNK, (behind - 1) // CHUNK + 1):
            slot = 2 * part + (first > part * CHUNK).to(tl.int64)
            total += tl.load(parts + slot * d + columns, mask=columns < d, other=0.0)
    else:
        total = _weighted_sum(weights, which, table, first, behind, columns, d, P)
    tl.store(sums + bag * d + columns, total, mask=columns < d)


@_jit
def _sums_kernel(weights, order, starts, sums, bags, pairs, BLOCK: tl.constexpr) -> None:
    """One bag's sum of numbers."""
    bag = tl.program_id(0)
    first, behind = _bounds(starts, bag, bags, pairs)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(first, behind, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        where = tl.load(order + pair, mask=pair < behind, other=0)
        total += tl.load(weights + where, mask=pair < behind, other=0.0)
    tl.store(sums + bag, tl.sum(total, axis=0))


def values_gradient(
    upstream: Tensor, indices: Tensor, starts: Tensor, W_dec: Tensor, at_once: int = _PAIRS
) -> Tensor:
    """(p,) float32: each pair's row of `upstream` (n, d) float32 along its direction; ReLU is the
    caller's.

    Args: as for decode. Each slice of columns gives a share of all p products; they are added in
        order.
    """
    assert upstream.is_contiguous() and W_dec.is_contiguous()
    n, pairs, d = len(starts), len(indices), W_dec.shape[1]
    columns = (
        _ROW_BYTES // W_dec.element_size()
    )  # one warp's, so that a product is summed by shuffles alone
    blocks = -(-d // columns)
    shares = upstream.new_empty(blocks, pairs)
    given = (upstream, indices, starts, W_dec, shares, n, pairs, d)
    _launch(_dots_kernel, (n, blocks), *given, warps=1, P=at_once, D=columns)
    return shares.sum(0)


@_jit
def _dots_kernel(
    upstream, indices, starts, table, shares, n, pairs, d, P: tl.constexpr, D: tl.constexpr
):
    """One row's products over one slice of columns, into (slices, p)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = block * D + tl.arange(0, D)
    first, behind = _bounds(starts, row, n, pairs)
    slope = tl.load(upstream + row * d + columns, mask=columns < d, other=0.0)
    for at in range(first, behind, P):
        pair = at + tl.arange(0, P)
        live = pair < behind
        index = tl.load(indices + pair, mask=live, other=0)
        cells = table + index[:, None] * d + columns[None, :]
        tile = tl.load(cells, mask=live[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)
        tl.store(shares + block * pairs + pair, tl.sum(tile * slope[None, :], axis=1), mask=live)
