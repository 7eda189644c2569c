"""Batches: every kept row once a pass, the same from every start, never a held-out one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, held_out, held_out_units
from residual_saes.data.rows.windows import TUNING, Tuning
from residual_saes.data.store.store import Store
from residual_saes.data.store.zarr_bfloat16 import to_bits
from tests.conftest import BOS, make_store

EVERYTHING = Policy(drop_bos=False, drop_outliers=False)
N, CONTEXT, UNIT = 1008, 16, 64


def numbered(n: int = N) -> NDArray[np.uint16]:
    """(n, 4) rows that hold their spine position: three base-100 digits and a constant."""
    position = np.arange(n)
    digits = np.stack(
        [position // 10_000, position // 100 % 100, position % 100, np.full(n, 50)], axis=1
    )
    return to_bits(digits.astype(np.float32) + 1)


def positions(rows: torch.Tensor) -> list[int]:
    digits = rows.float().numpy() - 1
    return (digits[:, 0] * 10_000 + digits[:, 1] * 100 + digits[:, 2]).astype(int).tolist()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "s.zarr", numbered(), context=CONTEXT, unit=UNIT)


def reader(
    store: Store,
    policy: Policy = EVERYTHING,
    batch: int = 32,
    window: int = 7,
    seed: int = 5,
    tuning: Tuning = TUNING,
) -> Reader:
    return Reader(
        [Source.of(store, 3)], batch=batch, seed=seed, policy=policy, window=window, tuning=tuning
    )


def trained(store: Store) -> set[int]:
    held = set(held_out_units(store))
    return {position for position in range(N) if position // UNIT not in held}


def test_one_pass_serves_every_training_row_once(store: Store) -> None:
    stream = reader(store, batch=1)
    served = [positions(batch)[0] for batch in islice(stream.batches(0), stream.rows)]
    assert stream.rows == len(served) == len(trained(store))
    assert set(served) == trained(store)


def test_the_next_pass_has_another_order(store: Store) -> None:
    stream = reader(store, batch=1)
    both = [positions(batch)[0] for batch in islice(stream.batches(0), 2 * stream.rows)]
    first, second = both[: stream.rows], both[stream.rows :]
    assert sorted(first) == sorted(second)
    assert first != second


def test_batches_are_the_same_from_every_start(store: Store) -> None:
    stream = reader(store)
    count = (
        3 * stream.rows // stream.batch
    )  # three passes: starts in every window, batches across passes
    batches = list(islice(stream.batches(0), count))
    for start in range(count):
        assert torch.equal(next(reader(store).batches(start)), batches[start])


def test_seeds_give_orders(store: Store) -> None:
    one, same, other = (next(reader(store, seed=seed).batches(0)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_held_out_rows_are_never_trained_on_and_all_evaluated(store: Store) -> None:
    runs = list(held_out([Source.of(store, 3)], EVERYTHING, batch=10))
    found = [position for run in runs for position in positions(run)]
    assert found == [int(i) for unit in held_out_units(store) for i in store.token_index(unit)]
    assert set(found) == set(range(N)) - trained(store)
    assert len(found) == len(set(found))
    assert max(len(run) for run in runs) == 10


def test_bos_rows_are_dropped_and_the_statistics_follow(store: Store) -> None:
    tokens = np.concatenate([store.tokens(unit).ravel() for unit in range(store.units)])
    wanted = {position for position in trained(store) if tokens[position] != BOS}
    stream = reader(store, Policy(drop_bos=True, drop_outliers=False), batch=1)
    served = {positions(batch)[0] for batch in islice(stream.batches(0), stream.rows)}
    assert served == wanted
    rows = torch.from_numpy(numbered()[sorted(wanted)]).view(torch.bfloat16).double()
    np.testing.assert_allclose(stream.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stream.variance, rows.var(0, correction=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stream.mean_norms[0], rows.norm(dim=1).mean(), rtol=1e-6)


def test_outliers_and_non_finite_rows_are_dropped(tmp_path: Path) -> None:
    bits = numbered()
    bits[200], bits[201, 2], bits[202, 1] = to_bits(np.full(4, 5000, np.float32)), 0x7FC0, 0x7F80
    store = make_store(tmp_path / "o.zarr", bits, context=CONTEXT, unit=UNIT)
    stream = reader(store, Policy(drop_bos=False), batch=1)
    served = {positions(batch)[0] for batch in islice(stream.batches(0), stream.rows)}
    assert 200 // UNIT not in held_out_units(store)  # else this would test nothing
    assert served == trained(store) - {200, 201, 202}
    loose = reader(store, EVERYTHING, batch=1)
    assert loose.rows == stream.rows + 1  # the finite outlier
    for each in (stream, loose):  # the statistics are those of the very rows that are served
        rows = torch.cat(list(islice(each.batches(0), each.rows))).double()
        np.testing.assert_allclose(each.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(each.variance, rows.var(0, correction=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(each.mean_norms[0], rows.norm(dim=1).mean(), rtol=1e-6)


def test_a_ragged_last_unit_is_served_whole(tmp_path: Path) -> None:
    store = make_store(tmp_path / "r.zarr", numbered(N - 48), context=CONTEXT, unit=UNIT, chunk=32)
    stream = reader(store, batch=1)
    served = [positions(batch)[0] for batch in islice(stream.batches(0), stream.rows)]
    assert sorted(served) == sorted(trained(store) & set(range(N - 48)))


def test_windows_mix_units(store: Store) -> None:
    batch = next(reader(store, window=32).batches(0))
    assert len({position // UNIT for position in positions(batch)}) > 6


def test_bad_settings_and_stores_are_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(SettingError, match="batch=0"):
        reader(store, batch=0)
    with pytest.raises(StoreError, match=r"layer 4 .*layer 3"):
        Reader([Source.of(store, 4)], batch=1, seed=0, policy=EVERYTHING)
    single = make_store(tmp_path / "one.zarr", numbered(64), context=CONTEXT, unit=UNIT)
    with pytest.raises(StoreError, match=r"64.*unit="):
        reader(single)
    (Path(store.name) / "commits" / "residuals" / "00000001.3.json").unlink()
    with pytest.raises(StoreError, match="1 of 16"):
        reader(Store.open(store.name))


def test_damage_stops_the_reader(store: Store) -> None:
    unit = next(unit for unit in range(store.units) if unit not in held_out_units(store))
    path = Path(store.name) / f"layer_3/c.{unit}.0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    stream = reader(store)
    with pytest.raises(StoreError, match=rf"c\.{unit}\.0, chunk 0,.*crc32c"):
        list(islice(stream.batches(0), stream.rows // stream.batch))


# -- the order, said once more and plainly ---------------------------------------------------------


def in_order(store: Store, policy: Policy, window: int, seed: int) -> Iterator[NDArray[np.uint16]]:
    """The stream's rows, one by one, by its definition.

    Chunks are shuffled, `window` of them are gathered, and their kept rows are shuffled.
    """
    chunk, held = store.manifest["chunk"], held_out_units(store)
    found = []
    for unit in range(store.units):
        rows, kept = store.residuals(3, unit), np.isin(store.kinds(3, unit), policy.kinds)
        parts = [rows[at : at + chunk][kept[at : at + chunk]] for at in range(0, len(rows), chunk)]
        found += [part for part in parts if len(part) and unit not in held]
    for number in count():
        shuffled = [found[at] for at in order.permutation(len(found), seed, number)]
        for at in range(0, len(shuffled), window):
            rows = np.concatenate(shuffled[at : at + window])
            yield from rows[order.permutation(len(rows), seed, number, at // window)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Both lossless codecs, inner chunks of several sizes, ragged ends, rows that are dropped."""
    folder, bits = tmp_path_factory.mktemp("several"), numbered(1264)
    bits[::97], bits[50::501] = to_bits(np.full(4, 9000, np.float32)), 0x7FC0
    return [
        make_store(folder / "none", bits, unit=128, chunk=64, codec="none"),
        make_store(folder / "blosc", bits[:1008], unit=64, chunk=16),
        make_store(folder / "ragged", bits[: 1264 - 48], unit=64, chunk=32, codec="none"),
    ]


@given(
    which=st.integers(0, 2),
    policy=st.builds(Policy, st.booleans(), st.booleans()),
    batch=st.integers(1, 200),
    window=st.integers(1, 40),
    start=st.integers(0, 3000),
    threads=st.integers(1, 5),
    ahead=st.integers(1, 3),
    block=st.integers(1, 700),
    kept=st.booleans(),
)
@settings(max_examples=60)
def test_the_order_is_a_function_of_seed_and_step(
    several: list[Store],
    which: int,
    policy: Policy,
    batch: int,
    window: int,
    start: int,
    threads: int,
    ahead: int,
    block: int,
    kept: bool,
) -> None:
    """The number of threads, the blocks, the start and kept batches change nothing."""
    store = several[which]
    start = start // batch
    stream = reader(store, policy, batch, window, tuning=Tuning(threads, ahead, block))
    with closing(stream.batches(start)) as batches:
        got = [batch if kept else batch.clone() for batch in islice(batches, 8)]
    expected = np.stack(
        list(islice(in_order(store, policy, window, 5), start * batch, (start + 8) * batch))
    )
    np.testing.assert_array_equal(torch.cat(got).view(torch.uint16).numpy(), expected)


def test_the_order_is_that_of_every_version(several: list[Store]) -> None:
    """Digests of the reader as it was before rows went straight to their places."""
    digest = hashlib.sha256()
    for store in several:
        for batch in islice(reader(store, Policy(), batch=33).batches(2), 90):
            digest.update(batch.view(torch.uint16).numpy().tobytes())
    assert digest.hexdigest() == "88ca190e304487f7d472fe20ff063143efc36ac9d56275dd6b141b20e258ec73"


def test_two_readers_of_one_store_do_not_disturb_each_other(store: Store) -> None:
    one, other = reader(store, seed=1), reader(store, seed=2)
    apart = [[batch.clone() for batch in islice(each.batches(0), 60)] for each in (one, other)]
    side_by_side = list(zip(islice(one.batches(0), 60), islice(other.batches(0), 60), strict=True))
    assert all(map(torch.equal, apart[0], (a for a, _ in side_by_side)))
    assert all(map(torch.equal, apart[1], (b for _, b in side_by_side)))
