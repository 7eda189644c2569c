"""A ring: groups in their order, and nothing freed that a run may still need."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.rows import split, summary
from residual_saes.data.rows.follower import Follower
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, held_out, held_out_units
from residual_saes.data.rows.windows import Tuning
from residual_saes.data.store import ring, ring_state
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.ring import Ring
from residual_saes.data.store.ring_state import Registration, RingState
from residual_saes.data.store.store import Store
from residual_saes.data.store.zarr_bfloat16 import to_bits
from tests.conftest import BOS, make_store
from tests.data.test_reader import CONTEXT, EVERYTHING, UNIT, N, numbered, positions

HUGE = 10**12
SPAN = 4  # 15 training units: the last group has 3


def make_ring(
    place: LocalPlace, span: int = SPAN, max_bytes: int = HUGE, gone: int = 0
) -> RingState:
    store = Store.open(place)
    layers = [point.recorded for point in store.points]
    state = RingState(max_bytes, span, layers, held_out_units(store), gone)
    ring_state.write(place, state)
    return state


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ring")
    make_store(folder / "s.zarr", numbered(), context=CONTEXT, unit=UNIT)
    make_ring(LocalPlace(folder / "s.zarr"))
    return folder / "s.zarr"


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    """Complete, and a ring of which nothing is freed."""
    return Store.open(str(shutil.copytree(template, tmp_path / "s.zarr")))


def reader(
    store: Store, policy: Policy = EVERYTHING, batch: int = 16, seed: int = 5, window: int = 5
) -> Reader:
    impatient = Tuning(poll_s=0.01)
    return Reader(
        [Source.of(store, 3)],
        batch=batch,
        seed=seed,
        policy=policy,
        window=window,
        tuning=impatient,
    )


def follower(store: Store, stream: Reader | None = None, name: str = "one") -> Follower:
    return (stream or reader(store)).follower(name, f"runs/{name}")


def training(store: Store) -> list[int]:
    return split.parts(store)[split.TRAINING]


def rows_of(store: Store, units: list[int]) -> int:
    return sum(map(store.rows_of, units))


def served(stream: Reader, rows: int) -> list[int]:
    assert stream.batch == 1
    return [positions(batch)[0] for batch in islice(stream.batches(0), rows)]


class Hidden:
    """A store without some units' records, which come back as a harvest would commit them."""

    def __init__(self, store: Store, units: list[int]) -> None:
        self._texts = {unit: self._record(store, unit).read_bytes() for unit in units}
        self._store = store
        for unit in units:
            self._record(store, unit).unlink()

    @staticmethod
    def _record(store: Store, unit: int) -> Path:
        return Path(store.name) / f"commits/residuals/{unit:08d}.3.json"

    def commit(self, unit: int) -> None:
        record = self._record(self._store, unit)
        beside = record.with_name(f"{record.name}.part")
        beside.write_bytes(self._texts.pop(unit))
        beside.replace(record)  # whole at once, as a commit is: a reader is looking


# -- the order -------------------------------------------------------------------------------------


def test_every_training_row_is_served_once_group_by_group(store: Store) -> None:
    units, rows = training(store), rows_of(store, training(store))
    order = served(reader(store, batch=1), rows)
    assert len(set(order)) == rows
    for group in range(0, len(units), SPAN):
        here = units[group : group + SPAN]
        part = order[group * UNIT : (group + len(here)) * UNIT]
        assert set(part) == {unit * UNIT + at for unit in here for at in range(store.rows_of(unit))}
    first = [position // UNIT for position in order[: 5 * CONTEXT]]
    assert len(set(first)) > 1  # and inside a group they are mixed


def test_batches_are_the_same_from_every_start(store: Store) -> None:
    stream = reader(store)
    count = rows_of(store, training(store)) // stream.batch
    batches = list(islice(stream.batches(0), count))
    for start in range(count):
        again = list(islice(reader(store).batches(start), min(3, count - start)))
        assert all(map(torch.equal, again, batches[start : start + 3]))


def test_a_ring_of_one_group_is_the_plain_order(store: Store) -> None:
    place = LocalPlace(Path(store.name))
    rows = rows_of(store, training(store))
    make_ring(place, span=1000)
    one = reader(store, batch=1)
    (place.path / ring_state.KEY).unlink()
    plain = reader(store, batch=1)
    assert served(one, rows) == served(plain, rows)
    assert (one.rows, one.mean_norms) == (plain.rows, plain.mean_norms)
    np.testing.assert_array_equal(one.variance, plain.variance)


def test_the_statistics_are_those_of_the_first_group(store: Store) -> None:
    tokens = np.concatenate([store.tokens(unit).ravel() for unit in range(store.units)])
    first = [unit * UNIT + at for unit in training(store)[:SPAN] for at in range(UNIT)]
    rows = (
        torch.from_numpy(numbered()[[at for at in first if tokens[at] != BOS]])
        .view(torch.bfloat16)
        .double()
    )
    stream = reader(store, Policy())
    np.testing.assert_allclose(stream.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stream.variance, rows.var(0, correction=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stream.mean_norms[0], rows.norm(dim=1).mean(), rtol=1e-6)


def test_reading_follows_the_commits(store: Store) -> None:
    whole = list(islice(reader(store).batches(0), rows_of(store, training(store)) // 16))
    later = training(store)[SPAN:]
    hidden = Hidden(store, later)
    stream = reader(Store.open(store.name))
    batches, got = stream.batches(0), []
    for number in range(len(whole)):
        while not stream.has(number):
            hidden.commit(later.pop(0))
        got.append(next(batches))
    assert not later
    assert all(map(torch.equal, got, whole))


def test_rows_that_are_not_there_are_an_error_and_come_when_they_are(store: Store) -> None:
    later = training(store)[SPAN:]
    hidden = Hidden(store, later)
    batches = reader(Store.open(store.name)).batches(0)
    assert len(list(islice(batches, SPAN * UNIT // 16))) == SPAN * UNIT // 16
    with pytest.raises(StoreError, match="python -m harvest"):
        next(batches)
    for unit in later:
        hidden.commit(unit)
    assert next(reader(Store.open(store.name)).batches(SPAN * UNIT // 16)).shape == (16, 4)


def test_a_run_waits_for_its_first_group_and_for_what_is_held_out(store: Store) -> None:
    needed = [*held_out_units(store), training(store)[SPAN - 1]]
    hidden = Hidden(store, [*needed, *training(store)[SPAN:]])
    opened = Store.open(store.name)

    def harvest() -> None:
        for unit in needed:
            time.sleep(0.05)
            hidden.commit(unit)

    beside = threading.Thread(target=harvest)
    beside.start()
    stream = reader(opened)
    beside.join()
    assert stream.has(0)
    assert len(list(held_out([Source.of(opened, 3)], EVERYTHING, 64))) == len(held_out_units(store))


def test_a_signal_ends_the_waiting(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    Hidden(store, training(store)[SPAN:])
    opened = Store.open(store.name)
    waiting = follower(opened)
    with StopRequest() as stop:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        waiting.wait(SPAN * UNIT // 16, stop)
        assert stop.signum == signal.SIGTERM
    told = capsys.readouterr().err
    assert "5 of 16" in told and "batch 16" in told


# -- how many rows there are -----------------------------------------------------------------------


def spoilt(path: Path, outliers: range) -> Store:
    bits = numbered()
    bits[list(outliers)] = to_bits(np.full(4, 9000, np.float32))
    made = make_store(path, bits, context=CONTEXT, unit=UNIT)
    make_ring(LocalPlace(path))
    return made


def test_rows_are_counted_before_they_are_there(tmp_path: Path, store: Store) -> None:
    groups, pieces = training(store), store.ledger.pieces
    exact = {
        drop: sum(store.rows_of(unit) - drop * int(pieces[unit]) for unit in groups)
        for drop in (True, False)
    }
    for drop in (True, False):
        stream = reader(store, Policy(drop_bos=drop, drop_outliers=True))
        later = exact[drop] - sum(UNIT - drop * int(pieces[unit]) for unit in groups[:SPAN])
        assert (
            stream.rows == exact[drop] - later // 1000 - stream.batch
        )  # nothing was lost in the first group
    unit = groups[1]
    some = spoilt(tmp_path / "o.zarr", range(unit * UNIT, unit * UNIT + 8))
    stream, ahead = reader(some, Policy(drop_bos=False)), rows_of(store, groups[SPAN:])
    lost = int((store.tokens(unit).ravel()[:8] != BOS).sum())  # a long BOS is a BOS
    assert 4 < lost <= 8
    assert stream.rows == exact[False] - lost - (
        2 * lost * ahead // (SPAN * UNIT) + ahead // 1000 + stream.batch
    )
    list(islice(stream.batches(0), stream.rows // stream.batch))


def test_a_stream_that_gives_out_says_so(tmp_path: Path) -> None:
    made = spoilt(tmp_path / "o.zarr", range(11 * UNIT + 1, 14 * UNIT, 4))
    stream = reader(made, Policy(drop_bos=False))
    with pytest.raises(StoreError, match=rf"{stream.rows:,}.*tokens=\d+"):
        list(islice(stream.batches(0), stream.rows // stream.batch))


def test_more_than_a_pass_and_too_large_a_batch_are_refused(store: Store) -> None:
    stream = reader(store)
    follower(store, stream).require(stream.rows)
    with pytest.raises(SettingError, match=rf"tokens={stream.rows + 1} .*{stream.rows}\b"):
        follower(store, stream).require(stream.rows + 1)
    with pytest.raises(
        SettingError,
        match=f"batch={SPAN * UNIT + 1} .*max_bytes=",
    ):
        reader(store, batch=SPAN * UNIT + 1)
    with pytest.raises(StoreError, match=r"layer 4 .*layer 3"):
        Reader([Source.of(store, 4)], batch=1, seed=0, policy=EVERYTHING)


# -- freeing ---------------------------------------------------------------------------------------


def harvester(store: Store, readers: int = 1) -> Ring:
    """The ring as a second harvest sees it. Its claims last to the end of the test."""
    room = ring.join(store, store.points, store.place.claims(), None, readers)
    assert isinstance(room, Ring)
    return room


def shards(store: Store) -> set[int]:
    return {int(path.name.split(".")[1]) for path in (Path(store.name) / "layer_3").glob("c.*")}


def test_what_all_readers_have_passed_is_freed_and_no_more(store: Store) -> None:
    units, everything = training(store), set(range(store.units))
    making = harvester(store, readers=2)
    first, second = (follower(store, name=name) for name in ("one", "two"))
    making.free()
    assert shards(store) == everything
    first.begin(0)
    first.release(9 * UNIT // 16)  # in the third group
    making.free()
    assert shards(store) == everything  # readers=2
    second.begin(0)
    second.release(5 * UNIT // 16)
    making.free()
    assert shards(store) == everything - set(units[:SPAN])
    assert ring_state.read(store.place).freed == SPAN
    second.finish()
    first.release(0)  # a step back says nothing
    making.free()
    assert shards(store) == everything - set(units[: 2 * SPAN])
    first.finish()
    making.free()
    assert shards(store) == set(held_out_units(store))


def test_a_run_that_stands_still_holds_others_up_once_the_ring_is_full(store: Store) -> None:
    chunk = store.manifest["chunk"]
    most = ring_state.unit_bytes(UNIT, chunk, store.d_model, points=1)
    place = LocalPlace(Path(store.name))
    make_ring(place, max_bytes=(len(held_out_units(store)) + 3 * SPAN) * most)
    Hidden(store, training(store)[3 * SPAN :])
    opened = Store.open(store.name)
    going, standing = (follower(opened, name=name) for name in ("one", "two"))
    last = 3 * SPAN * UNIT // 16  # the first batch of the fourth group
    assert going.held_up_by(standing, last) is None  # it is not registered
    standing.begin(0)
    way_out = going.held_up_by(standing, last)
    assert way_out is not None and f"{ring_state.REGISTRATIONS}/two.json" in way_out
    assert going.held_up_by(standing, last - 1) is None  # it is there
    standing.release(SPAN * UNIT // 16)
    assert going.held_up_by(standing, last) is None  # there is room for it


def test_what_is_freed_is_said_where_it_is_asked_for(store: Store) -> None:
    Path(store.name, "layer_3").mkdir(exist_ok=True)
    stream = reader(store)
    follower(store, stream).finish()
    harvester(store).free()
    again = Store.open(store.name)
    assert again.complete(3) and not list(damage(again.place))
    with pytest.raises(StoreError, match=r"layer_3/c\.\d+\.0 .*max_bytes="):
        again.residuals(3, training(store)[0])
    with pytest.raises(StoreError, match=r"layer_3/c\.\d+\.0 .*max_bytes="):
        next(reader(again).batches(0))
    assert sum(map(len, held_out([Source.of(again, 3)], EVERYTHING, 50))) == rows_of(
        store, held_out_units(store)
    )
    assert summary.read(again, 3).counts.sum() == N  # statistics of all units stay
    norms = Path(store.name, f"norm_3/c.{training(store)[0]}")
    norms.unlink()
    with pytest.raises(StoreError, match=r"norm_3/c\.\d+ .*action=repair"):
        Store.open(store.name)


@pytest.mark.parametrize("what", ["behind the watermark", "held out"])
def test_nothing_else_may_be_absent(store: Store, what: str) -> None:
    make_ring(LocalPlace(Path(store.name)), gone=15 if what == "held out" else 3)
    unit = held_out_units(store)[0] if what == "held out" else training(store)[3]
    Path(store.name, f"layer_3/c.{training(store)[2]}.0").unlink()
    Store.open(store.name)
    Path(store.name, f"layer_3/c.{unit}.0").unlink()
    with pytest.raises(StoreError, match=rf"layer_3/c\.{unit}\.0 .*action=repair"):
        Store.open(store.name)


def test_the_watermark_is_durable_before_the_first_object_goes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower(store).finish()
    making = harvester(store)

    def dying(self: LocalPlace, key: str) -> None:
        raise InterruptedError(key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPlace, "delete", dying)
        with pytest.raises(InterruptedError):
            making.free()
    assert ring_state.read(store.place).freed == len(training(store))
    assert shards(store) == set(range(store.units))
    making.sweep()
    assert shards(store) == set(held_out_units(store))


def test_a_run_that_comes_too_late_is_refused(store: Store) -> None:
    early = follower(store, name="early")
    early.begin(0)
    early.release(9 * UNIT // 16)
    harvester(store).free()
    late = follower(store, name="late")
    with pytest.raises(
        StoreError,
        match=r"runs/late .*4 to 7 .*store=",
    ):
        late.begin(7 * UNIT // 16)
    late.begin(8 * UNIT // 16)  # a run that was moved, with a checkpoint behind them
    assert ring_state.registrations(store.place)["late"] == Registration("runs/late", 3, SPAN, 8)


def test_no_run_registers_for_what_is_being_freed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registrations and freeing from several processes at once; each looks long before it acts."""
    read = ring_state.read

    def slowly(place: LocalPlace) -> RingState | None:
        found = read(place)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(ring_state, "read", slowly)

    def register(name: str) -> None:
        rng = random.Random(name)
        for _ in range(8):
            time.sleep(rng.uniform(0, 0.05))  # meanwhile some units go
            passed = read(store.place).freed  # the least that may still be there
            try:
                ring_state.register(store.place, name, Registration(name, 3, 1, passed), passed)
            except StoreError:
                continue
            time.sleep(0.04)
            freed = read(store.place).freed
            ring_state.advance(
                store.place, name, Registration(name, 3, 1, 15)
            )  # in any case, so that the harvest comes to its end
            assert freed <= passed

    def harvest() -> None:
        making = harvester(store)
        while making.state.freed < 15:
            ring_state.write_registration(
                store.place, "driver", Registration("driver", 3, 1, making.state.freed + 1)
            )
            making.free()

    ring_state.advance(store.place, "driver", Registration("driver", 3, 1, 0))
    children = [
        in_child(harvest),
        *(in_child(lambda name=f"r{n}": register(name)) for n in range(2)),
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3
    assert len(ring_state.registrations(store.place)) > 1  # one came in time


def in_child(body: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        body()
        code = 0
    finally:
        os._exit(code)


def test_every_flipped_bit_of_what_a_ring_is_freed_by_is_found(store: Store) -> None:
    """The record has a copy, and of a run whose record is damaged everything is kept."""
    follower(store).begin(9 * UNIT // 16)
    state, runs = ring_state.read(store.place), ring_state.registrations(store.place)
    [key] = [f"{ring_state.REGISTRATIONS}/{name}.json" for name in runs]
    for name in (ring_state.KEY, ring_state.COPY, key):
        path = Path(store.name, name)
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            assert ring_state.read(store.place) == state
            [run] = ring_state.registrations(store.place).values()
            assert run.passed == (0 if name == key else 8)
        assert [found for found, _ in damage(store.place)] == [name]
        assert repair(store.place) == [name]
        assert path.read_bytes() == whole or name == key
        assert not list(damage(store.place))
        assert [run.passed for run in ring_state.registrations(store.place).values()] == [
            0 if name == key else 8
        ]


def test_a_ring_that_says_nothing_is_not_repaired_away(store: Store) -> None:
    for key in (ring_state.KEY, ring_state.COPY):
        path = Path(store.name, key)
        path.write_bytes(path.read_bytes().replace(b'"freed":0', b'"freed":9'))
    for refused in (lambda: reader(store), lambda: repair(store.place)):
        with pytest.raises(StoreError, match=ring_state.KEY):
            refused()
    ring_state.write(store.place, RingState(1, 2, [3], [0], 4))
    assert ring_state.read(store.place) == RingState(1, 2, [3], [0], 4)
