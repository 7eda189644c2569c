"""Windows of shuffled rows, read ahead of the trainer.

A row is moved twice: from the file into a block that fits a core's cache, and from there to its
shuffled place in the window, which is known before anything is read. Each further pass over the
rows would cost as much as one of these two. Batches are therefore views of the window; only a batch
that straddles two windows is copied together.

While one window is served the next is filled: two buffers of window x chunk x d x 2 bytes, 5.4 GB
together by default for each source of width 2560. A buffer is reused as soon as no tensor of it
lives. A batch that is kept stays valid, and costs a window's memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.errors import StoreError
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.store.shard import SCATTER_BYTES, Shard

_PAGE = 4096


class Tuning(NamedTuple):
    """What decides speed and memory, never an order."""

    # Threads that read and decode, per reader; 0: as many as the store's place takes. Idle ones
    # cost nothing.
    threads: int = 0
    ahead: int = 1  # windows that are filled while one is served
    scatter_bytes: int = SCATTER_BYTES  # rows that are moved at a time
    poll_s: float = 0.2  # between looks for a harvest's commits; one takes 0.04 s at 15,000 units


TUNING = Tuning()


class Window(NamedTuple):
    """Inner chunks whose rows are shuffled together."""

    round: int
    number: int  # within the round
    chunks: NDArray[np.int64]  # (window, 3) unit, chunk, kept rows
    skip: int  # rows to leave out at its beginning, as already served

    @property
    def rows(self) -> int:
        return int(self.chunks[:, 2].sum())


class Blocks:
    """Buffers of equal size; each is reused when no tensor of it lives any more."""

    def __init__(self, rows: int, d: int, most: int, pinned: bool) -> None:
        """Nothing is allocated yet.

        Args:
            most: buffers at a time, beside those that a consumer keeps.
            pinned: in page-locked memory, from which a GPU copies without the host.
        """
        self.shape = (rows, d)
        self._most = most
        self._pinned = pinned
        # A buffer with its lease: a view that every tensor of the buffer keeps alive. Only batches
        # hold the view. When the view dies, the buffer is free.
        self._blocks: list[tuple[NDArray[np.uint16], weakref.ref[NDArray[np.uint16]]]] = []

    def take(self, needed: bool = True) -> torch.Tensor | None:
        """(rows, d) bfloat16 of any content; None if all buffers are in use and none is needed."""
        for index, (memory, lease) in enumerate(self._blocks):
            if lease() is None:
                del self._blocks[index]
                return self._lend(memory)
        if len(self._blocks) == self._most:
            if not needed:
                return None
            del self._blocks[0]  # the consumer keeps it for good
        return self._lend(self.allocate())

    def _lend(self, memory: NDArray[np.uint16]) -> torch.Tensor:
        view = memory[:]
        self._blocks.append((memory, weakref.ref(view)))
        return torch.from_numpy(view).view(torch.bfloat16)

    def allocate(self) -> NDArray[np.uint16]:
        """(rows, d) new memory."""
        rows, d = self.shape
        if self._pinned:
            return torch.empty(rows, d, dtype=torch.uint16, pin_memory=True).numpy()
        # NumPy asks for huge pages. Rows begin at a page's border, so that rows of 64 n bytes fill
        # whole cache lines.
        memory = np.empty(rows * d * 2 + _PAGE, np.uint8)
        first = -memory.ctypes.data % _PAGE
        return memory[first : first + rows * d * 2].view(np.uint16).reshape(rows, d)


class _Columns:
    """The columns of a block that one source fills."""

    def __init__(self, source: Source, first: int) -> None:
        self.where = slice(first, first + source.width)
        self._source = source
        self._array = source.store.arrays.rows(source.point)
        self._memory = threading.local()

    def scatter(
        self,
        out: NDArray[np.uint16],
        unit: int,
        places: Sequence[tuple[int, NDArray[np.int64]]],
        scatter_bytes: int,
    ) -> None:
        """Move the rows of some inner chunks of a unit to their places.

        Args:
            out: (rows, width) the columns of a block.
            places: each chunk, with the places of all its rows.
        """
        store, point = self._source
        try:
            nbytes = store.rows_bytes(point, unit)
            shard = Shard(self._array, store.place, unit, scatter_bytes, nbytes)
        except StoreError:
            store.ledger.absences.refuse(self._array.key(unit), unit)
            raise
        with shard:
            for chunk, of_chunk in places:
                shard.scatter(chunk, of_chunk, out, self._memory)


class Filler:
    """How a window is read: the rows of some sources that a policy keeps."""

    def __init__(
        self,
        sources: Sequence[Source],
        policy: Policy,
        seed: int,
        pinned: bool,
        tuning: Tuning,
    ) -> None:
        self.tuning = tuning
        self.threads = tuning.threads or max(source.store.place.threads for source in sources)
        self._sources = sources
        self._seed = seed
        self._pinned = pinned
        # By kind: whether it is served. `np.isin` over all rows took 0.2 ms a unit.
        self._served = np.isin(np.arange(256), policy.kinds)
        self._policy = policy
        self._chunk: int = sources[0].store.manifest["chunk"]
        self._columns = list[_Columns]()
        self._width = 0
        for source in sources:
            self._columns.append(_Columns(source, self._width))
            self._width += source.width

    def blocks(self, rows: int, most: int) -> Blocks:
        """At most `most` buffers of `rows` rows each."""
        return Blocks(rows, self._width, most, self._pinned)

    def fill(
        self, window: Window, block: torch.Tensor, decoders: ThreadPoolExecutor
    ) -> torch.Tensor:
        """Read a window's rows in their order into `block`, less those that it skips.

        Args:
            block: (at least the window's rows + 1, d). The last row takes what is not served.

        Raises:
            StoreError: a shard is damaged or freed.
        """
        # The place of every kept row; rows that are skipped go to the last one.
        nowhere = len(block) - 1
        places = np.empty(window.rows, np.int64)
        shuffle = order.permutation(window.rows, self._seed, window.round, window.number)
        places[shuffle] = np.arange(-window.skip, window.rows - window.skip)
        places[places < 0] = nowhere

        # Each unit's chunks with their part of the places: a shard is opened once a window.
        by_unit: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
        end = 0
        for unit, chunk, kept in window.chunks.tolist():
            end += kept
            by_unit.setdefault(unit, []).append((chunk, places[end - kept : end]))

        out = block.view(torch.uint16).numpy()
        list(decoders.map(lambda item: self._scatter(out, nowhere, *item), sorted(by_unit.items())))
        return block[: window.rows - window.skip]

    def _scatter(
        self,
        out: NDArray[np.uint16],
        nowhere: int,
        unit: int,
        wanted: Sequence[tuple[int, NDArray[np.int64]]],
    ) -> None:
        """Move the rows of some inner chunks of one unit to their places in `out`.

        Args:
            nowhere: the place of rows that are not served.
            wanted: each chunk, with the places of its kept rows.
        """
        served = self._served[self._policy.kinds_in(self._sources, unit)]
        places = []
        for chunk, kept in wanted:
            mask = served[chunk * self._chunk : (chunk + 1) * self._chunk]
            of_chunk = np.full(self._chunk, nowhere)
            of_chunk[: len(mask)][mask] = kept
            places.append((chunk, of_chunk))
        for columns in self._columns:
            columns.scatter(out[:, columns.where], unit, places, self.tuning.scatter_bytes)


class _Ahead:
    """The windows of a plan, one after another, while the following ones are filled."""

    def __init__(self, plan: Iterator[Window | None], filler: Filler, rows: int) -> None:
        self._plan = plan
        self._filler = filler
        self._ahead = filler.tuning.ahead
        self._blocks = filler.blocks(rows + 1, self._ahead + 1)
        self._loaders = ThreadPoolExecutor(self._ahead, thread_name_prefix="window")
        self._decoders = ThreadPoolExecutor(filler.threads, thread_name_prefix="decode")
        self._coming: deque[Future[torch.Tensor]] = deque()
        self._held_up = False  # whether a window waits for a buffer

    def next(self) -> torch.Tensor | None:
        """The next window's rows; None if the window is not there."""
        if not self._coming and not self._begin(needed=True):
            return None
        current = self._coming.popleft()
        self._held_up = True
        self.go_on()
        return current.result()

    def go_on(self) -> None:
        """Begin the windows that waited for a buffer."""
        while self._held_up and len(self._coming) < self._ahead:
            if not self._begin(needed=False):
                return
        self._held_up = False

    def _begin(self, needed: bool) -> bool:
        block = self._blocks.take(needed)
        if block is None:
            return False
        window = next(self._plan)
        if window is None:
            # A look costs 0.04 s at 15,000 units: none before the next window is asked for.
            self._held_up = False
            return False
        self._coming.append(self._loaders.submit(self._filler.fill, window, block, self._decoders))
        return True

    def close(self) -> None:
        """Stop reading: chunks that are begun are finished, no other is begun."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._loaders.shutdown(cancel_futures=True)
        self._decoders.shutdown()


def batches(
    plan: Iterator[Window | None],
    filler: Filler,
    rows: int,
    batch: int,
    ended: Callable[[], StoreError],
) -> Iterator[torch.Tensor]:
    """Windows cut into batches.

    Hold no reference to a batch here, or to a window that is used up: its buffer would never be
    reused.

    Args:
        plan: windows in their order; None, and the same again at the next asking, for one that is
            not there yet.
        rows: most rows of a window.
        batch: rows of a batch.
        ended: why there is no window any more.
    """
    ahead = _Ahead(plan, filler, rows)
    joints = filler.blocks(batch, 2)
    nothing = torch.empty(0)
    window = nothing
    position = 0  # rows of the window that are served

    def following() -> torch.Tensor:
        found = ahead.next()
        if found is None:
            raise ended()
        return found

    try:
        while True:
            if position == len(window):
                window = nothing  # frees its buffer for the next window
                window = following()
                position = 0

            if position + batch <= len(window):
                # A batch within the window: a view.
                position += batch
                yield window[position - batch : position]
            else:
                # A batch that straddles windows: copied together.
                joint = joints.take()
                assert joint is not None
                filled = 0
                while filled < batch:
                    if position == len(window):
                        window = nothing
                        window = following()
                        position = 0
                    count = min(batch - filled, len(window) - position)
                    joint[filled : filled + count] = window[position : position + count]
                    filled += count
                    position += count
                yield joint
                del joint
            ahead.go_on()
    finally:
        ahead.close()
