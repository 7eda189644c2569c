"""What training needs of the rows it reads, and of the harvest that it may follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import StopRequest
from data.rows.reader import Reader
from data.rows.split import Policy, held_out
from data.store.store import Store


class Rows(Protocol):
    """What training needs of data.reader.Reader."""

    rows: int  # kept training rows in one pass
    d_model: int
    mean_norm: float  # E||x|| over them
    mean: NDArray[np.float64]  # (d,)
    variance: NDArray[np.float64]  # (d,)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Batch number `start` and all later ones, each (batch, d), good until the next is asked
        for.
        """
        ...


class Following(Protocol):
    """How a run and the harvest that it follows wait for each other: data.reader.RingFollower."""

    span: int | None  # units per round; None: the store is whole

    def require(self, rows: int) -> None:
        """Raise SettingError if there are not as many."""
        ...

    def begin(self, batch: int) -> None:
        """Everything from batch number `batch` on is needed."""
        ...

    def round(self, batch: int) -> int:
        """The round in which a batch begins; a checkpoint is saved in each."""
        ...

    def has(self, batch: int) -> bool:
        """Whether a batch can be read now."""
        ...

    def wait(self, batch: int, stop: StopRequest) -> None:
        """Come back when a batch can be read, or a signal came."""
        ...

    def release(self, batch: int) -> None:
        """Nothing before batch number `batch` is needed any more."""
        ...

    def finish(self) -> None:
        """Nothing is needed any more."""
        ...


class Whole:
    """Following nobody: the store is whole, and stays."""

    span: int | None = None

    def require(self, rows: int) -> None:
        pass

    def begin(self, batch: int) -> None:
        pass

    def round(self, batch: int) -> int:
        return 0

    def has(self, batch: int) -> bool:
        return True

    def wait(self, batch: int, stop: StopRequest) -> None:
        pass

    def release(self, batch: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Stream:
    """One layer's rows in one order; runs that share it share the reading."""

    identity: str  # digest of the store
    reader: Rows
    held_out: Callable[[], Iterator[Tensor]]  # (n, d) batches of all held-out rows
    _first: list[Tensor] = field(
        default_factory=list
    )  # what `first` found, for the other arms of a sweep

    def first(self, rows: int) -> Tensor:
        """(rows, d) the first rows of the stream; read once, however many runs ask."""
        if not self._first or len(self._first[0]) < rows:
            self._first[:] = [first_rows(self.reader, rows)]
        return self._first[0][:rows]


def first_rows(reader: Rows, rows: int) -> Tensor:
    """(rows, d) the first rows of a reader's stream."""
    parts, have = list[Tensor](), 0
    with closing(reader.batches(0)) as batches:  # type: ignore[type-var]
        while have < rows:
            parts.append(next(batches)[: rows - have].clone())
            have += len(parts[-1])
    return torch.cat(parts)


@cache  # so that the arms of a sweep share the store's records
def store_at(path: str) -> Store:
    """The store at `path`, opened once."""
    return Store.open(path)


@cache  # so that they share the reading
def rows_of(
    store: Store, layer: int, batch: int, data_seed: int, policy: Policy, pinned: bool
) -> tuple[Stream, Reader]:
    """One layer's rows in one order.

    Args:
        pinned: into memory from which a GPU copies by itself.
    """
    reader = Reader(store, layer, batch=batch, seed=data_seed, policy=policy, pinned=pinned)
    return Stream(store.identity, reader, lambda: held_out(store, layer, policy, batch)), reader
