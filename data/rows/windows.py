"""Windows of shuffled rows, read ahead of whoever trains on them.

A row is moved twice: out of the file into a block that fits a core's cache, and from there to its
shuffled place in the window, which is known before anything is read. The batches are views of the
window, only one that straddles two windows is put together. Each further pass over the rows would
cost as much as one of these two.

While one window is served the next is filled; the two take 2 x window x chunk x d x 2 bytes: 5.4 GB
by default at width 2560. Their memory is used again as soon as nobody holds a tensor of it, and not
before: a batch that is kept stays what it was, and costs a window's memory.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data import order
from data.errors import StoreError
from data.store.shard import Shard
from data.store.store import Store

AHEAD = 1  # windows that are filled while one is served
# Per reader, and as many again in a second one. 16 decode 16 GB/s of blosc and ask a bucket for 1
# GB/s; idle ones cost nothing. Where training shares the cores it is held up for the second that a
# window takes, once a window.
THREADS = min(16, os.cpu_count() or 1)
_PAGE = 4096


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
    """Equal pieces of memory, each given out again when nobody holds a tensor of it any more."""

    def __init__(self, rows: int, d: int, most: int, pinned: bool) -> None:
        """Nothing is allocated yet.

        Args:
            most: blocks to have at a time, but for those that a consumer keeps.
            pinned: in page-locked memory, from which a GPU copies by itself.
        """
        self._shape, self._most, self._pinned = (rows, d), most, pinned
        # A lease is a view that every tensor made of the block keeps alive, and nothing of ours.
        self._blocks: list[tuple[NDArray[np.uint16], weakref.ref[NDArray[np.uint16]]]] = []

    def take(self, needed: bool = True) -> torch.Tensor | None:
        """(rows, d) bfloat16, of any content; None if all blocks are held, and none is `needed`."""
        for at, (memory, lease) in enumerate(self._blocks):
            if lease() is None:
                return self._lend(at, memory)
        if len(self._blocks) == self._most:
            if not needed:
                return None
            del self._blocks[0]  # whoever keeps it has it for good
        self._blocks.append((memory := self._allocate(), weakref.ref(memory)))
        return self._lend(-1, memory)

    def _lend(self, at: int, memory: NDArray[np.uint16]) -> torch.Tensor:
        view = memory[:]
        self._blocks[at] = memory, weakref.ref(view)
        return torch.from_numpy(view).view(torch.bfloat16)

    def _allocate(self) -> NDArray[np.uint16]:
        rows, d = self._shape
        if self._pinned:
            return torch.empty(rows, d, dtype=torch.uint16, pin_memory=True).numpy()
        # By NumPy, which asks for huge pages. On a page's border, so that rows of 64 n bytes fill
        # whole cache lines.
        memory = np.empty(rows * d * 2 + _PAGE, np.uint8)
        first = -memory.ctypes.data % _PAGE
        return memory[first : first + rows * d * 2].view(np.uint16).reshape(rows, d)


class Filler:
    """How a window is read: the rows of one layer that are of some kinds."""

    def __init__(
        self, store: Store, layer: int, kinds: Sequence[int], seed: int, pinned: bool
    ) -> None:
        self._store, self._layer, self._seed, self._pinned = store, layer, seed, pinned
        self._served = np.isin(
            np.arange(256), kinds
        )  # by kind; `np.isin` over all rows took 0.2 ms a unit
        self._array = store.array(f"layer_{layer}")
        self._chunk: int = store.manifest["chunk"]
        self._memory = threading.local()

    def blocks(self, rows: int, most: int) -> Blocks:
        """Memory for as many rows each."""
        return Blocks(rows, self._store.d_model, most, self._pinned)

    def fill(
        self, window: Window, block: torch.Tensor, decoders: ThreadPoolExecutor
    ) -> torch.Tensor:
        """The window's rows in their order, less those it skips; in `block`, whose last row takes
        what is not served.

        Raises:
            StoreError: a shard is damaged or freed.
        """
        shuffle = order.permutation(window.rows, self._seed, window.round, window.number)
        nowhere = len(block) - 1
        places = np.empty(window.rows, np.int64)
        places[shuffle] = np.arange(-window.skip, window.rows - window.skip)
        places[places < 0] = nowhere
        out = block.view(torch.uint16).numpy()
        by_unit: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
        for (unit, chunk, kept), end in zip(
            window.chunks.tolist(), window.chunks[:, 2].cumsum().tolist(), strict=True
        ):
            by_unit.setdefault(unit, []).append((chunk, places[end - kept : end]))
        list(decoders.map(lambda item: self._scatter(out, nowhere, *item), sorted(by_unit.items())))
        return block[: window.rows - window.skip]

    def _scatter(
        self,
        out: NDArray[np.uint16],
        nowhere: int,
        unit: int,
        wanted: Sequence[tuple[int, NDArray[np.int64]]],
    ) -> None:
        """Put the wanted inner chunks' rows of one unit, (chunk, places of its kept rows) each,
        into their places.
        """
        kinds = self._store.kinds(self._layer, unit)
        try:
            shard = Shard(self._array, self._store.place, unit)
        except StoreError:
            self._store.ledger.freed.refuse(self._array.key(unit))
            raise
        with shard:
            for chunk, kept in wanted:
                mask = self._served[kinds[chunk * self._chunk : (chunk + 1) * self._chunk]]
                places = np.full(self._chunk, nowhere)
                places[: len(mask)][mask] = kept
                shard.scatter(chunk, places, out, self._memory)


class _Ahead:
    """The windows of a plan, one after another, while the following ones are filled."""

    def __init__(self, plan: Iterator[Window | None], filler: Filler, rows: int) -> None:
        self._plan, self._filler, self._blocks = plan, filler, filler.blocks(rows + 1, AHEAD + 1)
        self._loaders = ThreadPoolExecutor(AHEAD, thread_name_prefix="window")
        self._decoders = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
        self._coming: deque[Future[torch.Tensor]] = deque()
        self._held_up = False  # whether a window is not begun for want of memory

    def next(self) -> torch.Tensor | None:
        """The next window's rows; None if it is not there."""
        if not self._coming and not self._begin(needed=True):
            return None
        current = self._coming.popleft()
        self._held_up = True
        self.go_on()
        return current.result()

    def go_on(self) -> None:
        """Begin the windows that only batches in use have held up."""
        while self._held_up and len(self._coming) < AHEAD:
            if not self._begin(needed=False):
                return
        self._held_up = False

    def _begin(self, needed: bool) -> bool:
        if (block := self._blocks.take(needed)) is None:
            return False
        if (window := next(self._plan)) is None:
            # looking for it costs 0.04 s at 15,000 units: not again before the next window
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
    given_out: Callable[[], StoreError],
) -> Iterator[torch.Tensor]:
    """Windows cut into batches. Nothing here may keep a batch, or a window at its end: its memory
    would not come free.

    Args:
        plan: windows in their order; None, and the same again at the next asking, for one that is
            not there.
        rows: most rows of a window.
        batch: rows of a batch.
        given_out: why there is no window any more.
    """
    ahead, joints = _Ahead(plan, filler, rows), filler.blocks(batch, 2)
    nothing = torch.empty(0)
    window, at = nothing, 0

    def following() -> torch.Tensor:
        if (found := ahead.next()) is None:
            raise given_out()
        return found

    try:
        while True:
            if at == len(window):
                window = nothing
                window, at = following(), 0
            if at + batch <= len(window):
                at += batch
                yield window[at - batch : at]
            else:
                joint, have = joints.take(), 0
                assert joint is not None
                while have < batch:
                    if at == len(window):
                        window = nothing
                        window, at = following(), 0
                    end = min(at + batch - have, len(window))
                    joint[have : have + end - at] = window[at:end]
                    have, at = have + end - at, end
                yield joint
                del joint
            ahead.go_on()
    finally:
        ahead.close()
