"""Shuffled, prefetched, resumable batches of residual rows.

How a batch is made:
1. Units come in rounds (data/rows/rounds.py): a round of a whole store is a pass over it.
2. A round's inner chunks are put in a new random order and cut into windows of `window` chunks.
3. The rows of a window are shuffled together in memory (data/rows/windows.py).
4. The stream of windows is cut into batches.

The order is a pure function of (seed, position), so any batch can be asked for by number: a
trainer's whole cursor is one integer, and threads and restarts change no bit. Rows were permuted
inside their unit when they were written, so a window mixes the documents of up to `window` units
(512 units of 65,536 tokens by default).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows import aligned, split, statistics, windows
from residual_saes.data.rows.follower import Follower
from residual_saes.data.rows.rounds import KeptRows, rounds_of
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.rows.windows import Filler, Tuning, Window

# Inner chunks that are shuffled together in memory: 2.7 GB at width 2560. With
# documents of 1,024 tokens in units of 65,536, a window of 128 chunks puts 8,234 documents in a
# batch, one of 512 puts 32,683 (`python -m tests.bench.reader_speed`).
WINDOW = 512


class Reader:
    """The shuffled training stream of some sources: every kept row of the training units.

    The rows of several sources stand side by side, and are kept or left out together. Their order
    is the one that a single source with the same kept rows has.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch: int,
        seed: int,
        policy: Policy,
        window: int = WINDOW,
        pinned: bool = False,
        tuning: Tuning = windows.TUNING,
    ) -> None:
        """Read the statistics of the sources; rows are read when batches are asked for.

        Args:
            sources: of one store, or of two stores of the same tokens.
            batch: rows per batch.
            window: inner chunks that are shuffled together in memory.
            pinned: give batches in page-locked memory, from which a GPU copies without the host.
            tuning: decides speed and memory, never an order.

        Raises:
            SettingError: the batch is too small, or too large for a ring; or two stores differ in
                their tokens.
            StoreError: a source is incomplete, or no row is kept.
        """
        if batch < 1:
            raise SettingError(f"batch={batch} must be at least 1 (rows)")
        aligned.require(sources)
        self.batch = batch
        self.seed = seed
        self.window = window
        self.widths = [source.width for source in sources]
        self._sources = tuple(sources)
        self._policy = policy
        self._pinned = pinned
        self._tuning = tuning
        self._kept = KeptRows(self._sources, policy)
        self._rounds = rounds_of(self._kept, batch, tuning.poll_s)
        self.rows = self._rounds.rows  # of one pass
        self._set_statistics()

    def _set_statistics(self) -> None:
        """Mean and variance of the training rows, over all columns, and mean norms by source.

        Which rows they are of, data/rows/statistics.py says.
        """
        wholes = self._rounds.statistics
        first = self._rounds.units(0)
        found = statistics.of_kept(self._kept, first, wholes)
        held_out = self._kept.of_chunks(split.held_out_units(self._kept.store))
        if self.rows == 0 or found[0].moments.count == 0 or held_out.sum() == 0:
            raise StoreError(
                f"no row of {', '.join(map(str, self._sources))} is left by drop_bos, "
                "drop_outliers and drop_tokens"
            )
        self.mean_norms = [of_source.mean_norm for of_source in found]
        self.mean = np.concatenate([of_source.moments.mean for of_source in found])
        self.variance = np.concatenate([of_source.moments.variance for of_source in found])
        # By the rule, of the first round: of a whole store these are all training units.
        self.left_out = statistics.left_out(self._kept, first, wholes)

    def batches(self, start: int) -> Iterator[torch.Tensor]:
        """Batches number `start` and so on, each (batch, sum of widths) bfloat16 on the CPU.

        A whole store gives batches without end. Batches are views of a reused buffer, of
        which there are two: by default 2.7 GB for each source of width 2560. Copy one to keep it
        past the next: as long as a tensor of a buffer lives, the buffer is not reused.

        Raises:
            StoreError: a shard is damaged or freed; or a ring is not harvested that far, or ended.
        """
        number, skip = self._rounds.locate(start)
        store = self._kept.store
        filler = Filler(self._sources, self._policy, self.seed, self._pinned, self._tuning)
        chunks = min(self.window, self._rounds.most_units * store.chunks)
        yield from windows.batches(
            self._windows(number, skip),
            filler,
            chunks * store.manifest["chunk"],
            self.batch,
            self._rounds.ended,
        )

    def _windows(self, number: int, skip: int) -> Iterator[Window | None]:
        """Windows in their order from round `number` on.

        Gives None for a window that is not there yet, and the same window at the next asking.

        Args:
            skip: rows of the first round to leave out, as already served.
        """
        units: list[int] = []
        while True:
            # Wait for the round's units.
            while not self._rounds.ready(number):
                yield None

            # The round's chunks in a new order. Of a whole store they are the same every time.
            if units != self._rounds.units(number):
                units = self._rounds.units(number)
                chunks = self._chunks_of(units)
            shuffled = chunks[order.permutation(len(chunks), self.seed, number)]

            # Cut into windows.
            for index, first in enumerate(range(0, len(shuffled), self.window)):
                window = Window(number, index, shuffled[first : first + self.window], skip)
                skip = max(0, skip - window.rows)
                if window.rows > window.skip:
                    yield window
            number += 1

    def _chunks_of(self, units: list[int]) -> NDArray[np.int64]:
        """(chunks, 3) the inner chunks that have rows to serve: unit, chunk, kept rows."""
        kept = self._kept.of_chunks(units)
        index, chunk = np.nonzero(kept)
        return np.stack([np.array(units)[index], chunk, kept[index, chunk]], 1)

    # -- following a harvest -----------------------------------------------------------------------

    def has(self, batch: int) -> bool:
        """Whether all rows of batch number `batch` can be read now, or none will follow."""
        return self._rounds.has(batch)

    def follower(self, name: str, run: str) -> Follower:
        """How a training run follows the harvest of this stream; nothing is registered yet.

        Args:
            name: of the run's registration, safe as a file's name.
            run: what users are told that the harvest waits for.
        """
        return self._rounds.follower(name, run)
