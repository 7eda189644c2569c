"""Shuffled, prefetched, resumable batches of residual rows.

The order is a pure function of (seed, position): each round takes the inner chunks of its units in
a new random order, gathers `window` of them, shuffles their rows together and cuts the stream into
batches. Any batch can be asked for by number, so a trainer's whole cursor is one integer; threads
and restarts cannot change a bit. A round is a pass over the store, one after another without end;
in a ring (data/store/ring.py), whose shards are there for a while only, it is the next `span`
training units, and the stream ends with the last of them. Rows were permuted inside their unit when
they were written, so `window` chunks from as many units mix window x unit tokens' worth of
documents (512 x 65,536 by default).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data import order
from data.errors import SettingError, StopRequest, StoreError
from data.journal import tell
from data.rows import split, summary, windows
from data.rows.split import Policy, held_out_units, require_complete, training_units
from data.rows.windows import Filler, Window
from data.store import freed
from data.store.store import Store

# Inner chunks that are shuffled together in memory: 2.7 GB at width 2560. Of 1,024-token documents
# in units of 65,536, 128 mix 8,234 in a batch and 512 mix 32,683 (`python -m
# tests.bench.reader_speed`).
WINDOW = 512
_POLL_S = 0.2  # between looks for what a harvest commits: 0.04 s each at 15,000 units
_MARGIN = (
    1000  # a ring's reader counts on losing 1/1000 of the rows to come, and twice what it saw lost
)


class Reader:
    """The shuffled training stream of one layer: every row that the policy keeps, held-out units
    excepted.
    """

    def __init__(
        self,
        store: Store,
        layer: int,
        *,
        batch: int,
        seed: int,
        policy: Policy,
        window: int = WINDOW,
        pinned: bool = False,
    ) -> None:
        """Nothing is read yet but the layer's summary: the records say how many rows of each chunk
        are kept.

        Args:
            batch: rows per batch.
            window: inner chunks that are shuffled together in memory.
            pinned: give batches in page-locked memory, from which a GPU copies by itself
                (`windows.to_device`).
        """
        if batch < 1:
            raise SettingError(f"batch={batch} must be at least 1 (rows)")
        self.batch, self.seed, self.window = batch, seed, window
        self.d_model = store.d_model
        self._store = store
        self._layer, self._kinds, self._policy, self._pinned = layer, policy.kinds, policy, pinned
        self._chunk: int = store.manifest["chunk"]
        training, found = training_units(store), freed.read(store.place)
        self.span = (
            found.span if found else None
        )  # training units per round; None: all of them, in every round
        self._rounds = [
            training[at : at + (self.span or len(training))]
            for at in range(0, len(training), self.span or len(training))
        ]
        self._ends: list[int] = []  # kept rows up to the end of each round that is there whole
        if found:
            _await_first(store, layer, found, self._rounds[0])
        else:
            require_complete(store, layer)
        known = (
            summary.make(store, layer, [self._rounds[0], held_out_units(store)])
            if found
            else summary.read(store, layer)
        )
        self._extend()
        self.rows = self._kept_rows()
        if self._ends[0] == 0 or known.of(split.HELD_OUT, policy.kinds).count == 0:
            raise StoreError(
                f"no row of layer {layer} in {store.name} is left by drop_bos and drop_outliers"
            )
        # In a ring those of the first round, for all of the run: the others are not there yet.
        moments = known.of(split.TRAINING, policy.kinds)
        self.mean_norm = (
            float(known.norm_sums[split.TRAINING, list(policy.kinds)].sum()) / moments.count
        )
        self.mean, self.variance = moments.mean, moments.variance

    def _kept_rows(self) -> int:
        """Rows of one pass: exactly, or in a ring as many as there will be for all that is known
        after one round.

        How many rows are BOS is known from the spine. Of the others, those to come are taken to
        lose twice the share that the first round lost to outliers and NaN, and 1/1000; a batch is
        left for the end.
        """
        ahead = [unit for units in self._rounds[1:] for unit in units]
        if not ahead:
            return self._ends[0]
        candidates, to_come = self._candidates(self._rounds[0]), self._candidates(ahead)
        lost = (
            2 * to_come * (candidates - self._ends[0]) // max(candidates, 1)
            + to_come // _MARGIN
            + self.batch
        )
        return max(self._ends[0], self._ends[0] + to_come - lost)

    def _candidates(self, units: Sequence[int]) -> int:
        """Rows of some units that are not dropped for being BOS."""
        tokens = int(self._store.ledger.spine_rows[units].sum(dtype=np.int64)) * self._store.context
        return tokens - int(self._store.ledger.pieces[units].sum()) * self._policy.drop_bos

    def _kept(self, units: Sequence[int]) -> NDArray[np.int64]:
        """(units, C) rows to serve of every inner chunk of some committed units."""
        counts = self._store.ledger.layers[self._layer].chunks
        # Kind by kind: of a billion tokens' million chunks at once, in 0.05 s where a loop over
        # units takes 0.4.
        kept: NDArray[np.int64] = np.sum(
            [counts[units, :, kind] for kind in self._kinds], axis=0, dtype=np.int64
        )
        return kept

    def _chunks_of(self, number: int) -> NDArray[np.int64]:
        """(chunks, 3) the inner chunks of a round that have rows to serve: unit, chunk, kept
        rows.
        """
        units = self._units(number)
        kept = self._kept(units)
        at, chunk = np.nonzero(kept)
        return np.stack([np.array(units)[at], chunk, kept[at, chunk]], 1)

    def _units(self, number: int) -> list[int]:
        return self._rounds[number if self.span else 0]

    def _extend(self) -> None:
        """Count the rows of the rounds that have become whole."""
        there = self._store.committed(self._layer)
        for number in range(len(self._ends), len(self._rounds)):
            if not there[self._rounds[number]].all():
                break
            rows = int(self._kept(self._rounds[number]).sum())
            if self.span and rows < self.batch and number + 1 < len(self._rounds):
                raise SettingError(
                    f"batch={self.batch} is more than the {rows} rows of {self.span} units, by which training follows "
                    f"the ring {self._store.name}; lower it, or harvest with a larger max_bytes="
                )
            self._ends.append(rows + (self._ends[-1] if self._ends else 0))

    def _whole(self, number: int) -> bool:
        """Whether a round can be read now."""
        if len(self._ends) <= number < len(self._rounds):
            self._store.refresh()
            self._extend()
        return number < len(self._ends)

    def has(self, number: int) -> bool:
        """Whether all rows of batch `number` can be read now, or none will follow."""
        while (
            self.span
            and self._ends[-1] < (number + 1) * self.batch
            and len(self._ends) < len(self._rounds)
        ):
            if not self._whole(len(self._ends)):
                return False
        return True

    def locate(self, number: int) -> tuple[int, int]:
        """The round in which batch `number` begins, and after how many of its rows."""
        position = number * self.batch
        if self.span is None:
            return divmod(position, self._ends[0])
        at = bisect_right(self._ends, position)
        return at, position - (self._ends[at - 1] if at else 0)

    def batches(self, start: int) -> Iterator[torch.Tensor]:
        """Batches number `start`, `start` + 1, ..., each (batch, d) bfloat16 on the CPU; in a ring
        to its end.

        A batch is a view of its window, 2.7 GB by default at width 2560, of which there are two. It
        stays what it is for as long as anybody has it, and so does the window: have done with a
        batch when you ask for the next.

        Raises:
            StoreError: a shard is damaged or freed; or, in a ring, is not made yet or was the last.
        """
        plan, chunks = (
            self._plan(*self.locate(start)),
            max(map(len, self._rounds)) * self._store.chunks,
        )
        filler = Filler(self._store, self._layer, self._kinds, self.seed, self._pinned)
        rows = min(self.window, chunks) * self._chunk
        yield from windows.batches(plan, filler, rows, self.batch, self._given_out)

    def _plan(self, at: int, skip: int) -> Iterator[Window | None]:
        """Windows in their order; None, and the same again at the next asking, for one that is not
        there.
        """
        chunks = None if self.span else self._chunks_of(0)
        while True:
            while self.span and not self._whole(at):
                yield None
            units = self._chunks_of(at) if chunks is None else chunks
            shuffled = units[order.permutation(len(units), self.seed, at)]
            for number, first in enumerate(range(0, len(shuffled), self.window)):
                window = Window(at, number, shuffled[first : first + self.window], skip)
                skip = max(0, skip - window.rows)
                if window.rows > window.skip:
                    yield window
            at += 1

    def _given_out(self) -> StoreError:
        if len(self._ends) < len(self._rounds):
            return StoreError(
                f"{self._store.name} is not harvested that far; `python -m harvest` must be at work on it"
            )
        return StoreError(
            f"the ring {self._store.name} ended after {self._ends[-1]:,} rows, and {self.rows:,} were counted on: more "
            "rows than twice the share of the first units were outliers or not finite. Harvest again and train with "
            f"tokens={self._ends[-1] // self.batch * self.batch} at most, or with drop_outliers=false"
        )


def _await_first(store: Store, layer: int, found: freed.Record, first: Sequence[int]) -> None:
    """Wait for what a run needs before its first step: the held-out units, and the first round's
    statistics.
    """
    if layer not in found.layers:
        raise StoreError(f"layer {layer} is not in the ring {store.name}; it has {found.layers}")
    needed = [*found.held_out, *first]
    if (there := store.committed(layer)[needed]).all():
        return
    tell(
        f"waiting for the harvest: {there.sum()} of the first {len(needed)} units of layer {layer} are there"
    )
    with StopRequest() as stop:
        while not store.committed(layer)[needed].all():
            stop.check()
            time.sleep(_POLL_S)
            store.refresh()
