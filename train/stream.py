"""The rows that training reads: those of one or several hook points in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.rounds import KeptRows, rounds_of
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, held_out
from residual_saes.data.rows.windows import TUNING
from residual_saes.data.store.store import Store


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows in one order; runs that share it share the reading."""

    identity: str  # digest of the store; of two stores, of the first
    reader: Reader
    # (n, sum of the sources' widths) batches of all held-out rows
    held_out: Callable[[], Iterator[Tensor]]
    policy: Policy = field(default_factory=Policy)
    # What the policy left out, by the rule: `rows` and `energy`, see data/rows/statistics.py.
    left_out: Mapping[str, dict[str, float]] = field(default_factory=dict)
    identities: Sequence[str] = ()  # digests of the stores, where there are two
    _first: list[Tensor] = field(default_factory=list)  # cache of `first`, for the arms of a sweep

    def first(self, rows: int) -> Tensor:
        """(rows, d) the first rows of the stream; read once, however many runs ask."""
        if not self._first or len(self._first[0]) < rows:
            self._first[:] = [first_rows(self.reader, rows)]
        return self._first[0][:rows]


def first_rows(reader: Reader, rows: int) -> Tensor:
    """(rows, d) the first rows of a reader's stream."""
    parts = list[Tensor]()
    count = 0
    with closing(reader.batches(0)) as batches:  # type: ignore[type-var]
        while count < rows:
            parts.append(next(batches)[: rows - count].clone())
            count += len(parts[-1])
    return torch.cat(parts)


@cache  # so that the arms of a sweep share the store's records
def store_at(path: str) -> Store:
    """The store at `path`, opened once."""
    return Store.open(path)


@cache
def row_count(sources: tuple[Source, ...], policy: Policy) -> int:
    """Training rows of one pass over some sources; of a ring a lower bound. Raises as `Reader`."""
    return rounds_of(KeptRows(sources, policy), 1, TUNING.poll_s).rows


@cache  # so that they share the reading
def rows_of(
    sources: tuple[Source, ...], batch: int, data_seed: int, policy: Policy, pinned: bool
) -> Stream:
    """The rows of some sources, side by side, in one order.

    Args:
        pinned: into memory from which a GPU copies by itself.
    """
    reader = Reader(sources, batch=batch, seed=data_seed, policy=policy, pinned=pinned)
    shares = {rule: share._asdict() for rule, share in reader.left_out.items()}
    rows = partial(held_out, sources, policy, batch)
    # Each store once: all have the same hook points.
    identities = [one.store.identity for one in sources if one.point == sources[0].point]
    return Stream(identities[0], reader, rows, policy, shares, identities[1:] and identities)
