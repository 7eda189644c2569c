"""Packs spare requests and are never trusted further than the records that they copy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from residual_saes.data.errors import StoreError
from residual_saes.data.rows import summary
from residual_saes.data.site import HookPoint
from residual_saes.data.store import packs
from residual_saes.data.store.bucket import ObjectPlace
from residual_saes.data.store.packs import Pack
from residual_saes.data.store.place import Place
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.text.packing import Cursor
from tests.conftest import commit, make_manifest, make_spine, make_store

pytest.importorskip("obstore", reason="obstore is not installed")

from obstore.store import MemoryStore

from tests.bench.requests import Counted, place

UNIT, CONTEXT, WIDTH = 64, 16, 24
RANGE = 4  # units of a pack here


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "UNITS", RANGE)


@pytest.fixture
def bucket() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(bucket: MemoryStore, random_bits: NDArray[np.uint16]) -> Store:
    """A complete store of ten units, packed: three ranges, the last one ragged."""
    made = make_store(place(bucket), random_bits[: 10 * UNIT])
    made.pack()
    return made


def opened(bucket: MemoryStore) -> tuple[Store, Counter[str]]:
    """The store, and what its opening sent."""
    requests = Counted()
    return Store.open(place(bucket, requests)), requests.sent


def rows_of(bits: NDArray[np.uint16], unit: int) -> NDArray[np.uint16]:
    return bits[unit * UNIT : (unit + 1) * UNIT]


def require_same(one: Store, other: Store) -> None:
    """Raise unless two openings know the same of every unit."""
    np.testing.assert_array_equal(one.ledger.spine_rows, other.ledger.spine_rows)
    np.testing.assert_array_equal(one.ledger.pieces, other.ledger.pieces)
    assert one.layers == other.layers
    for layer in one.layers:
        of_one, of_other = one.ledger.point(layer), other.ledger.point(layer)
        for name, values in vars(of_one).items():
            np.testing.assert_array_equal(values, vars(of_other)[name], err_msg=name)


def pack_keys(place: Place) -> list[str]:
    return [pack.key for pack in packs.there(place)]


def pack_key(store: Store, first: int, kind: str) -> str:
    """The one pack of a range of units and a kind."""
    (key,) = [pack.key for pack in packs.there(store.place) if pack[:2] == (first, kind)]
    return key


def without_packs(bucket: MemoryStore) -> Store:
    """What the records alone say."""
    there = place(bucket)
    kept = {key: there.read(key) for key in pack_keys(there)}
    for key in kept:
        there.delete(key)
    store = Store.open(there)
    for key, data in kept.items():
        there.write(key, [data])
    return store


def test_packs_say_what_the_records_say_in_fewer_requests(
    bucket: MemoryStore, store: Store
) -> None:
    again, sent = opened(bucket)
    require_same(again, without_packs(bucket))
    assert again.complete(3)
    assert sent["GET"] == 2 + len(pack_keys(store.place)) == 8  # manifest and end
    assert sent["LIST"] == 2 + 7  # packs, the root, the arrays of the spine and of a layer
    assert not list(damage(store.place))


def test_a_folder_needs_no_packs(tmp_path: Path, random_bits: NDArray[np.uint16]) -> None:
    store = make_store(tmp_path / "s.zarr", random_bits)
    assert store.is_packed()
    store.pack()
    assert not (tmp_path / "s.zarr" / packs.FOLDER).exists()


def test_a_damaged_record_is_not_packed(bucket: MemoryStore, store: Store) -> None:
    pack = pack_key(store, RANGE, "3")
    store.place.delete(pack)
    key = "commits/residuals/00000005.3.json"
    store.place.write(key, [store.place.read(key)[:-2] + b" \n"])
    assert not store.is_packed()
    with pytest.raises(StoreError, match=key):
        store.pack()
    assert pack not in pack_keys(store.place)


def test_packs_are_written_once_and_the_same_by_whoever_writes_them(
    bucket: MemoryStore, store: Store
) -> None:
    before = {key: store.place.read(key) for key in pack_keys(store.place)}
    requests = Counted()
    Store.open(place(bucket, requests)).pack()
    assert not requests.sent["PUT"]
    for key in before:
        store.place.delete(key)
    Store.open(place(bucket)).pack()
    assert {key: store.place.read(key) for key in pack_keys(store.place)} == before


@pytest.mark.parametrize("lost", range(7))
def test_what_lost_packs_held_is_read_from_the_records(
    bucket: MemoryStore, store: Store, lost: int
) -> None:
    keys = pack_keys(store.place)
    for key in keys if lost == len(keys) else [keys[lost]]:
        store.place.delete(key)
    require_same(opened(bucket)[0], store)


@pytest.mark.parametrize("kind", ["spine", "3"])
@pytest.mark.parametrize("how", ["flipped head", "flipped", "cut", "empty", "less", "no record"])
def test_a_damaged_pack_is_read_around_and_dropped_by_repair(
    bucket: MemoryStore, store: Store, kind: str, how: str
) -> None:
    key = pack_key(store, RANGE, kind)
    data = bytearray(store.place.read(key))
    lines = bytes(data).splitlines(keepends=True)
    if how.startswith("flipped"):
        data[60 if how == "flipped head" else len(data) // 2] ^= 1
    elif how == "cut":
        del data[-10:]
    elif how == "empty":
        data.clear()
    elif how == "less":
        data = bytearray(b"".join(lines[:-1]))
    else:
        data = bytearray(packs.encode([*lines[1:-1], lines[-1].replace(b"rows", b"bows")]))
    store.place.write(key, [bytes(data)])
    require_same(opened(bucket)[0], store)
    assert [wrong for wrong, _ in damage(store.place)] == [key]
    assert repair(store.place) == [key]
    require_same(opened(bucket)[0], store)
    store.pack()
    assert not list(damage(store.place))


def test_a_pack_that_lacks_records_gives_what_it_has(bucket: MemoryStore, store: Store) -> None:
    for kind in ("spine", "3"):
        key = pack_key(store, RANGE, kind)
        lines = packs.decode(store.place.read(key), key)
        store.place.write(key, [packs.encode(lines[1:3])])
    require_same(opened(bucket)[0], store)
    assert not list(damage(store.place))


def test_repair_drops_a_pack_with_the_record_in_it(
    bucket: MemoryStore, store: Store, random_bits: NDArray[np.uint16]
) -> None:
    before = {key: store.place.read(key) for key in pack_keys(store.place)}
    data = bytearray(store.place.read("layer_3/c.5.0"))
    data[10] ^= 1
    store.place.write("layer_3/c.5.0", [bytes(data)])
    pack = pack_key(store, RANGE, "3")
    assert set(repair(store.place)) == {"commits/residuals/00000005.3.json", pack}
    again = Store.open(place(bucket))
    assert again.missing([3]) == {5: [HookPoint(3)]}
    again.pack()
    assert pack not in pack_keys(again.place)  # its range is not whole
    commit(again, 5, {3: rows_of(random_bits, 5)})
    assert not again.is_packed()
    again.pack()
    assert again.is_packed()
    assert {key: again.place.read(key) for key in pack_keys(again.place)} == before
    require_same(opened(bucket)[0], store)


def test_a_repair_that_is_killed_has_dropped_packs_first(
    bucket: MemoryStore, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the dropped record would live on in its pack."""
    store.place.write("norm_3/c.5", [b"damaged"])
    store.place.write("tokens/c.9.0", [b"damaged"])
    deleted: list[str] = []
    monkeypatch.setattr(store.place, "delete", deleted.append)
    repair(store.place)
    order = [key.startswith(packs.FOLDER) for key in deleted]
    assert order == [True, True, False, False]


def test_a_record_dropped_beside_its_pack_is_found(bucket: MemoryStore, store: Store) -> None:
    """As by a version of this package that knows no packs."""
    store.place.delete("commits/residuals/00000005.3.json")
    pack = pack_key(store, RANGE, "3")
    assert repair(store.place) == [pack]
    assert Store.open(place(bucket)).missing([3]) == {5: [HookPoint(3)]}


@pytest.mark.parametrize("object_key", ["layer_3/c.5.0", "tokens/c.9.0"])
def test_objects_of_packed_records_are_checked(
    bucket: MemoryStore, store: Store, object_key: str
) -> None:
    whole = store.place.read(object_key)
    store.place.write(object_key, [whole[:-1]])
    with pytest.raises(StoreError, match=object_key):
        Store.open(place(bucket))
    store.place.delete(object_key)
    with pytest.raises(StoreError, match=object_key):
        Store.open(place(bucket))


def test_a_layer_that_came_later_is_seen_at_every_stage(
    bucket: MemoryStore, store: Store, random_bits: NDArray[np.uint16]
) -> None:
    for count, unit in enumerate([9, 0, 5, 4, 6, 7, 1, 2, 3, 8], 1):
        commit(Store.open(place(bucket)), unit, {4: rows_of(random_bits, unit)})
        again = Store.open(place(bucket))
        assert again.committed(4).sum() == count and again.complete(3)
        again.pack()
        require_same(opened(bucket)[0], without_packs(bucket))
    again, sent = opened(bucket)
    assert again.complete(4)
    assert sent["GET"] == 2 + 9 == 2 + len(pack_keys(again.place))


def test_layers_committed_together_and_apart_are_packed_apart(
    bucket: MemoryStore, random_bits: NDArray[np.uint16]
) -> None:
    store = half_done(bucket, random_bits, units=0)
    for unit in range(10):
        rows = rows_of(random_bits, unit)
        for layers in [(3,), (4,)] if unit < 2 else [(3, 4)]:
            commit(store, unit, dict.fromkeys(layers, rows))
    store.pack()
    kinds = {pack[:2] for pack in packs.there(store.place)}
    assert {kind for first, kind in kinds if first == 0} == {"spine", "3", "4", "3_4"}
    again, sent = opened(bucket)
    require_same(again, without_packs(bucket))
    assert sent["GET"] == 2 + len(kinds)


def half_done(bucket: MemoryStore, bits: NDArray[np.uint16], units: int, spine: int = 10) -> Store:
    """A store of ten units; the spine of the first ones is there, and layer 3 of the first ones."""
    manifest = make_manifest(WIDTH, tokens=10 * UNIT, context=CONTEXT, unit=UNIT, chunk=16)
    store = Store.open_or_create(place(bucket), manifest)
    tokens, document = make_spine(UNIT // CONTEXT, CONTEXT, np.random.default_rng(0))
    for unit in range(spine):
        store.commit_spine(unit, tokens, document, Cursor(unit, 0, None))
    if spine == 10:
        store.close_spine(SpineEnd(10 * UNIT // CONTEXT, ended_early=False))
    for unit in range(units):
        commit(store, unit, {3: rows_of(bits, unit)})
    return store


def test_finished_ranges_of_a_half_done_store_are_packed(
    bucket: MemoryStore, random_bits: NDArray[np.uint16]
) -> None:
    half_done(bucket, random_bits, units=6, spine=9).pack()
    whole = [Pack(0, "3", 4), Pack(0, "spine", 4), Pack(4, "spine", 4)]
    assert packs.there(place(bucket)) == whole
    again, sent = opened(bucket)
    require_same(again, without_packs(bucket))
    assert list(again.missing([3])) == [6, 7, 8, 9]
    assert sent["GET"] == 2 + 3 + 1 + 2  # manifest, no end, packs, unit 8 of the spine, 4 and 5


def test_a_text_that_ended_early_is_packed_to_its_end(
    bucket: MemoryStore, random_bits: NDArray[np.uint16]
) -> None:
    store = half_done(bucket, random_bits, units=6, spine=6)
    store.close_spine(SpineEnd(6 * UNIT // CONTEXT, ended_early=True))
    store.pack()
    again, sent = opened(bucket)
    assert again.complete(3)
    assert sent["GET"] == 2 + 4


def test_a_unit_that_is_committed_while_the_store_is_opened_is_taken_in(
    bucket: MemoryStore, random_bits: NDArray[np.uint16], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its objects came after their folders were listed, its record before records were."""
    writer = half_done(bucket, random_bits, units=5)
    writer.pack()
    list_sizes = ObjectPlace.sizes_of_many

    def late(self: ObjectPlace, folders: set[str]) -> list[dict[str, int]]:
        found = list(list_sizes(self, folders))
        if "layer_3" in folders:
            commit(writer, 5, {3: rows_of(random_bits, 5)})
        return found

    monkeypatch.setattr(ObjectPlace, "sizes_of_many", late)
    assert list(Store.open(place(bucket)).missing([3])) == [6, 7, 8, 9]


def test_what_is_there_of_unfinished_units_is_packed_once_it_is_worth_it(
    bucket: MemoryStore, random_bits: NDArray[np.uint16], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "FEW", 2)
    store = half_done(bucket, random_bits, units=0)
    sizes = []
    for unit in (3, 1, 0, 2):
        commit(store, unit, {3: rows_of(random_bits, unit)})
        again, sent = opened(bucket)
        sent.clear()
        again.pack()
        require_same(opened(bucket)[0], without_packs(bucket))
        sizes.append([pack.size for pack in packs.there(store.place) if pack.kind == "3"])
    assert sizes == [[], [2], [2], [4]]
    assert sent["GET"] == 1 + 2  # the emptier pack, and what it lacks

    # The pack is the same as one that is written from the records alone.
    grown = store.place.read(pack_key(store, 0, "3"))
    store.place.delete(pack_key(store, 0, "3"))
    store.pack()
    assert store.place.read(pack_key(store, 0, "3")) == grown

    # What a slower process leaves beside it goes, and is read around while it is there.
    lines = packs.decode(grown, "grown")
    left = Pack(0, "3", 2)
    store.place.write(left.key, [packs.encode(lines[:2])])
    again, sent = opened(bucket)
    require_same(again, store)
    assert sent["GET"] == 2 + 3 + 1
    assert not again.is_packed()
    again.pack()
    assert left not in packs.there(store.place)


def test_a_refresh_reads_no_pack_again(
    bucket: MemoryStore, random_bits: NDArray[np.uint16], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "FEW", 1)
    half_done(bucket, random_bits, units=6).pack()
    again, sent = opened(bucket)
    sent.clear()
    again.refresh()
    assert set(sent) == {"LIST"}


def test_a_pack_that_goes_while_it_is_read_is_read_around(
    bucket: MemoryStore, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = packs.there(store.place)
    for pack in gone[::2]:
        store.place.delete(pack.key)
    monkeypatch.setattr(packs, "there", lambda _: gone)
    require_same(opened(bucket)[0], store)


# -- look ------------------------------------------------------------------------------------------


def test_a_look_tells_which_units_are_there_and_a_refresh_what_is_in_them(
    bucket: MemoryStore, random_bits: NDArray[np.uint16]
) -> None:
    writer = half_done(bucket, random_bits, units=2)
    requests = Counted()
    follower = Store.open(place(bucket, requests))
    for unit in (9, 3, 2):
        commit(writer, unit, {3: rows_of(random_bits, unit)})
    requests.sent.clear()
    assert follower.look([3]) == 1
    assert requests.sent == {"LIST": 1}
    assert list(follower.missing([3])) == [4, 5, 6, 7, 8]
    assert np.flatnonzero(follower.committed(3)).tolist() == [0, 1]
    assert not follower.complete(3)
    with pytest.raises(StoreError):
        follower.norm_sums(3, 9)
    assert follower.non_finite(3) == 0

    for unit in (4, 5, 6, 7, 8):
        commit(writer, unit, {3: rows_of(random_bits, unit)})
    follower.look([3])
    assert not follower.missing([3]) and not follower.complete(3)
    requests.sent.clear()
    assert follower.look([3]) == 0
    assert not requests.sent
    follower.refresh()
    assert follower.complete(3)
    require_same(follower, without_packs(bucket))
    summary.write(follower, 3)


def test_a_refresh_after_looks_reads_packs(
    bucket: MemoryStore, random_bits: NDArray[np.uint16]
) -> None:
    writer = half_done(bucket, random_bits, units=1)
    requests = Counted()
    follower = Store.open(place(bucket, requests))
    for unit in range(1, 10):
        commit(writer, unit, {3: rows_of(random_bits, unit)})
    writer.pack()
    follower.look([3])
    requests.sent.clear()
    follower.refresh()
    require_same(follower, without_packs(bucket))
    assert requests.sent == {"LIST": 2, "GET": 3}


def test_a_look_follows_the_spine_without_listing_it(
    bucket: MemoryStore, random_bits: NDArray[np.uint16]
) -> None:
    writer = half_done(bucket, random_bits, units=0, spine=1)
    requests = Counted()
    follower = Store.open(place(bucket, requests))
    tokens, document = make_spine(UNIT // CONTEXT, CONTEXT, np.random.default_rng(0))
    for unit in (1, 2, 3, 4, 6):  # 5 is missing, as behind a repair
        writer.commit_spine(unit, tokens, document, Cursor(unit, 0, None))
    requests.sent.clear()
    assert follower.look() == 1  # of residuals: no layer is known
    assert np.flatnonzero(follower.ledger.spine_rows).tolist() == [0, 1, 2, 3, 4]
    assert requests.sent["LIST"] == 1 and requests.sent["GET"] <= 2 * 4 + 2
    for unit in (5, 7, 8, 9):
        writer.commit_spine(unit, tokens, document, Cursor(unit, 0, None))
    writer.close_spine(SpineEnd(10 * UNIT // CONTEXT, ended_early=False))
    follower.look()
    assert follower.spine_complete
    np.testing.assert_array_equal(follower.ledger.pieces, writer.ledger.pieces)


def test_a_look_into_a_folder_is_a_refresh(tmp_path: Path, random_bits: NDArray[np.uint16]) -> None:
    writer = make_store(tmp_path / "s.zarr", random_bits)
    follower = Store.open(tmp_path / "s.zarr")
    commit(writer, 2, {4: rows_of(random_bits, 2)})
    assert follower.look([4]) == 0
    assert follower.committed(4).sum() == 1
