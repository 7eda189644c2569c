"""The room of a ring: never more than it has, and nothing that waits for ever."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import held_out_units
from residual_saes.data.store import ring, ring_state
from residual_saes.data.store.leases import Leases
from residual_saes.data.store.retention import KeepAll
from residual_saes.data.store.ring import Ring
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.store.zarr_bfloat16 import to_bits
from residual_saes.data.text.packing import Cursor
from tests.conftest import commit, make_manifest, make_spine, make_store
from tests.data.test_reader import CONTEXT, EVERYTHING, UNIT, numbered
from tests.data.test_ring import HUGE, training

LAYERS, D = (1, 3), 4
EACH = ring_state.unit_bytes(UNIT, 16, D, len(LAYERS))


def spine_only(path: Path, units: int) -> Store:
    manifest = make_manifest(D, tokens=units * UNIT, context=CONTEXT, unit=UNIT, chunk=16)
    store = Store.open_or_create(str(path), manifest)
    tokens, document = make_spine(units * UNIT // CONTEXT, CONTEXT, np.random.default_rng(0))
    rows = UNIT // CONTEXT
    for at in range(0, len(tokens), rows):
        store.commit_spine(
            at // rows, tokens[at : at + rows], document[at : at + rows], Cursor(at, 0, None)
        )
    store.close_spine(SpineEnd(len(tokens), ended_early=False))
    return store


def on_disk(store: Store) -> int:
    return sum(
        file.stat().st_size
        for layer in LAYERS
        for file in Path(store.name, f"layer_{layer}").glob("c.*")
    )


def joined(store: Store, max_bytes: int | None = None, readers: int = 1) -> Ring:
    """The ring as a harvest sees it. Its claims last to the end of the test."""
    room = ring.join(store, LAYERS, store.place.claims(), max_bytes, readers)
    assert isinstance(room, Ring)
    return room


class Rank:
    """A harvesting process that takes a unit at one moment and commits it at a later one."""

    def __init__(self, store: Store, readers: int) -> None:
        self.store = Store.open(store.name)
        self.ring = joined(self.store, readers=readers)
        self.hand = -1  # the unit that it is making

    def go_on(self, claimed: set[int]) -> bool:
        if self.hand >= 0:
            bits = to_bits(
                np.random.default_rng(self.hand).normal(size=(UNIT, D)).astype(np.float32)
            )
            commit(self.store, self.hand, dict.fromkeys(LAYERS, bits))
            claimed.discard(self.hand)
            self.hand = -1
            return True
        self.store.refresh()
        for unit, _ in self.ring.ordered(self.store.missing(LAYERS)):
            if not self.ring.admits(unit):
                break
            if unit not in claimed:
                self.ring.clear(unit)
                self.hand = unit
                claimed.add(unit)
                return True
        return False


class Run:
    """A training run with two checkpoints, saved in every round that it enters and now and then."""

    def __init__(self, store: Store, layers: Sequence[int], batch: int, window: int) -> None:
        self.store = Store.open(store.name)
        sources = [Source.of(self.store, layer) for layer in layers]
        self.stream = Reader(
            sources, batch=batch, seed=len(layers), policy=EVERYTHING, window=window
        )
        name = "_".join(map(str, layers))
        self.follower = self.stream.follower(f"run{name}", f"runs/{name}")
        self.step = 0
        self.steps = self.stream.rows // batch
        self.kept = deque([0, 0], maxlen=2)
        self.follower.begin(0)
        self.batches = self.stream.batches(0)

    def go_on(self) -> bool:
        if self.step == self.steps:
            self.follower.finish()
            return False
        if not self.stream.has(self.step):
            return False
        next(self.batches)
        self.step += 1
        if (
            self.follower.round(self.step) != self.follower.round(self.step - 1)
            or self.step % 7 == 0
        ):
            self.kept.append(self.step)
            self.follower.release(self.kept[0])
        return True


@pytest.mark.parametrize(
    ("batch", "seed"),
    [
        (50, 0),
        (64, 1),  # a whole group of the smallest ring
        *(pytest.param(*more, marks=pytest.mark.long) for more in ((16, 0), (16, 1), (50, 1))),
        pytest.param(64, 0, marks=pytest.mark.long),
    ],
)
def test_the_smallest_ring_never_stands_still(tmp_path: Path, batch: int, seed: int) -> None:
    """Two ranks and two runs go on, at whatever pace: on a layer each, or one of them on both."""
    store, rng = spine_only(tmp_path / "s.zarr", 20), random.Random(seed)
    held = held_out_units(store)
    least = (len(held) + ring_state.GROUPS) * EACH
    with pytest.raises(SettingError, match=rf"max_bytes={least}"):
        joined(store, least - 1, 2)
    joined(store, least, 2)
    ranks, claimed = [Rank(store, 2) for _ in range(2)], set[int]()
    while any(rank.go_on(claimed) for rank in ranks):
        pass
    assert on_disk(store) <= least
    reads = [LAYERS[:1], LAYERS if seed else LAYERS[1:]]
    runs = [Run(store, layers, batch, window=3) for layers in reads]
    peak, moves = 0, 0
    while any(run.step < run.steps for run in runs):
        everybody: list[Callable[[], bool]] = [lambda r=rank: r.go_on(claimed) for rank in ranks]
        everybody += [run.go_on for run in runs]
        chosen = everybody[rng.randrange(4)]
        for _ in range(rng.randrange(1, 30)):
            chosen()
            peak = max(peak, on_disk(store))
        rng.shuffle(everybody)
        moved = [move() for move in everybody]
        assert any(moved) or all(run.step == run.steps for run in runs), "all wait for each other"
        peak, moves = max(peak, on_disk(store)), moves + 1
    while any(rank.go_on(claimed) for rank in ranks):
        pass
    store.refresh()
    assert store.complete(LAYERS[0]) and store.complete(LAYERS[1])
    assert least // 2 < peak <= least


def test_the_span_is_a_third_of_the_ring_and_stays(tmp_path: Path) -> None:
    store = spine_only(tmp_path / "s.zarr", 40)
    held = len(held_out_units(store))
    first = joined(store, (held + 3 * 5 + 2) * EACH).state
    assert first.span == 5
    larger = joined(store, 30 * EACH).state
    assert larger == first._replace(max_bytes=30 * EACH)
    assert joined(store).state == larger
    with pytest.raises(SettingError, match=f"max_bytes={(held + 15) * EACH}"):
        joined(store, (held + 15) * EACH - 1)
    with pytest.raises(StoreError, match="layer 1, layer 3"):
        ring.join(store, [1], store.place.claims(), None, 1)


def test_rings_need_locks_and_a_store_of_their_own(tmp_path: Path) -> None:
    whole = make_store(tmp_path / "w.zarr", numbered(), context=CONTEXT, unit=UNIT)
    claims = whole.place.claims()
    # There is nothing to make any more.
    assert isinstance(ring.join(whole, [3], claims, 1, 1), KeepAll)
    assert isinstance(ring.join(whole, [3], claims, None, 1), KeepAll)
    with pytest.raises(StoreError, match="has layer 3"):
        ring.join(whole, [5], claims, HUGE, 1)
    spine = spine_only(tmp_path / "s.zarr", 20)
    with pytest.raises(SettingError, match="max_bytes="):
        ring.join(spine, LAYERS, Leases(spine.place), HUGE, 1)
    assert not Path(tmp_path / "s.zarr" / ring_state.KEY).exists()


def test_what_a_killed_harvest_left_is_neither_counted_twice_nor_kept(tmp_path: Path) -> None:
    store = spine_only(tmp_path / "s.zarr", 20)
    held = held_out_units(store)
    making = joined(store, (len(held) + ring_state.GROUPS) * EACH)
    bits = dict.fromkeys(LAYERS, to_bits(np.ones((UNIT, D), np.float32)))
    for unit in [*held, *training(store)[:2]]:
        commit(store, unit, bits)
    third = training(store)[2]
    orphan = Path(store.name, f"layer_1/c.{third}.0")
    orphan.write_bytes(bytes(EACH))
    assert making.admits(third)
    making.clear(third)
    assert not orphan.exists()
    commit(store, third, bits)
    assert not making.admits(training(store)[16])
    name, reason = making.waits_for()
    assert name == "" and "readers=1" in reason
