"""Shuffled, prefetched, resumable batches of residual rows.

The order is a pure function of (seed, position): each pass over the store takes its inner chunks in a new random
order, gathers `window` of them, shuffles their rows together and cuts the stream into batches. Any batch can be
asked for by number, so a trainer's whole cursor is one integer; threads and restarts cannot change a bit.
Rows were permuted inside their unit when they were written, so `window` chunks from as many units mix
window x unit tokens' worth of documents (128 x 65,536 by default).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data import order
from data.array import Shard
from data.errors import SettingError, StoreError
from data.kinds import BOS, ORDINARY, OUTLIER
from data.store import Store


@dataclass(frozen=True)
class Policy:
    """Which stored rows a reader serves, by their kind (data/kinds.py). Rows with NaN or infinity never are."""

    drop_bos: bool = True  # leave out the BOS token of every piece
    drop_outliers: bool = True  # leave out other rows longer than ten median norms

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds that are served."""
        dropped = {kind for kind, drop in ((BOS, self.drop_bos), (OUTLIER, self.drop_outliers)) if drop}
        return tuple(kind for kind in (BOS, OUTLIER, ORDINARY) if kind not in dropped)


def held_out_units(store: Store) -> list[int]:
    """Units that are never trained on.

    Raises:
        StoreError: the store has a single unit, so nothing can be held out.
    """
    units = [int(unit) for unit in order.held_out(store.units, store.manifest["seed"])]
    if not units:
        raise StoreError(
            f"{store.path} has a single unit of {store.unit_tokens} tokens, so nothing can be held out; "
            "harvest more tokens, or again with a smaller unit="
        )
    return units


def require_complete(store: Store, layer: int) -> None:
    """Raise StoreError unless every unit of `layer` is committed."""
    if layer not in store.layers:
        raise StoreError(f"layer {layer} is not in {store.path}; it has {store.layers}")
    if not store.complete(layer):
        raise StoreError(
            f"layer {layer} of {store.path} lacks {len(store.missing([layer]))} of {store.units} units; "
            "run the same `python -m harvest` command again to finish it"
        )


def training_units(store: Store) -> list[int]:
    """All units but the held-out ones."""
    held = set(held_out_units(store))
    return [unit for unit in range(store.units) if unit not in held]


class Reader:
    """The shuffled training stream of one layer: every row that the policy keeps, held-out units excepted."""

    def __init__(self, store: Store, layer: int, *, batch: int, seed: int, policy: Policy, window: int = 128) -> None:
        """Read the side columns of every unit once, to know exactly which rows are kept.

        Args:
            batch: rows per batch.
            window: inner chunks that are shuffled together in memory.
        """
        if batch < 1:
            raise SettingError(f"batch={batch} must be at least 1 (rows)")
        self.batch, self.seed, self.window = batch, seed, window
        self.d_model = store.d_model
        require_complete(store, layer)
        self._store, self._array = store, store.array(f"layer_{layer}")
        self._chunk: int = store.manifest["chunk"]
        units = training_units(store)

        def select(unit: int) -> tuple[NDArray[np.uint8], list[int], float]:
            keep = np.isin(store.kinds(layer, unit), policy.kinds)
            per_chunk = np.add.reduceat(keep, np.arange(0, len(keep), self._chunk), dtype=np.int64)
            return np.packbits(keep), per_chunk.tolist(), float(store.norms(layer, unit)[keep].sum(dtype=np.float64))

        self._keep: dict[int, NDArray[np.uint8]] = {}  # unit -> packed bits: 125 MB for a billion rows
        chunks: list[tuple[int, int, int]] = []  # (unit, chunk, kept rows)
        norm_sum = 0.0
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="select") as pool:
            for unit, (packed, per_chunk, total) in zip(units, pool.map(select, units), strict=True):
                self._keep[unit] = packed
                chunks += [(unit, number, kept) for number, kept in enumerate(per_chunk)]
                norm_sum += total
        self._chunks = np.array(chunks, np.int64)
        self.rows = int(self._chunks[:, 2].sum())
        held = (np.isin(store.kinds(layer, unit), policy.kinds).any() for unit in held_out_units(store))
        if self.rows == 0 or not any(held):
            raise StoreError(f"no row of layer {layer} in {store.path} is left by drop_bos and drop_outliers")
        self.mean_norm = norm_sum / self.rows
        moments = store.moments(layer, units, policy.kinds)
        self.mean, self.variance = moments.mean, moments.variance

    def batches(self, start: int) -> Iterator[torch.Tensor]:
        """Batches number `start`, `start` + 1, ... without end, each (batch, d) bfloat16 on the CPU."""
        parts: list[torch.Tensor] = []
        have = 0
        for rows in self._windows(start * self.batch):
            at = 0
            while at < len(rows):
                part = rows[at : at + self.batch - have]
                parts, have, at = [*parts, part], have + len(part), at + len(part)
                if have == self.batch:
                    yield torch.cat(parts)
                    parts, have = [], 0

    def _windows(self, position: int) -> Iterator[torch.Tensor]:
        """Shuffled windows of rows from stream position `position` on; the next one is read meanwhile."""
        with (
            ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode") as decoders,
            ThreadPoolExecutor(1, thread_name_prefix="window") as ahead,
        ):
            plan = self._plan(position)
            following = self._start(ahead, decoders, plan)
            while True:
                current, following = following, self._start(ahead, decoders, plan)
                yield current.result()

    def _start(
        self, ahead: ThreadPoolExecutor, decoders: ThreadPoolExecutor, plan: Iterator[_Window]
    ) -> Future[torch.Tensor]:
        return ahead.submit(self._load, next(plan), decoders)

    def _plan(self, position: int) -> Iterator[_Window]:
        epoch, skip = divmod(position, self.rows)
        while True:
            shuffled = self._chunks[order.permutation(len(self._chunks), self.seed, epoch)]
            for number, at in enumerate(range(0, len(shuffled), self.window)):
                window = _Window(epoch, number, shuffled[at : at + self.window], skip)
                skip = max(0, skip - window.rows)
                if window.rows > window.skip:
                    yield window
            epoch += 1

    def _load(self, window: _Window, decoders: ThreadPoolExecutor) -> torch.Tensor:
        rows = torch.empty(window.rows, self.d_model, dtype=torch.bfloat16)
        bits = rows.view(torch.uint16).numpy()
        ends = window.chunks[:, 2].cumsum()
        by_unit: dict[int, list[tuple[int, int, int]]] = {}
        for (unit, chunk, kept), end in zip(window.chunks.tolist(), ends.tolist(), strict=True):
            by_unit.setdefault(unit, []).append((chunk, end - kept, end))
        list(decoders.map(lambda item: self._fill(bits, *item), sorted(by_unit.items())))
        shuffle = order.permutation(window.rows, self.seed, window.epoch, window.number)
        return rows[torch.from_numpy(shuffle[window.skip :])]

    def _fill(self, bits: NDArray[np.uint16], unit: int, wanted: Sequence[tuple[int, int, int]]) -> None:
        """Decode the wanted (chunk, first, end) of one unit into their places."""
        keep = np.unpackbits(self._keep[unit], count=self._array.rows(unit)).view(np.bool_)
        scratch = np.empty((self._chunk, self.d_model), np.uint16)
        with Shard(self._array, self._store.path, unit) as shard:
            for chunk, first, end in wanted:
                shard.read(chunk, scratch)
                mask = keep[chunk * self._chunk : (chunk + 1) * self._chunk]
                np.compress(mask, scratch[: len(mask)], axis=0, out=bits[first:end])


class _Window(NamedTuple):
    epoch: int
    number: int  # within the epoch
    chunks: NDArray[np.int64]  # (window, 3) unit, chunk, kept rows
    skip: int  # rows to leave out at its beginning, as already served

    @property
    def rows(self) -> int:
        return int(self.chunks[:, 2].sum())


def held_out(store: Store, layer: int, policy: Policy, batch: int) -> Iterator[torch.Tensor]:
    """All kept rows of the held-out units once, in stored order: (n, d) bfloat16, at most `batch` at a time."""
    require_complete(store, layer)
    for unit in held_out_units(store):
        keep = np.isin(store.kinds(layer, unit), policy.kinds)
        rows = torch.from_numpy(store.residuals(layer, unit)[keep]).view(torch.bfloat16)
        for at in range(0, len(rows), batch):
            yield rows[at : at + batch]
