"""What the float32 SAE keeps, found by a cheap product: bf16 operands, at twice float32's speed.

The cheap product finds candidates, gathered float32 dot products score them, and the scores decide.
A bound on their difference says which pairs can be left out. So the kept latents are those that
the scores of all F latents would give.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.

The bound. Let q = fl(x.w) + b be the score of a pair and p its cheap value, made of x~ = bf16(x),
w~ = bf16(w), b~ = bf16(b). With norms |.|, u = 2^-24 and g = 1.01 (d + 4) u:

    |p - q| <= R B + Q S + Z + rho |p|

    R = |x - x~| + 2 g (|x| + |x - x~|)         of the row
    Q = |x| + |x - x~|                          of the row, at least |x~|
    B = |w| + |w - w~|                          of the latent, at least |w~|
    S = |w - w~|                                of the latent
    Z = |b - b~| + 2 g (|b| + |b~|)             of the latent
    rho = 2^-8 where p is rounded to bf16, which has 8 bits; 2^-20 where it is float32

Proof. The operands: x.w - x~.w~ = (x - x~).w + x~.(w - w~), at most |x - x~| |w| + |x~| |w - w~| by
Cauchy and Schwarz. The sums: the products of x~ and w~ are exact in float32, and a float32 sum of m
products, in any order, is off by at most m u / (1 - m u) times the sum of their sizes (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), which is at most |x~| |w~| +
|b~|; those of q by as much with x, w and b. g bounds both for d < 160,000. The output: to nearest,
it is off by at most rho |p|. The norms are float32 sums themselves, so they are raised by 2 g. Sums
on tensor cores may cut instead of round: there u = 2^-23. Numbers below 2^-126 may count as 0: d
2^-125 is added to R, S and Z for them, and sqrt(d) 2^-63 to norms for their squares. Rows for which
the bound is not below 2^120, by which nothing overflows, are left to the float32 product.

|x - x~| and |w - w~| are computed: they are 2.4 times below their worst case, 2^-8 |x|.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.train import blocks
from residual_saes.train.kernels import Kept, group_by_latent, starts_of, topk, values_gradient

_CHUNK = 1 << 17  # elements whose norms are taken at a time: they stay in the second-level cache
# Columns of a group, whose largest stands for them: 32 are a fifth faster, and leave a tenth more.
_GROUP = 16
_CACHE = 16 << 20  # bytes of an encoder that stays in the last-level cache
_SLICE = 3 << 20  # bytes of rows that stay in it while latents pass by
_WORTH = 1024  # width from which leaving out a fifth of the candidates costs less than scoring them
_CROWDED = 16  # a row may have d_sae / 16 candidates; to score as many costs what bf16 saves
_SPARE = 8  # more than k that are scored of a row of the float32 product: nearly tied ones
_SAMPLE = 64  # rows by which a batch's bound is guessed


@dataclass(frozen=True)
class Cheap:
    """Operands of the cheap product, and its bound."""

    x: Tensor  # (n, d) bfloat16
    encoder: Tensor  # (F, d) bfloat16
    bias: Tensor  # (F,) bfloat16
    of_rows: Tensor  # (2, n) float32 R, Q
    of_latents: Tensor  # (3, F) float32 B, S, Z
    widest: Tensor  # (n,) float64: the bound without rho's part, for the largest B, S and Z
    safe: Tensor  # (n,) bool: the bound holds, all is finite and far from overflow
    wide: bool  # p is float32, as on CUDA

    @classmethod
    def of(cls, x: Tensor, encoder: Tensor, b_enc: Tensor, size: Tensor, wide: bool) -> Cheap:
        """Round operands and take norms.

        Args:
            size: (F,) of what `b_enc` was computed from; its own size otherwise.
        """
        d = x.shape[1]
        g = 1.01 * (d + 4) * 2.0 ** (-23 if x.is_cuda else -24)
        tiny = d * 2.0**-125
        low_x, norm_x, off_x = _rounded(x, g)
        low_w, norm_w, off_w = _rounded(encoder, g)
        bias = b_enc.bfloat16()
        off_b = (b_enc - bias).abs() + 2 * g * (size + b_enc.abs()) + tiny
        off_b = torch.where(b_enc == -torch.inf, 0.0, off_b)  # a threshold that nothing exceeds
        long_x = norm_x + off_x
        of_rows = torch.stack((off_x + 2 * g * long_x + tiny, long_x))
        of_latents = torch.stack((norm_w + off_w, off_w + tiny, off_b))
        largest = of_latents.amax(1).double()
        of_bias = torch.ones_like(long_x).unsqueeze(0)
        widest = largest @ torch.cat((of_rows, of_bias)).double()
        safe = long_x.double() * largest[0] + widest < 2.0**120
        return cls(low_x, low_w, bias, of_rows, of_latents, widest, safe, wide)

    @property
    def rho(self) -> float:
        return 2.0**-20 if self.wide else 2.0**-8

    def error(self, pairs: Pairs) -> Tensor:
        """(p,) the bound of |p - q|."""
        R, Q = (own[pairs.rows] for own in self.of_rows)
        B, S, Z = (own[pairs.columns] for own in self.of_latents)
        rho = self.rho * (1 + 2.0**-12)  # this sum rounds too
        return torch.addcmul(Z, Q, S).addcmul_(R, B).add_(pairs.p.abs(), alpha=rho)

    def blocks(self, block_bytes: int | None) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of p: (rows, F) bfloat16, or float32; the next overwrites the last."""
        wide = self.wide
        n, width = len(self.x), len(self.bias)
        step = blocks.rows_at_a_time(self.x, width, 4 if wide else 2, block_bytes)
        buffer = self.x.new_empty(step, width, dtype=torch.float32 if wide else torch.bfloat16)
        bias = self.bias.float() if wide else self.bias
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            out = buffer[: rows.stop - start]
            if wide:
                blocks.wide_bf16_product_(out, self.x[rows], self.encoder).add_(bias)
            else:
                torch.addmm(bias, self.x[rows], self.encoder.T, out=out)
            yield rows, out

    def lowest(self, rows: slice, bar: Tensor) -> Tensor:
        """(rows,) float64: a pair whose q is at least `bar` (rows,) has a p of at least this."""
        z = bar.double() - self.widest[rows]
        return torch.where(z >= 0, z / (1 + self.rho), z / (1 - self.rho))

    def most(self, rows: slice, p: Tensor) -> Tensor:
        """(rows,) float64: a pair whose p is at most `p` (rows,) has a q of at most this."""
        p = p.double()
        most = p + self.rho * p.abs() + self.widest[rows]
        return most.masked_fill(self.safe[rows].logical_not(), torch.inf)

    def least(self, rows: slice, p: Tensor) -> Tensor:
        """(rows,) float64: a pair whose p is at least `p` (rows,) has a q of at least this."""
        p = p.double()
        return p - self.rho * p.abs() - self.widest[rows]


def _rounded(table: Tensor, g: float) -> tuple[Tensor, Tensor, Tensor]:
    """bf16(t) for each row t of a table, |t|, and |t - bf16(t)|, neither of them too small."""
    low = torch.empty_like(table, dtype=torch.bfloat16)
    norms = table.new_empty(2, len(table))
    step = len(table) if table.is_cuda else max(1, _CHUNK // table.shape[1])
    for start in range(0, len(table), step):
        own = slice(start, start + step)
        part = table[own]
        low[own] = part
        torch.linalg.vector_norm(part, dim=1, out=norms[0, own])
        torch.linalg.vector_norm(low[own].float().sub_(part), dim=1, out=norms[1, own])
    norms.mul_(1 + 2 * g).add_(table.shape[1] ** 0.5 * 2.0**-63)
    return low, norms[0], norms[1]


class Pairs(NamedTuple):
    """Candidates, row by row."""

    rows: Tensor  # (p,) int64, ascending
    columns: Tensor  # (p,) int64
    p: Tensor  # (p,) float32 cheap values


def encode(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, block_bytes: int | None = None
) -> Kept:
    """Keep the k largest of each row of x @ W_enc + b_enc, then apply ReLU.

    Args:
        x: (n, d), less b_dec.
        encoder: (F, d), W_enc transposed.
        block_bytes: of pre-activations at a time, as in blocks.rows_at_a_time.
    """
    if x.is_cuda:
        return even(x, encoder, b_enc, k, block_bytes)
    cheap = Cheap.of(x, encoder, b_enc, b_enc.abs(), wide=False)
    pairs, odd = _scan(cheap, b_enc, 8 * k, block_bytes, k)
    if x.shape[1] >= _WORTH:
        pairs = _refined(cheap, pairs, k)
    columns = _best_of_float32(x[odd], encoder, b_enc, min(k + _SPARE, len(encoder)))
    every = odd.repeat_interleave(columns.shape[1])
    pairs = _merged(pairs, Pairs(every, columns.view(-1), columns.view(-1).float()))
    counts, starts = _counted(pairs.rows, len(x))
    scores = scored(x, encoder, b_enc, pairs.rows, pairs.columns)
    values, best = topk(_padded(scores, pairs.rows, counts, starts), k)
    return Kept.even(values.relu_(), pairs.columns[best + starts.unsqueeze(1)])


def encode_above(
    x: Tensor, encoder: Tensor, b_enc: Tensor, threshold: Tensor, block_bytes: int | None = None
) -> Kept:
    """Keep the elements of x @ W_enc + b_enc above `threshold`, () or (F,), and NaN; no ReLU.

    A row with many of them has the values of the float32 product, which round otherwise.
    """
    threshold = threshold.expand(len(b_enc))
    size = b_enc.abs() + threshold.abs()
    cheap = Cheap.of(x, encoder, b_enc - threshold, size, wide=x.is_cuda)
    pairs, odd = _scan(cheap, x.new_zeros(len(x)), 0, block_bytes)
    if x.shape[1] >= _WORTH:
        pairs = _only(pairs, pairs.p + cheap.error(pairs) >= 0)
    scores = scored(x, encoder, b_enc, pairs.rows, pairs.columns)
    pairs = _only(pairs._replace(p=scores), (scores <= threshold[pairs.columns]).logical_not_())
    return _kept(
        _merged(pairs, _of_float32(x, odd, encoder, b_enc, threshold, block_bytes)), len(x)
    )


def encode_batch(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, block_bytes: int | None = None
) -> Kept:
    """Keep the n k largest positive elements of all of x @ W_enc + b_enc; fewer if there are fewer.

    A bar drops most elements. It is estimated from a sample of rows, so that 1.5 n k elements
    reach it; if the n k-th largest may be below it, a second pass keeps all that may be positive.
    """
    n = len(x)
    cheap = Cheap.of(x, encoder, b_enc, b_enc.abs(), wide=x.is_cuda)
    _, first = next(replace(cheap, x=cheap.x[:_SAMPLE]).blocks(block_bytes))
    sample = first.float().view(-1)
    rank = min(len(sample), 3 * k * min(n, _SAMPLE) // 2)
    guess = sample.topk(rank, sorted=False).values.amin().nan_to_num(0.0).clamp_min(0)
    for bar in (guess, torch.zeros_like(guess)):
        pairs, odd = _scan(cheap, bar.expand(n), 8 * k, block_bytes)
        dense = _of_float32(x, odd, encoder, b_enc, bar, block_bytes)
        if x.shape[1] >= _WORTH:
            pairs = _among(cheap, pairs, dense.p, n * k)
        scores = scored(x, encoder, b_enc, pairs.rows, pairs.columns)
        passes = (scores <= bar).logical_not_()
        if len(dense.p) + passes.sum() >= n * k:  # device sync, once or twice a batch
            break
    pairs = _only(pairs._replace(p=scores), passes)
    return _kept(_merged(pairs, dense), n)


def even(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, block_bytes: int | None = None) -> Kept:
    """As `encode`, with as many candidates in each row, as CUDA has it: the 2 k largest p.

    They are enough where what is left out lies below the bound's limit; other rows are left to the
    float32 product.
    """
    n, width = len(x), len(encoder)
    count = min(2 * k, width)
    cheap = Cheap.of(x, encoder, b_enc, b_enc.abs(), wide=True)
    columns = torch.empty(n, count, dtype=torch.int64, device=x.device)
    enough = cheap.safe.clone()
    for rows, p in cheap.blocks(block_bytes):
        values, columns[rows] = topk(p, count)
        limit = cheap.lowest(rows, cheap.least(rows, topk(values, k)[0].amin(1)))
        if count < width:
            enough[rows] &= values.amin(1) < limit
    # Device sync: nonzero must know how many rows are left to the float32 product.
    odd = enough.logical_not_().nonzero().view(-1)
    if len(odd):
        columns[odd] = _best_of_float32(x[odd], encoder, b_enc, count)
    each = torch.arange(n, device=x.device).repeat_interleave(count)
    scores = scored(x, encoder, b_enc, each, columns.view(-1))
    values, best = topk(scores.view(n, count), k)
    return Kept.even(values.relu_(), columns.gather(1, best))


def of_bound(x: Tensor, encoder: Tensor, b_enc: Tensor, wide: bool) -> float:
    """The largest |p - q| of x's first block over its bound, q being float64's: at most 1."""
    cheap = Cheap.of(x, encoder, b_enc, b_enc.abs(), wide)
    rows, p = next(cheap.blocks(None))
    q = x[rows].double() @ encoder.double().T + b_enc
    at = torch.arange(p.numel(), device=x.device)
    width = len(encoder)
    bound = cheap.error(Pairs(at // width, at % width, p.view(-1).float()))
    return float(((p.double() - q).abs().view(-1) / bound)[cheap.safe[at // width]].amax())


def scored(x: Tensor, encoder: Tensor, b_enc: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(p,) float32 pre-activations of pairs, row by row, each a dot product of its own.

    On a CPU, where latents do not stay in a cache, they pass by some rows that do, one by one: half
    the time of row by row at d 2,560, and the same bits.
    """
    starts = starts_of(rows, len(x))
    kept = Kept(b_enc, columns, rows, starts)
    if x.is_cuda or encoder.nbytes <= _CACHE:
        return values_gradient(x, kept, encoder).add_(b_enc[columns])
    scores = torch.empty(len(rows))
    step = max(1, _SLICE // (4 * x.shape[1]))
    ends = [*starts[step::step].tolist(), len(rows)]
    begin = 0
    for number, end in enumerate(ends):
        own = slice(begin, end)
        order, begins = group_by_latent(columns[own], len(encoder))
        near = (rows[own] - number * step)[order]
        turned = Kept(b_enc, near, columns[own][order], begins)
        few = x[number * step : (number + 1) * step]
        scores[own][order] = values_gradient(encoder, turned, few).add_(b_enc[turned.rows])
        begin = end
    return scores


def _scan(
    cheap: Cheap, bar: Tensor, crowd: int, block_bytes: int | None, k: int = 0
) -> tuple[Pairs, Tensor]:
    """All pairs whose q may reach a bar, but those of rows (m,) that are left to float32.

    Args:
        bar: (n,) one for each row.
        crowd: candidates that a row may have, or d_sae / 16, whichever is more.
        k: if given, a row's bar is the least that its k-th largest q can be.
    """
    crowd = max(crowd, len(cheap.bias) // _CROWDED)
    odd = cheap.safe.logical_not()
    found = []
    for rows, p in cheap.blocks(block_bytes):
        reached = cheap.least(rows, _kth_largest(p, k)) if k else bar[rows]
        pairs = _at_least(p, cheap.lowest(rows, reached), odd[rows], crowd)
        found.append(pairs._replace(rows=pairs.rows + rows.start))
    # Device sync: how many rows are odd decides the sizes of what follows.
    return Pairs(*map(torch.cat, zip(*found, strict=True))), odd.nonzero().view(-1)


def _at_least(p: Tensor, limit: Tensor, odd: Tensor, crowd: int) -> Pairs:
    """The elements of p (m, F) that are at least `limit` (m,), of rows that are not odd.

    Args:
        odd: (m,) bool; rows with more than `crowd` of them become so.
    """
    width = p.shape[1]
    if p.dtype is torch.bfloat16:
        at = np.flatnonzero(_mask(p, limit))
        row = at // width
        odd |= torch.from_numpy(np.bincount(row, minlength=len(p))) > crowd
        if bool(odd.any()):
            good = ~odd.numpy()[row]
            at, row = at[good], row[good]
        values = torch.from_numpy(_bits(p).reshape(-1)[at]).view(torch.bfloat16)
        rows, flat = torch.from_numpy(row), torch.from_numpy(at)
    else:
        mask = p >= limit.float().nextafter(limit.new_tensor(-torch.inf).float()).unsqueeze(1)
        odd |= mask.sum(1) > crowd
        # Device sync: nonzero must know how many there are.
        flat = mask.logical_and_(odd.logical_not().unsqueeze(1)).view(-1).nonzero().view(-1)
        rows = flat.div(width, rounding_mode="floor")
        values = p.view(-1)[flat]
    return Pairs(rows, flat - rows * width, values.float())


def _among(cheap: Cheap, pairs: Pairs, others: Tensor, count: int) -> Pairs:
    """Those that may be among the `count` largest of all and of `others`, by their own bounds."""
    error = cheap.error(pairs)
    least = torch.cat((pairs.p - error, others))
    if len(least) <= count:
        return pairs
    reached = least.topk(count, sorted=False).values.amin()
    return _only(pairs, (pairs.p + error < reached).logical_not_())


def _refined(cheap: Cheap, pairs: Pairs, k: int) -> Pairs:
    """Those that may be among the k largest of their row by their own bounds."""
    error = cheap.error(pairs)
    counts, starts = _counted(pairs.rows, len(cheap.x))
    if len(pairs.p):
        least = topk(_padded(pairs.p - error, pairs.rows, counts, starts), k)[0].amin(1)
        pairs = _only(pairs, pairs.p + error >= least[pairs.rows])
    return pairs


def _bits(p: Tensor) -> NDArray[np.int16]:
    """bfloat16 as int16. Of positive numbers these have the numbers' order."""
    bits: NDArray[np.int16] = p.view(torch.int16).numpy()
    return bits


def _ordered(bits: NDArray[np.int16]) -> NDArray[np.int16]:
    """int16 that have the order of the bfloat16 numbers with these bits; its own inverse."""
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))


def _mask(p: Tensor, limit: Tensor) -> NDArray[np.bool_]:
    """(m, F) whether elements of p, bfloat16 on a CPU, are at least `limit` (m,) float64."""
    # The largest bfloat16 that is not above the limit: cut towards minus infinity.
    raw = np.nextafter(limit.float().numpy(), np.float32(-np.inf)).view(np.int32)
    low = (np.where(raw < 0, raw + 0xFFFF, raw) >> 16).astype(np.int16)[:, None]
    bits = _bits(p)
    mask: NDArray[np.bool_]
    if (low > 0).all():
        mask = bits >= low
    elif (low < 0).all():  # as unsigned numbers, what is above a negative one has smaller bits
        mask = bits.view(np.uint16) <= low.view(np.uint16)
    else:
        mask = _ordered(bits) >= _ordered(low)
    return mask


def _kth_largest(p: Tensor, k: int) -> Tensor:
    """(m,) float64, at least k elements of each row of p (m, F) are at least this: of the k-th.

    The k-th largest of the maxima of groups: a little less, where a group has two of the k.
    """
    bits = _bits(p)
    width = bits.shape[1]
    groups = _GROUP
    while groups > 1 and (width % groups or width < 4 * k * groups):
        groups //= 2

    def kth(keys: NDArray[np.int16]) -> NDArray[np.int32]:
        maxima = keys.reshape(len(keys), groups, -1).max(axis=1)
        at = maxima.shape[1] - k
        # numpy partitions 32 bits twice as fast as 16 where there is no AVX-512.
        found: NDArray[np.int32] = np.partition(maxima.astype(np.int32), at, axis=1)[:, at]
        return found

    found = kth(bits)
    negative = found < 0  # of negative numbers the bits have the reverse order
    if negative.any():
        ordered = kth(_ordered(bits[negative])).astype(np.int16)
        found[negative] = _ordered(ordered)
    return torch.from_numpy((found << 16).view(np.float32)).double()


def _best_of_float32(x: Tensor, encoder: Tensor, b_enc: Tensor, count: int) -> Tensor:
    """(m, count) columns of the largest of each row of the float32 product."""
    columns = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    for rows, pre in blocks.pre_activations(x, encoder, b_enc):
        columns[rows] = topk(pre, count)[1]
    return columns


def _of_float32(
    x: Tensor,
    odd: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    block_bytes: int | None,
) -> Pairs:
    """The pairs of rows `odd` (m,) of x that the float32 product has above a threshold, and NaN."""
    parts = [Pairs(odd[:0], odd[:0], b_enc[:0])]
    for rows, pre in blocks.pre_activations(x[odd], encoder, b_enc, "fp32", block_bytes):
        values, columns, own = blocks.above(pre, threshold, rows.start)
        parts.append(Pairs(odd[own], columns, values))
    return Pairs(*map(torch.cat, zip(*parts, strict=True)))


def _only(pairs: Pairs, mask: Tensor) -> Pairs:
    return Pairs(*(column[mask] for column in pairs))


def _merged(pairs: Pairs, more: Pairs) -> Pairs:
    """Both, row by row."""
    if not len(more.rows):
        return pairs
    both = Pairs(*map(torch.cat, zip(pairs, more, strict=True)))
    order = both.rows.sort(stable=True).indices
    return Pairs(both.rows[order], both.columns[order], both.p[order])


def _kept(pairs: Pairs, n: int) -> Kept:
    return Kept(pairs.p, pairs.columns, pairs.rows, starts_of(pairs.rows, n))


def _counted(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(n,) pairs of each row, and (n,) where they begin."""
    starts = starts_of(rows, n)
    return torch.cat((starts[1:], starts.new_tensor([len(rows)]))) - starts, starts


def _padded(values: Tensor, rows: Tensor, counts: Tensor, starts: Tensor) -> Tensor:
    """(n, most) the values of each row's pairs, then minus infinity."""
    padded = values.new_full((len(counts), int(counts.max())), -torch.inf)
    position = torch.arange(len(rows), device=rows.device) - starts[rows]
    padded[rows, position] = values
    return padded
