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
from data.store import Store

_MEDIAN_UNITS = 64  # units sampled for the median norm: 4 million rows at the default unit


@dataclass(frozen=True)
class Policy:
    """Which stored rows a reader serves. Rows with NaN or infinity never are."""

    drop_bos: bool = True  # leave out the BOS token of every piece
    max_norm: float | None = 10.0  # leave out rows longer than this many median norms; None keeps them

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm > 1:
            raise SettingError(f"max_norm={self.max_norm} must be greater than 1 (in median norms), or null")


class HeldOut(NamedTuple):
    """A run of held-out rows."""

    rows: torch.Tensor  # (n, d) bfloat16
    token_index: NDArray[np.uint64]  # (n,) flat spine index of each row


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


class Selection:
    """The rows of one layer that a policy keeps."""

    def __init__(self, store: Store, layer: int, policy: Policy) -> None:
        require_complete(store, layer)
        self.store, self.layer, self.policy = store, layer, policy
        held = set(held_out_units(store))
        self.train_units = [unit for unit in range(store.units) if unit not in held]
        self.norm_limit = np.inf
        if policy.max_norm is not None:
            sample = order.permutation(len(self.train_units), store.manifest["seed"])[:_MEDIAN_UNITS]
            norms = (store.norms(layer, self.train_units[i]) for i in sample)
            medians = [np.median(unit[np.isfinite(unit)]) for unit in norms if np.isfinite(unit).any()]
            self.norm_limit = float(policy.max_norm * np.mean(medians)) if medians else 0.0

    def kept(self, unit: int) -> tuple[NDArray[np.bool_], float]:
        """(n,) which stored rows of `unit` are kept, and the sum of their norms."""
        norms = self.store.norms(self.layer, unit)
        keep = np.isfinite(norms) & (norms <= self.norm_limit)
        if self.policy.drop_bos:
            local = self.store.token_index(unit) - np.uint64(unit * self.store.unit_tokens)
            keep &= ~self.store.piece_starts(unit).ravel()[local]
        return keep, float(norms[keep].sum(dtype=np.float64))


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
        selection = Selection(store, layer, policy)
        self._store, self._array = store, store.array(f"layer_{layer}")
        self._chunk: int = store.manifest["chunk"]
        self._keep: dict[int, NDArray[np.uint8]] = {}  # unit -> packed bits: 125 MB for a billion rows
        chunks: list[tuple[int, int, int]] = []  # (unit, chunk, kept rows)
        norm_sum = 0.0

        def select(unit: int) -> tuple[NDArray[np.uint8], list[int], float]:
            keep, total = selection.kept(unit)
            per_chunk = np.add.reduceat(keep, np.arange(0, len(keep), self._chunk), dtype=np.int64)
            return np.packbits(keep), per_chunk.tolist(), total

        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="select") as pool:
            selected = pool.map(select, selection.train_units)
            for unit, (packed, per_chunk, total) in zip(selection.train_units, selected, strict=True):
                self._keep[unit] = packed
                chunks += [(unit, number, kept) for number, kept in enumerate(per_chunk)]
                norm_sum += total
        self._chunks = np.array(chunks, np.int64)
        self.rows = int(self._chunks[:, 2].sum())
        if self.rows == 0:
            raise StoreError(f"no row of layer {layer} in {store.path} passes drop_bos and max_norm")
        self.mean_norm = norm_sum / self.rows
        moments = store.moments(layer, selection.train_units, bos=not policy.drop_bos)
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


def held_out(store: Store, layer: int, policy: Policy, batch: int) -> Iterator[HeldOut]:
    """All kept rows of the held-out units once, in stored order, at most `batch` at a time."""
    selection = Selection(store, layer, policy)
    for unit in held_out_units(store):
        keep, _ = selection.kept(unit)
        rows = torch.from_numpy(store.residuals(layer, unit)[keep]).view(torch.bfloat16)
        index = store.token_index(unit)[keep].astype(np.uint64)
        for at in range(0, len(rows), batch):
            yield HeldOut(rows[at : at + batch], index[at : at + batch])
