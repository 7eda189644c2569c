"""What a store in a bucket asks for, request by request."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from residual_saes.data.rows import summary
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.store.place import Loaded, LocalPlace, Place
from residual_saes.data.store.store import SpineEnd, Store
from tests.conftest import make_store

pytest.importorskip("obstore", reason="obstore is not installed")

from obstore.store import MemoryStore

from tests.bench.requests import Counted, place
from tests.data.test_packs import CONTEXT, UNIT, half_done


@pytest.fixture
def bucket() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(bucket: MemoryStore, random_bits: NDArray[np.uint16]) -> Store:
    """A complete store of ten units."""
    return make_store(place(bucket), random_bits[: 10 * UNIT])


def counted(bucket: MemoryStore) -> tuple[Store, Counted]:
    """The opened store, and what it sends from now on."""
    requests = Counted()
    store = Store.open(place(bucket, requests))
    requests.sent.clear()
    return store, requests


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_a_whole_unit_is_one_request(
    bucket: MemoryStore, tmp_path: Path, random_bits: NDArray[np.uint16], codec: str
) -> None:
    local = make_store(tmp_path / "s.zarr", random_bits, codec=codec)
    make_store(place(bucket), random_bits, codec=codec)
    store, requests = counted(bucket)
    for unit in (0, store.units - 1):
        np.testing.assert_array_equal(store.residuals(3, unit), local.residuals(3, unit))
    assert requests.sent == {"GET": 2}


def test_a_window_asks_for_no_size(bucket: MemoryStore, store: Store) -> None:
    again, requests = counted(bucket)
    reader = Reader([Source.of(again, 3)], batch=64, seed=1, policy=Policy(), window=8)
    requests.sent.clear()
    for _ in islice(reader.batches(0), 8):
        pass
    assert set(requests.sent) == {"GET"}


@pytest.mark.parametrize("is_bucket", [False, True])
def test_a_folder_and_a_bucket_list_alike(
    bucket: MemoryStore, tmp_path: Path, is_bucket: bool
) -> None:
    root: Place = place(bucket) if is_bucket else LocalPlace(tmp_path)
    for key in ("a/00000001.x", "a/00000002.x", "a/b/00000003.x", "c/1", "zarr.json"):
        root.write(key, [key.encode()])
    assert {"00000001.x", "00000002.x"} <= set(root.names("a")) <= {"00000001.x", "00000002.x", "b"}
    assert "00000001.x" in root.names("a", after="00000001")
    assert "00000001.x" not in root.names("a", after="00000001.x")
    assert "00000002.x" in root.names("a", after="00000002")
    assert not [name for name in root.names("a", after="00000003") if name != "b"]
    assert sorted(root.folders()) == ["a", "c"]
    assert [sizes.get("1") for sizes in root.sizes_of_many(["c", "a", "none"])] == [3, None, None]


def test_many_objects_come_in_their_order(bucket: MemoryStore) -> None:
    root = place(bucket)
    keys = [f"a/{number}" for number in range(200)]
    for key in keys:
        root.write(key, [key.encode()])
    assert [data.decode() for data in root.read_many(reversed(keys))] == keys[::-1]
    answers = root.read_many([*keys[:3], "none", *keys[3:]])
    assert [next(answers) for _ in range(3)] == [key.encode() for key in keys[:3]]
    with pytest.raises(FileNotFoundError):
        next(answers)


def test_bytes_in_memory_end_where_they_end() -> None:
    with Loaded(b"abcdef") as blob:
        assert (blob.size, bytes(blob.read(2, 3)), bytes(blob.read(4, 9))) == (6, b"cde", b"ef")


def test_a_summary_reads_each_unit_once_and_a_later_rank_none(
    bucket: MemoryStore, store: Store
) -> None:
    store.place.delete("commits/summaries/00003.json")
    first, requests = counted(bucket)
    summary.write(first, 3)
    assert requests.sent["GET"] == first.units
    later, requests = counted(bucket)
    summary.write(later, 3)
    assert requests.sent == {"HEAD": 1}


def test_metadata_that_is_right_is_not_written_again(bucket: MemoryStore, store: Store) -> None:
    requests = Counted()
    again = Store.open(place(bucket, requests))
    requests.sent.clear()
    again.declare([3])
    assert requests.sent == {"GET": 1}
    before = again.place.read("zarr.json")
    for wrong in (lambda: again.place.delete("zarr.json"), lambda: again.declare([4])):
        wrong()
        Store.open(place(bucket)).declare([3])
        assert again.place.read("zarr.json") == before


def test_metadata_of_a_text_that_ended_meanwhile_has_its_final_shape(
    bucket: MemoryStore, random_bits: NDArray[np.uint16]
) -> None:
    writer = half_done(bucket, random_bits, units=0, spine=6)
    late = Store.open(place(bucket))
    writer.close_spine(SpineEnd(6 * UNIT // CONTEXT, ended_early=True))
    writer.declare([3])
    before = writer.place.read("tokens/zarr.json")
    late.declare([3])
    assert writer.place.read("tokens/zarr.json") == before


def test_a_bucket_holds_the_summary_of_a_folder(
    tmp_path: Path, store: Store, random_bits: NDArray[np.uint16]
) -> None:
    local = make_store(tmp_path / "s.zarr", random_bits[: 10 * UNIT])
    for key in ("commits/summaries/00003.json", "summary_3/c.0.0.0.0", "zarr.json"):
        assert store.place.read(key) == local.place.read(key), key
