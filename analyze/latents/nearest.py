"""The largest products of directions with other directions, exactly: a latent's nearest ones.

A product finds candidates; their float32 dot products are computed pair by pair, and decide. So a
result depends neither on blocks nor on the way of the product, which is bf16's where that is
fastest. A set beside itself is multiplied by pairs of blocks, and each product serves both: half
the work.

Shapes: F latents, G other directions, d d_model, n rows of a block, m candidates, K kept of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from residual_saes.analyze.parts import NOWHERE, Arrays, Parts
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.journal import Progress
from residual_saes.train import blocks, exact, kernels, product
from residual_saes.train.kernels import Kept

VERSION = 2  # of the kept neighbours: raise it when the same weights give other ones
NEIGHBOURS = 10  # of each latent
BLOCK = 2048  # directions of a block of a set beside itself: products of 16 MB stay in the cache
BLOCK_BYTES = 1 << 28  # of products held at a time
# Operations of a product at a time on a CPU: under a second of one core. A GPU does as many in a
# millisecond, and is bounded by BLOCK_BYTES.
BLOCK_OPERATIONS = 1 << 35
_SMALL = 1 << 20  # elements of `among`; below it the products themselves are the result
_PART = 8192  # latents whose neighbours are kept together: 20 seconds of a core
_ROUNDING = 2.0**-24  # of float32

# Takes the largest product (n,) of each row's pairs; gives the most (n,) that their float32 dot
# products can be.
Bound = Callable[[Tensor], Tensor]


def unit(directions: Tensor) -> Tensor:
    """(F, d) directions scaled to norm 1; zero ones stay."""
    norms: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return directions / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def products(
    rows: Tensor, others: Tensor, block_bytes: int, *, by: str = "torch"
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows @ others.T, each with its slice of `rows`; the next overwrites the one before.

    New blocks of 27 MB leave holes between what is kept of each: 4 GB in 160 of them.

    Args:
        rows: float32 or bfloat16, as `others` is. The products are float32.
        by: the library of float32 products: torch or openblas.
    """
    step = block_bytes // (4 * len(others))
    if not others.is_cuda:
        step = min(step, BLOCK_OPERATIONS // (2 * others.numel()))
    step = max(1, min(step, len(rows)))
    buffer = torch.empty(step, len(others), device=others.device)
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, _product_(buffer[: part.stop - start], rows[part], others, by)


def _product_(out: Tensor, rows: Tensor, others: Tensor, by: str) -> Tensor:
    if rows.dtype is torch.bfloat16:
        return blocks.bf16_product_(out, rows, others)
    if by == "openblas":
        return blocks.openblas_product_(out, rows, others)
    with blocks.tf32(False):
        return torch.mm(rows, others.T, out=out)


def way(among: Tensor) -> str:
    """The way of products with `among` (G, d) on this machine, of product.WAYS."""
    return product.way(among.shape[1], len(among), among.device)


def _rounded(of: Tensor, among: Tensor) -> exact.Cheap:
    """bf16 operands of the product, and its bound."""
    none = among.new_zeros(len(among))
    return exact.Cheap.of(of, among, none, none, wide=of.is_cuda)


def nearest(
    of: Tensor, among: Tensor, count: int, *, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor]:
    """The `count` rows of `among` (G, d) with the largest cosines to each row of `of` (F, d).

    Args:
        count: at most G.
        block_bytes: of cosines held at a time.

    Returns:
        cosines (F, count) in descending order, and the rows' numbers.
    """
    is_same = among is of
    of = unit(of).contiguous()
    among = of if is_same else unit(among).contiguous()  # one copy: 0.3 GB at 32,768 x 2,560
    values = of.new_empty(len(of), count)
    numbers = torch.empty(len(of), count, dtype=torch.int64, device=of.device)
    progress = Progress(quiet_s=2.0)
    by = way(among)
    cheap = _rounded(of, among) if by == "bf16" else None
    operands = (cheap.x, cheap.encoder) if cheap else (of, among)
    for part, cosines in products(*operands, block_bytes, by=by):
        progress.show(f"cosines of {part.start:,} of {len(of):,} directions with {len(among):,}")
        bound = partial(cheap.most, part) if cheap else None
        found = largest(of[part], among, cosines, count, among_norm=1.0, bound=bound)
        values[part], numbers[part] = found
    progress.close()
    return values, numbers


def nearest_others(
    directions: Tensor, count: int, parts: Parts = NOWHERE, *, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """`nearest` of directions (F, d) among the other ones.

    Args:
        count: at most F - 1.
        parts: where it is kept while it is made.
        block: directions of a block.
    """
    units = unit(directions)
    total = len(units)
    if total <= block:
        chosen = (units @ units.T).fill_diagonal_(-torch.inf).topk(count, dim=1)
        return chosen.values, chosen.indices
    units, by = units.contiguous(), way(units)
    cheap = _rounded(units, units) if by == "bf16" else None
    operand = cheap.x if cheap else units
    if cheap:
        parts = parts.within("bf16")  # float32's candidates are fewer, and nearer to what they are
    best = _Best(total, min(_candidates(count, cheap is not None), total), units)
    buffer = units.new_empty(block, block)
    progress = Progress(quiet_s=2.0)

    def make(begin: int, end: int) -> Arrays:
        for first in range(begin, end, block):
            rows = slice(first, min(first + block, total))
            for start in range(first, total, block):
                done = f"{first:,} of {total:,} directions with those from {start:,} on"
                progress.show(f"cosines of {done}")
                others = slice(start, min(start + block, total))
                shape = rows.stop - first, others.stop - start
                cosines = buffer.view(-1)[: shape[0] * shape[1]].view(shape)
                _product_(cosines, operand[rows], operand[others], by)
                if start == first:
                    cosines.fill_diagonal_(-torch.inf)
                else:
                    best.add_(others, cosines, first, turned=True)
                best.add_(rows, cosines, start)
        return best.arrays(begin)

    for number, begin in enumerate(range(0, total, step := max(1, _PART // block) * block)):
        best.take_(begin, parts.of(number, partial(make, begin, min(begin + step, total))))
    progress.close()
    bound = partial(cheap.most, slice(None)) if cheap else None
    found = (best.values, best.ids)
    return _judged(units, units, *found, count, among_norm=1.0, bound=bound, themselves=True)


def largest(
    of: Tensor,
    among: Tensor,
    dense: Tensor,
    count: int,
    *,
    among_norm: float,
    bound: Bound | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` rows of `among` (G, d) with the largest products with each row of `of` (n, d).

    Args:
        dense: (n, G) of @ among.T, up to rounding.
        count: at most G.
        among_norm: the largest norm of `among`, up to rounding.
        bound: for products of rounded operands. None: they are float32's.

    Returns:
        products (n, count) in descending order, and the rows' numbers. Of equal products the lower
        numbers, unless `among` has fewer than 2^20 elements.
    """
    if _is_small(among) and bound is None:
        chosen = dense.topk(count, dim=1)
        return chosen.values, chosen.indices
    values, ids = kernels.topk(dense, min(_candidates(count, bound is not None), len(among)))
    return _judged(of, among, values, ids, count, among_norm=among_norm, bound=bound)


def _is_small(among: Tensor) -> bool:
    return among.numel() < _SMALL


def _candidates(count: int, rounded: bool) -> int:
    """How many of the largest products hold the `count` largest but for rounding, mostly.

    Args:
        rounded: the operands are bf16. Of 32,768 random directions of 2,560 dimensions some 20 are
            within that bound of the tenth.
    """
    return 2 * count + 16 if rounded else count + 8 + count // 4


def _judged(
    of: Tensor,
    among: Tensor,
    values: Tensor,
    ids: Tensor,
    count: int,
    *,
    among_norm: float,
    bound: Bound | None = None,
    themselves: bool = False,
) -> tuple[Tensor, Tensor]:
    """The `count` largest float32 dot products of candidates, and proof that no other one is.

    A dot product of d terms is off by at most d 2^-24 |x| |w| in any order of summation, and so is
    a float32 product that found the candidates. A row is sure if its last dot product is above what
    one behind the last candidate can be. For others, all that could be among the largest are looked
    at, by a float32 product.

    Args:
        values: (n, m) products of the candidates; -inf for none.
        ids: (n, m) their rows of `among`.
        themselves: `among` is `of`, and no row is compared with itself.
    """
    dots = _dots(of, among, ids).masked_fill_(values == -torch.inf, -torch.inf)
    error = torch.linalg.vector_norm(of, dim=1) * (2.01 * of.shape[1] * _ROUNDING * among_norm)
    best, chosen = _ordered(dots, ids, count)
    if count == 0 or ids.shape[1] == len(among):
        return best, chosen
    # A zero row's products are all equal, and any of them will do.
    most = _least(values) + error if bound is None else bound(_least(values))
    unsure = (best[:, -1] > most).logical_not_() & (of != 0).any(1)
    step = max(1, BLOCK_BYTES // (64 * len(among)))
    again = unsure.nonzero().view(-1)  # Device sync: mostly there are none.
    for start in range(0, len(again), step):
        rows = again[start : start + step]
        dense = _product_(of.new_empty(len(rows), len(among)), of[rows], among, "torch")
        if themselves:
            dense.scatter_(1, rows[:, None], -torch.inf)
        passes = (dense < (best[rows, -1] - error[rows])[:, None]).logical_not_()
        columns, there = _places(passes)
        there &= dense.gather(1, columns) != -torch.inf
        dots = _dots(of[rows], among, columns).masked_fill_(~there, -torch.inf)
        best[rows], chosen[rows] = _ordered(dots, columns, count)
    return best, chosen


def _dots(of: Tensor, among: Tensor, ids: Tensor) -> Tensor:
    """(n, m) dot products of each row with rows `ids` of `among`, pair by pair."""
    pairs = Kept.even(of.new_empty(ids.shape), ids)
    return kernels.values_gradient(of, pairs, among).view(ids.shape)


def _ordered(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in descending order, of equal ones the lower `ids`."""
    ids, order = ids.sort(dim=1)
    ranked = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ranked.values[:, :count].clone(), ids.gather(1, ranked.indices[:, :count])


class _Best:
    """The largest products found so far of each of F rows, and with which others."""

    def __init__(self, total: int, count: int, like: Tensor) -> None:
        self.values = like.new_full((total, count), -torch.inf)
        self.ids = torch.zeros(total, count, dtype=torch.int64, device=like.device)

    def arrays(self, first: int) -> Arrays:
        """Those of the rows from `first` on."""
        ids = self.ids[first:].int()
        return {"cosines": self.values[first:].cpu().numpy(), "ids": ids.cpu().numpy()}

    def take_(self, first: int, arrays: Arrays) -> None:
        """Put back what `arrays` gave."""
        self.values[first:] = torch.from_numpy(arrays["cosines"])
        self.ids[first:] = torch.from_numpy(arrays["ids"])

    def add_(self, rows: slice, dense: Tensor, first: int, *, turned: bool = False) -> None:
        """Take in products of `rows` with others.

        Args:
            dense: (n, others).
            first: the number of the first of the others.
            turned: it is (others, n).
        """
        values = self.values[rows]
        count = values.shape[1]
        if first == 0:  # each row's first ones
            if turned:
                dense = dense.T.contiguous()
            found, columns = kernels.topk(dense, min(count, dense.shape[1]))
        else:
            least = _least(values)
            # NaN passes, so that it cannot hide.
            passes = (dense <= (least if turned else least[:, None])).logical_not_()
            columns, there = _places(passes, turned=turned)
            found = dense.T.gather(1, columns) if turned else dense.gather(1, columns)
            found.masked_fill_(~there, -torch.inf)
        both = torch.cat([values, found], dim=1)
        self.values[rows], chosen = kernels.topk(both, count)
        self.ids[rows] = torch.cat([self.ids[rows], columns + first], dim=1).gather(1, chosen)


def _least(values: Tensor) -> Tensor:
    """(n,) the smallest of each row of (n, m); NaN counts as largest."""
    return torch.where(values.isnan(), torch.inf, values).amin(1)


def _places(mask: Tensor, *, turned: bool = False) -> tuple[Tensor, Tensor]:
    """Where a mask (n, c) is true: (n, most) columns of each row, ascending, and which are true.

    Args:
        turned: the mask is (c, n).
    """
    # Device sync: nonzero must know how many there are. On the CPU numpy's is several times as
    # fast.
    if mask.is_cuda:
        flat = mask.view(-1).nonzero().view(-1)
    else:
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    rows = flat.div(mask.shape[1], rounding_mode="floor")
    columns = flat - rows * mask.shape[1]
    n = len(mask)
    if turned:
        order = columns.sort(stable=True)
        rows, columns, n = order.values, rows[order.indices], mask.shape[1]
    counts = torch.bincount(rows, minlength=n)
    there = torch.arange(int(counts.max()), device=mask.device) < counts[:, None]  # Device sync.
    places = columns.new_zeros(there.shape)
    places[there] = columns
    return places, there


def neighbours(subject: Subject, *, by_encoder: bool = False) -> tuple[Tensor, Tensor]:
    """The latents with the largest cosines of decoder directions to each latent's own, kept.

    Args:
        by_encoder: of the directions that latents read along instead.

    Returns:
        cosines (F, NEIGHBOURS) in descending order, and the latents' numbers; fewer columns where
        there are fewer other latents.
    """
    W_dec = subject.sae.encoder if by_encoder else subject.scaled(subject.sae.W_dec)
    follows = {"version": VERSION, "device": W_dec.device.type}
    # Device sync: the digest is of the host's copy.
    follows["W_dec"] = durable.digest(W_dec.cpu().contiguous().numpy().data)
    count = min(NEIGHBOURS, len(W_dec) - 1)
    cosines, ids = nearest_others(W_dec, count, subject.parts("neighbours", follows))
    return cosines.cpu(), ids.cpu()  # device sync: of small tables, once a study
