"""Windows: buffers are reused and never too soon, threads end, damage is found, copies in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.data.errors import StoreError
from residual_saes.data.rows.copy import one_ahead, to_device
from residual_saes.data.rows.split import held_out_units
from residual_saes.data.rows.windows import TUNING, Blocks
from residual_saes.data.store.store import Store
from tests.conftest import make_store
from tests.data.test_reader import CONTEXT, UNIT, numbered, reader


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "s.zarr", numbered(), context=CONTEXT, unit=UNIT)


# -- memory and threads ----------------------------------------------------------------------------


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the blocks that are allocated, as they are."""
    shapes: list[tuple[int, int]] = []
    allocate = Blocks.allocate

    def noted(self: Blocks) -> NDArray[np.uint16]:
        shapes.append(self.shape)
        return allocate(self)

    monkeypatch.setattr(Blocks, "allocate", noted)
    return shapes


@pytest.mark.parametrize(
    "batch", [7, 112, 300]
)  # many in a window, just one, several windows in one
def test_memory_is_used_again_by_those_who_keep_no_batch(
    store: Store, allocated: list[tuple[int, int]], batch: int
) -> None:
    expected = [one.clone() for one in islice(reader(store, batch=batch).batches(0), 200)]
    allocated.clear()
    for number, one in enumerate(islice(reader(store, batch=batch).batches(0), 200)):
        assert torch.equal(one, expected[number])
    blocks = [rows for rows, _ in allocated if rows == 7 * 16 + 1]
    assert len(blocks) <= TUNING.ahead + 1 and len(allocated) - len(blocks) <= 2


def test_a_batch_is_valid_until_the_next_is_asked_for_and_for_as_long_as_it_is_kept(
    store: Store, allocated: list[tuple[int, int]]
) -> None:
    expected = [one.clone() for one in islice(reader(store, batch=24).batches(0), 300)]
    recent: list[torch.Tensor] = []
    for number, one in enumerate(islice(reader(store, batch=24).batches(0), 300)):
        recent = [*recent, one][-9:]  # of two windows and more, as whoever copies them late would
        for kept, wanted in zip(recent[::-1], expected[number::-1], strict=False):
            assert torch.equal(kept, wanted)
    assert len(allocated) > 4  # what is kept is made up for
    kept_all = list(islice(reader(store, batch=24).batches(0), 300))
    assert all(map(torch.equal, kept_all, expected))


def test_blocks_come_back_when_the_last_view_of_them_is_gone() -> None:
    blocks = Blocks(rows=4, d=8, most=2, pinned=False)
    one, two = blocks.take(), blocks.take()
    assert one is not None and two is not None and blocks.take(needed=False) is None
    first, view = one.data_ptr(), one[1:3].view(torch.uint16).numpy()
    assert first % 4096 == 0
    del one
    assert blocks.take(needed=False) is None
    more = blocks.take()  # in spite of it
    assert more is not None and more.data_ptr() not in (first, two.data_ptr())
    view[:] = 3
    del two
    assert blocks.take(needed=False) is not None


def reading_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("decode", "window"))]


def test_closing_stops_the_threads(store: Store) -> None:
    assert not reading_threads()
    batches = reader(store).batches(0)
    assert not reading_threads()  # nothing before the first batch is asked for
    with closing(batches):
        next(batches)
        assert reading_threads()
    assert not reading_threads()


@pytest.mark.parametrize("how", ["flipped", "crc", "absent", "short"])
def test_damage_to_plain_chunks_is_found(tmp_path: Path, how: str) -> None:
    made = make_store(tmp_path / "n.zarr", numbered(), context=CONTEXT, unit=UNIT, codec="none")
    unit = next(unit for unit in range(made.units) if unit not in held_out_units(made))
    path = Path(made.name) / f"layer_3/c.{unit}.0"
    data, each, index = bytearray(path.read_bytes()), 16 * 4 * 2, 4 * 16 + 4
    if how in ("flipped", "crc"):
        data[each + 4 + (17 if how == "flipped" else each + 1)] ^= 4  # of chunk 1
    else:
        table = np.frombuffer(bytes(data[-index:-4]), "<u8").reshape(4, 2).copy()
        table[1] = 2**64 - 1 if how == "absent" else (table[1, 0], 40)
        data[-index:] = table.tobytes() + google_crc32c.value(table.tobytes()).to_bytes(4, "little")
    path.write_bytes(data)
    stream = reader(made)
    reason = {"absent": "absent", "short": "36 bytes"}.get(how, "crc32c")
    with pytest.raises(StoreError, match=rf"c\.{unit}\.0, chunk 1,.*{reason}"):
        list(islice(stream.batches(0), stream.rows // stream.batch))


# -- to the device ---------------------------------------------------------------------------------


class Late(NamedTuple):
    """A copy that is made as late as it may be."""

    number: int
    host: torch.Tensor
    there: torch.Tensor


class Slow:
    """A stream that copies nothing before somebody waits for it."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.begun = 0
        self._waiting: set[int] = set()

    def begin(self, batch: torch.Tensor) -> Late:
        self.begun += 1
        self.done.append(f"begin {self.begun - 1}")
        self._waiting.add(self.begun - 1)
        return Late(self.begun - 1, batch, torch.full_like(batch, -1))

    def finish(self, copy: Late) -> None:
        self.done.append(f"finish {copy.number}")
        self._wait(copy)

    def hand_over(self, copy: Late) -> torch.Tensor:
        self.done.append(f"hand over {copy.number}")
        self._wait(copy)
        return copy.there

    def _wait(self, copy: Late) -> None:
        if copy.number in self._waiting:
            self._waiting.remove(copy.number)
            copy.there.copy_(copy.host)


class Reused:
    """Batches in one piece of memory, each good until the next is asked for."""

    def __init__(self, failing: int = 10**9) -> None:
        self.asked, self.closed = 0, False
        self._memory, self._failing = torch.empty(2), failing

    def batches(self) -> Iterator[torch.Tensor]:
        try:
            while True:
                self.asked += 1
                if self.asked > self._failing:
                    raise StoreError("no more")
                yield self._memory.fill_(self.asked - 1)
        finally:
            self.closed = True


def always(_: int) -> bool:
    return True


def test_on_the_cpu_batches_pass_through() -> None:
    source = Reused()
    stream = to_device(source.batches(), torch.device("cpu"))
    for number in range(5):
        assert next(stream).tolist() == [number] * 2
        assert source.asked == number + 1  # none ahead
    stream.close()  # type: ignore[attr-defined]
    assert source.closed


def test_copies_keep_their_order_and_are_one_ahead() -> None:
    source, side = Reused(), Slow()
    with closing(one_ahead(source.batches(), side, always)) as stream:
        got = [next(stream) for _ in range(4)]
        assert [one.tolist() for one in got] == [[number] * 2 for number in range(4)]
        assert source.asked == 5
    assert source.closed
    # What a batch lay in is given up when its copy is made, and the next is begun before it is
    # computed on.
    steps = ["begin 0", "finish 0", "begin 1", "hand over 0", "finish 1", "begin 2"]
    steps += ["hand over 1", "finish 2", "begin 3"]
    assert side.done[: len(steps)] == steps


def test_of_what_is_not_there_nothing_is_asked_ahead() -> None:
    source, there = Reused(), 2
    has: Callable[[int], bool] = lambda number: number < there  # noqa: E731
    stream = one_ahead(source.batches(), Slow(), has)
    assert next(stream).tolist() == [0, 0]
    assert source.asked == 2
    assert next(stream).tolist() == [1, 1]
    assert source.asked == 2
    assert next(stream).tolist() == [2, 2]
    there = 9
    assert [next(stream)[0].item() for _ in range(3)] == [3, 4, 5]


def test_an_error_waits_for_its_turn() -> None:
    stream = one_ahead(Reused(failing=3).batches(), Slow(), always)
    assert [next(stream)[0].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreError, match="no more"):
        next(stream)


def test_a_stream_that_ends_ends() -> None:
    copied = one_ahead(islice(Reused().batches(), 3), Slow(), always)
    assert [one[0].item() for one in copied] == [0, 1, 2]


def test_the_reader_through_a_slow_stream(store: Store) -> None:
    expected = [one.clone() for one in islice(reader(store, batch=24).batches(0), 200)]
    with closing(one_ahead(reader(store, batch=24).batches(0), Slow(), always)) as stream:
        assert all(map(torch.equal, islice(stream, 200), expected))
