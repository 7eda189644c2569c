"""What a reader is served is what was committed, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from residual_saes.data.errors import MismatchError, StoreError
from residual_saes.data.site import HookPoint
from residual_saes.data.store import records
from residual_saes.data.store.kinds import kinds_of
from residual_saes.data.store.moments import merge_all
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.store import Store
from residual_saes.data.store.zarr_bfloat16 import to_float32
from residual_saes.data.text.packing import Cursor
from tests.conftest import BOS, commit, make_manifest, make_store


@pytest.fixture
def store(tmp_path: Path, random_bits: NDArray[np.uint16]) -> Store:
    return make_store(tmp_path / "s.zarr", random_bits)


def test_moments_are_those_of_the_chosen_rows(
    store: Store, random_bits: NDArray[np.uint16]
) -> None:
    rows = to_float32(random_bits).astype(np.float64)
    tokens = np.concatenate([store.tokens(unit).ravel() for unit in range(store.units)])
    every = list(range(store.units))
    for kinds, chosen in (
        ((0, 1, 2), rows),
        ((1, 2), rows[tokens != BOS]),
        ((0,), rows[tokens == BOS]),
    ):
        moments = merge_all(
            [unit[kind] for unit in store.unit_moments(3, every) for kind in kinds], 24
        )
        assert moments.count == len(chosen)
        np.testing.assert_allclose(moments.mean, chosen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, chosen.var(0), rtol=1e-12)


def test_non_finite_rows_are_counted_and_kept_out_of_the_moments(
    tmp_path: Path, random_bits: NDArray[np.uint16]
) -> None:
    bits = random_bits.copy()
    bits[[3, 70, 71], 5] = [0x7FC0, 0x7F80, 0xFF80]  # NaN, inf, -inf
    store = make_store(tmp_path / "n.zarr", bits)
    assert store.non_finite(3) == 3
    moments = merge_all(
        [part for unit in store.unit_moments(3, range(store.units)) for part in unit], 24
    )
    assert moments.count == len(bits) - 3
    assert np.isfinite(moments.variance).all()


def test_a_changed_setting_is_refused_with_both_values(store: Store) -> None:
    with pytest.raises(MismatchError, match=r"tokens.*1008.*2000"):
        Store.open_or_create(store.name, {**store.manifest, "tokens": 2000})


def test_a_store_without_a_commit_takes_new_settings(tmp_path: Path) -> None:
    manifest = make_manifest(4, tokens=64, context=16, unit=64, chunk=16)
    Store.open_or_create(tmp_path / "s.zarr", manifest)
    Store.open_or_create(tmp_path / "s.zarr", {**manifest, "tokens": 128})
    assert Store.open(tmp_path / "s.zarr").manifest["tokens"] == 128


def test_other_folders_are_no_stores(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"/none.*python -m harvest"):
        Store.open(tmp_path / "none")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    manifest = make_manifest(4, tokens=64, context=16, unit=64, chunk=16)
    with pytest.raises(StoreError, match=r"letters.*store="):
        Store.open_or_create(tmp_path / "letters", manifest)
    assert sorted(file.name for file in (tmp_path / "letters").iterdir()) == ["a.txt"]
    with pytest.raises(StoreError, match=r"/letters.*python -m harvest"):
        Store.open(tmp_path / "letters")


def test_a_unit_without_a_record_does_not_exist(store: Store) -> None:
    record = Path(store.name) / "commits" / "residuals" / "00000004.3.json"
    record.unlink()
    again = Store.open(store.name)
    assert again.missing([3]) == {4: [HookPoint(3)]}
    assert not again.complete(3)
    with pytest.raises(StoreError, match="unit 4 of layer 3"):
        again.residuals(3, 4)  # its file is still there, whole


def test_a_unit_that_is_committed_meanwhile_is_not_missing_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harvest's writer commits beside the thread that asks what is missing."""
    (Path(store.name) / "commits/residuals/00000004.3.json").unlink()
    again = Store.open(store.name)
    bits = store.residuals(3, 4)
    rows = np.empty_like(bits)
    rows[store.permutation(4)] = bits
    found = np.flatnonzero

    def commits(values: NDArray[np.bool_]) -> NDArray[np.int64]:
        units = found(values)
        monkeypatch.setattr(np, "flatnonzero", found)
        commit(again, 4, {3: rows})
        return units

    monkeypatch.setattr(np, "flatnonzero", commits)
    assert again.missing([3]) == {4: [HookPoint(3)]}
    assert not again.missing([3])


@pytest.mark.parametrize(
    "name",
    ["layer_3/c.2.0", "norm_3/c.2", "token_index/c.2", "moments_3/c.2.0.0.0", "tokens/c.2.0"],
)
def test_a_cut_object_is_noticed_on_open(store: Store, name: str) -> None:
    path = Path(store.name) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="action=repair"):
        Store.open(store.name)
    path.unlink()
    with pytest.raises(StoreError, match=name):
        Store.open(store.name)


@pytest.mark.parametrize(
    "name",
    [
        "layer_3/c.2.0",
        "norm_3/c.2",
        "tokens/c.2.0",
        "token_index/c.2",
        "commits/residuals/00000002.3.json",
    ],
)
def test_repair_drops_the_damaged_unit_alone(store: Store, name: str) -> None:
    assert not list(damage(store.place))
    path = Path(store.name) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    dropped = repair(store.place)
    assert [key.rpartition("/")[2][:8] for key in dropped] == ["00000002"]
    again = Store.open(store.name)
    if name.startswith("token"):
        assert again.spine_cursor()[0] == 2
        assert not again.spine_complete
    else:
        assert list(again.missing([3])) == [2]


def test_swapped_objects_are_found_by_their_digests(store: Store) -> None:
    one, other = Path(store.name) / "layer_3/c.1.0", Path(store.name) / "layer_3/c.2.0"
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_bytes)
    other.write_bytes(one_bytes)
    assert [key.rpartition("/")[2] for key, _ in damage(store.place)] == [
        "00000001.3.json",
        "00000002.3.json",
    ]


def test_two_writers_of_a_spine_unit_do_not_mix(store: Store) -> None:
    with pytest.raises(StoreError, match=r"00000000.json"):
        store.commit_spine(0, store.tokens(0), store.document(0), Cursor(9, 9, None))


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "s.zarr")
    place.create("commits/manifest.json", records.encode({"format": 9, "context": "something new"}))
    with pytest.raises(StoreError, match=r"\b9\b.*\b2\b"):
        Store.open(place)


def test_a_layer_is_read_while_a_lower_one_is_added(
    store: Store, random_bits: NDArray[np.uint16]
) -> None:
    store.declare([1, 3])
    commit(store, 0, {1: random_bits[:64]})
    again = Store.open(store.name)
    assert (again.complete(1), again.complete(3)) == (False, True)
    np.testing.assert_array_equal(again.residuals(3, 5), random_bits[320:384][again.permutation(5)])


def test_a_second_commit_must_say_the_same(store: Store, random_bits: NDArray[np.uint16]) -> None:
    commit(store, 0, {3: random_bits[:64]})
    with pytest.raises(StoreError, match="action=verify"):
        commit(store, 0, {3: random_bits[64:128]})


def test_settings_may_not_change_while_any_record_is_left(store: Store) -> None:
    for record in (Path(store.name) / "commits" / "spine").glob("0*.json"):
        record.unlink()
    with pytest.raises(MismatchError, match=r"seed.*7.*8"):
        Store.open_or_create(store.name, {**store.manifest, "seed": 8})


def test_positions_past_four_billion_get_wide_indices(tmp_path: Path) -> None:
    for tokens, expected in ((2**32 - 16, "uint32"), (2**32, "uint64")):
        manifest = make_manifest(4, tokens=tokens, context=16, unit=64, chunk=16)
        store = Store.open_or_create(tmp_path / f"{tokens}.zarr", manifest)
        assert store.arrays.token_index().data_type == expected


def test_every_row_is_of_one_kind() -> None:
    norms = np.array([1, 1, 1.2, 9.9, 10.1, 500, np.nan, np.inf], np.float32)
    bos = np.array([1, 0, 0, 0, 0, 1, 0, 1], bool)
    # the median of the finite norms is 5.55 here: nothing but the BOS at 500 is far from it
    assert kinds_of(norms, bos).tolist() == [0, 2, 2, 2, 2, 0, 3, 3]
    norms = np.concatenate([np.ones(10, np.float32), norms])
    assert kinds_of(norms, np.concatenate([np.zeros(10, bool), bos]))[-5:].tolist() == [
        2,
        1,
        0,
        3,
        3,
    ]
