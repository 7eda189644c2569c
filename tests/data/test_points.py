"""Hook points: their names, their arrays and records, and a store that holds several sites."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import residual_saes.data.store.zarr_bfloat16  # noqa: F401  (zarr-python learns bfloat16)
from residual_saes.data.errors import SettingError
from residual_saes.data.rows import summary
from residual_saes.data.site import SITES, HookPoint
from residual_saes.data.store import codec, ledger
from residual_saes.data.store.arrays import points_of, rows_name, rows_point
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import damage
from residual_saes.data.store.store import Store
from tests.conftest import commit, make_store

POINTS = st.sets(
    st.builds(HookPoint, st.integers(0, 60), st.sampled_from(SITES)), min_size=1, max_size=12
)


@given(POINTS)
def test_the_name_of_a_record_says_its_points(points: set[HookPoint]) -> None:
    kind = ledger.kind_of(points)
    assert set(ledger._points(kind)) == points
    assert ledger.residual_key(3, reversed(sorted(points))).endswith(f"/00000003.{kind}.json")
    for point in points:
        assert HookPoint.of(point.name) == HookPoint.of(point.recorded) == point
        assert HookPoint.of_record(point.record_name) == point
        assert codec.fitted_point(codec.fit_key(point)) == point
        assert rows_point(rows_name(point)) == point


def test_names_of_resid_post_are_what_they_were() -> None:
    point = HookPoint(21)
    assert (rows_name(21), point.name, point.recorded) == ("layer_21", "21", 21)
    assert ledger.residual_key(12, [27, 21]) == "commits/residuals/00000012.21_27.json"
    assert codec.fit_key(21) == "commits/scales/00021.json"
    rows = ["layer_5", "mlp_in_5"]
    others = ["norm_5", "norm_mlp_in_5", "layer_05", "layer_mlp_in_5", "token"]
    assert points_of([*rows, *others]) == {HookPoint(5), HookPoint(5, "mlp_in")}


def test_every_layer_of_two_sites_fits_into_a_name_and_more_is_refused() -> None:
    two = list(map(HookPoint, *zip(*product(range(100), ("mlp_in", "mlp_out")), strict=True)))
    assert ledger.kind_of(two) == "mlp_in_0-99.mlp_out_0-99"
    every_other = [HookPoint(layer, site) for layer in range(0, 80, 2) for site in SITES]
    with pytest.raises(SettingError, match="hook points"):
        ledger.kind_of(every_other)


@pytest.mark.parametrize(
    "name", ["", "-1", "01", "mlp_5", "mlp_in", "mlp_in_", "21_27", "x_1", "٣"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SettingError):
        HookPoint.of(name)


@pytest.mark.parametrize("kind", ["spine", "mlp_in", "21..27", "mlp_in_5-", "tmp_5", "5-x"])
def test_a_name_that_is_no_records_names_no_point(kind: str) -> None:
    assert ledger._points(kind) == ()


def test_a_store_holds_several_sites_and_takes_one_more_later(
    tmp_path: Path, random_bits: NDArray[np.uint16]
) -> None:
    path = tmp_path / "s.zarr"
    store = make_store(path, random_bits)
    unit = store.unit_tokens
    bits = {"mlp_in_3": random_bits[::-1].copy(), "mlp_out_3": np.roll(random_bits, 5, 0)}
    for number in range(store.units):
        part = slice(number * unit, (number + 1) * unit)
        commit(store, number, {name: rows[part] for name, rows in bits.items()})
    for name in bits:
        summary.write(store, name)
    store.declare(bits)
    again = Store.open(path)
    named = [HookPoint(3, "mlp_in"), HookPoint(3, "mlp_out"), HookPoint(3)]
    assert again.points == named and again.layers == [3]
    assert not list(damage(LocalPlace(path)))
    group = zarr.open_group(path, mode="r")
    for name, rows in bits.items():
        assert again.complete(name) and summary.exists(again, name)
        for number in range(again.units):
            there = again.residuals(name, number)
            expected = rows[number * unit : (number + 1) * unit][again.permutation(number)]
            np.testing.assert_array_equal(there, expected)
        np.testing.assert_array_equal(group[name][:unit], again.residuals(name, 0))
        np.testing.assert_array_equal(group[f"norm_{name}"][:unit], again.norms(name, 0))
    assert again.missing([3, "resid_mid_3"])[0] == [HookPoint(3, "resid_mid")]
