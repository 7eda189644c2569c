"""Leases keep living processes apart without locks, and a dead one's is taken over by one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from residual_saes.data.errors import StoreError
from residual_saes.data.store.claims import METADATA, SPINE, unit_claim
from residual_saes.data.store.leases import FOLDER, Leases, Tag
from residual_saes.data.store.place import LocalPlace, Place

obstore = pytest.importorskip("obstore", reason="obstore is not installed")
LIFE_S = 0.3
KEY = f"{FOLDER}/00000003"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return LocalPlace(tmp_path)
    from residual_saes.data.store.bucket import ObjectPlace

    bucket = ObjectPlace("s3://bucket/x")
    bucket.store = obstore.store.MemoryStore()
    return bucket


@pytest.fixture
def join(place: Place) -> Iterator[Callable[[], Leases]]:
    """Further processes."""
    joined: list[Leases] = []

    def another() -> Leases:
        joined.append(Leases(place, life_s=LIFE_S, poll_s=0.02))
        return joined[-1]

    yield another
    for leases in joined:
        leases.close()


def died(place: Place) -> Leases:
    """A process that renews nothing, as a killed one."""
    return Leases(place, life_s=3600.0)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_lease_is_refused_while_its_process_works_however_long(
    place: Place, join: Callable[[], Leases]
) -> None:
    one, other = join(), join()
    assert one.take(unit_claim(3)) and one.take(unit_claim(3))
    end = time.monotonic() + 5 * LIFE_S
    while time.monotonic() < end:
        assert not other.take(unit_claim(3))
        time.sleep(LIFE_S / 10)
    assert other.take(unit_claim(4)) and other.take(SPINE)
    one.release(unit_claim(3))
    assert other.take(unit_claim(3))


def test_a_dead_process_is_taken_over_by_one_of_many(
    place: Place, join: Callable[[], Leases]
) -> None:
    others = [join() for _ in range(7)]
    assert died(place).take(unit_claim(3))
    began = time.monotonic()
    took: Counter[int] = Counter()

    def try_to_take(number: int) -> None:
        end = began + 4 * LIFE_S
        while time.monotonic() < end:
            if others[number].take(unit_claim(3)):
                took[number] += 1
                assert time.monotonic() - began > LIFE_S
            time.sleep(0.01)

    threads = [threading.Thread(target=try_to_take, args=(number,)) for number in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not isinstance(place, LocalPlace):  # a folder has no conditional put: two may be first
        assert len(took) == 1


def test_what_was_given_back_is_free_at_once(place: Place, join: Callable[[], Leases]) -> None:
    one, other = join(), join()
    assert one.take(unit_claim(3)) and one.take(METADATA)
    assert not other.take(unit_claim(3))
    one.close()
    assert other.take(unit_claim(3)) and other.take(METADATA)
    other.close()
    assert place.names(FOLDER) == []


def test_one_that_was_taken_over_is_not_given_back_by_its_former_holder(
    place: Place, join: Callable[[], Leases]
) -> None:
    slow, other = join(), join()
    assert slow.take(unit_claim(3))
    slow._closed.set()  # its renewals do not come through
    wait_for(lambda: other.take(unit_claim(3)))
    slow.release(unit_claim(3))
    assert place.names(FOLDER) == ["00000003"]
    assert not join().take(unit_claim(3))


def test_a_put_whose_answer_was_lost_counts(
    place: Place, join: Callable[[], Leases], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = join()
    create = place.create
    monkeypatch.setattr(place, "create", lambda key, data: create(key, data) and False)
    assert one.take(unit_claim(3))
    replace = place.replace
    monkeypatch.setattr(place, "replace", lambda key, data, tag: replace(key, data, tag) and False)
    time.sleep(3 * LIFE_S)
    assert not join().take(unit_claim(3))
    other = join()
    end = time.monotonic() + 3 * LIFE_S
    while time.monotonic() < end:
        assert not other.take(unit_claim(3))
        time.sleep(0.05)


def test_held_waits_and_gives_back(place: Place, join: Callable[[], Leases]) -> None:
    one, other = join(), join()
    order: list[str] = []

    def second() -> None:
        with other.held(METADATA):
            order.append("second")

    with one.held(METADATA):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert place.names(FOLDER) == []


def test_nobody_is_ever_sure_to_be_alone(place: Place, join: Callable[[], Leases]) -> None:
    with join().alone() as alone:
        assert not alone


def test_what_dead_processes_left_behind_is_removed(
    place: Place, join: Callable[[], Leases]
) -> None:
    dead = died(place)
    assert dead.take(unit_claim(3)) and dead.take(unit_claim(70_000_000)) and dead.take(SPINE)
    with closing(join()) as last:
        last.clear()
    assert place.names(FOLDER) == ["spine"]


def test_replacing_needs_the_object_as_it_was(place: Place) -> None:
    assert not place.replace(KEY, b"new", Tag("0"))
    assert place.create(KEY, b"one")
    first = place.read_tagged(KEY)
    assert first.data == b"one"
    assert place.replace(KEY, b"two", first.tag)
    assert not place.replace(KEY, b"three", first.tag)
    assert place.read(KEY) == b"two"
    place.delete(KEY)
    assert not place.replace(
        KEY, b"four", place.read_tagged(KEY).tag if place.exists(KEY) else first.tag
    )


def test_without_a_connection_work_goes_on(
    place: Place, join: Callable[[], Leases], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = join()
    assert one.take(unit_claim(3))

    def refuse(*_: object) -> bool:
        raise StoreError("no connection")

    for name in ("replace", "delete", "create"):
        monkeypatch.setattr(place, name, refuse)
    time.sleep(2 * LIFE_S)
    one.release(unit_claim(3))
    one.close()
    with pytest.raises(StoreError):
        join().take(unit_claim(4))
