"""Orders, moments, durable files, records, journal, settings."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residual_saes.data import durable, order
from residual_saes.data.errors import SettingError, StoreError, TemporaryError, differences
from residual_saes.data.journal import Metrics, read_metrics
from residual_saes.data.settings import whole
from residual_saes.data.store import records
from residual_saes.data.store.moments import Moments, merge_all


@given(st.integers(0, 500), st.integers(-5, 2**70), st.integers(0, 100))
def test_permutation_is_one_and_depends_on_every_seed(n: int, seed: int, unit: int) -> None:
    permutation = order.permutation(n, seed, unit)
    np.testing.assert_array_equal(np.sort(permutation), np.arange(n))
    np.testing.assert_array_equal(permutation, order.permutation(n, seed, unit))
    if n > 50:
        assert (permutation != order.permutation(n, seed + 1, unit)).any()
        assert (permutation != order.permutation(n, seed, unit + 1)).any()


def test_order_never_changes() -> None:
    """Golden: stores on people's disks were written in this order."""
    assert order.permutation(8, 0, 0).tolist() == GOLDEN_PERMUTATION
    assert order.held_out(40, 0).tolist() == GOLDEN_HELD_OUT


GOLDEN_PERMUTATION = [0, 7, 2, 5, 4, 6, 3, 1]
GOLDEN_HELD_OUT = [7, 34]


def test_positions_of_a_permutation_are_uniform() -> None:
    first = np.array([order.permutation(16, seed)[0] for seed in range(4000)])
    counts = np.bincount(first, minlength=16)
    chi2 = ((counts - 250) ** 2 / 250).sum()
    assert chi2 < 37.7  # 15 degrees of freedom, p = 0.001


def test_held_out_is_a_share_and_at_least_one() -> None:
    assert len(order.held_out(1, 0)) == 0
    assert len(order.held_out(2, 0)) == 1
    assert len(order.held_out(1000, 3)) == 50


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_moments_merge_to_those_of_all_rows(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(size=(size, 3)) + 400).astype(np.float32) for size in sizes]
    merged = merge_all(map(Moments.of, parts), 3)
    rows = np.concatenate(parts).astype(np.float64)
    assert merged.count == len(rows)
    if len(rows):
        np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(merged.variance, rows.var(0), rtol=1e-9, atol=1e-12)


def test_create_lets_the_first_writer_win(tmp_path: Path) -> None:
    assert durable.create(tmp_path / "a", b"first")
    assert not durable.create(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.write(tmp_path / "a", [b"old"])

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TemporaryError, match=os.strerror(errno.ENOSPC)):
        durable.write(tmp_path / "a", [b"new"])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_refused_rename_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StoreError, match=r"/a\b"):
        durable.write(tmp_path / "a", [b"x"])
    assert os.listdir(tmp_path) == ["a"]


def test_a_record_is_json_and_says_what_was_committed() -> None:
    body = {"b": [1.5, "é"], "a": {"7": None}}
    data = records.encode(body)
    assert records.decode(data, "r") == body
    assert json.loads(data) == {**body, "checksum": durable.digest(data[47:])}


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"7", b'{"a":1,"checksum":"0"}'])
def test_a_damaged_record_is_refused(damage: bytes) -> None:
    with pytest.raises(StoreError, match="action=repair"):
        records.decode(damage, "r.json")
    with pytest.raises(StoreError, match=r"action=repair store=gs://b/s.zarr"):
        records.decode(damage, "gs://b/s.zarr/commits/spine/00000001.json")


def test_any_flipped_byte_of_a_record_is_noticed() -> None:
    data = records.encode({"a": 1, "b": "x"})
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1
        with pytest.raises(StoreError, match=r"r\.json"):
            records.decode(bytes(flipped), "r.json")


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"step": 1, "loss": 0.1, "odd": float("nan")})
    kept = metrics.sync()
    metrics.write({"step": 2})
    metrics.close()
    again = Metrics(path, *kept)
    again.write({"step": 3})
    again.close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.1, "odd": None}, {"step": 3}]
    with pytest.raises(StoreError, match=r"metrics.jsonl"):
        Metrics(path, keep_bytes=10_000)
    again = Metrics(path, *kept)  # what is behind them may be anything
    again.close()
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2"))
    with pytest.raises(StoreError, match=r"metrics.jsonl"):
        Metrics(path, *kept)


def test_whole_numbers() -> None:
    assert whole("tokens", 1e9) == 10**9
    for wrong in (0.5, "1e9.5", "1B", None, True, float("inf"), float("nan")):
        with pytest.raises(SettingError, match="tokens"):
            whole("tokens", wrong)


def test_differences_name_both_values() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == {"a.c": (2, 4), "d": (3, None), "e": (None, 5)}
