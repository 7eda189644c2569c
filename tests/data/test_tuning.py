"""The choice of the fastest right way, by a clock that the candidates move."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from residual_saes.data import tuning
from residual_saes.data.tuning import Choice


class Clock:
    """Seconds that pass only while a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def way(self, name: str, *seconds: float, gives: int = 42) -> Callable[[], int]:
        """A candidate that takes `seconds`, in turn: the last ones again and again."""
        left = list(seconds)

        def run() -> int:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return gives

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def choose(seconds: float = 1.0, **candidates: Callable[[], int]) -> Choice:
    def fault(result: int) -> str | None:
        return None if result == 42 else f"gives {result}"

    return tuning.choose("a sum", candidates, fault, seconds=seconds, device="cpu")


def test_the_fastest_is_taken_and_its_time_is_the_least(clock: Clock) -> None:
    # The first call compiles, and is not timed.
    choice = choose(first=clock.way("first", 0.004), other=clock.way("other", 9, 0.003, 0.005))
    assert choice.chosen == "other"
    assert choice.recorded() == {
        "chosen": "other",
        "ms": {"first": pytest.approx(4), "other": pytest.approx(3)},
        "left_out": {},
    }
    assert choice.table() == ["a sum: other (first 4 ms, other 3 ms)"]


@pytest.mark.parametrize(("took", "chosen"), [(0.096, "first"), (0.2, "first"), (0.094, "other")])
def test_the_first_stays_unless_another_is_five_percent_faster(
    clock: Clock, took: float, chosen: str
) -> None:
    choice = choose(first=clock.way("first", 0.1), other=clock.way("other", took))
    assert choice.chosen == chosen


def test_what_raises_or_is_wrong_is_left_out_with_its_reason(clock: Clock) -> None:
    def broken() -> int:
        raise RuntimeError("no such instruction\nand a long listing")

    def large() -> int:
        raise MemoryError("out of memory")

    choice = choose(
        first=clock.way("first", 0.1),
        broken=broken,
        large=large,
        wrong=clock.way("wrong", 0.001, gives=41),
        slow=clock.way("slow", 0.2),
    )
    assert choice.chosen == "first"
    first, *left_out = choice.table()
    assert first.startswith("a sum: first")
    assert len(left_out) == 3
    for line, words in zip(left_out, ["no such instruction", "MemoryError", "41"], strict=True):
        assert words in line
    assert clock.calls.count("wrong") == 1  # never timed


def test_a_wrong_first_way_gives_its_place_to_the_next_right_one(clock: Clock) -> None:
    choice = choose(
        first=clock.way("first", 0.001, gives=41),
        second=clock.way("second", 0.1),
        third=clock.way("third", 0.099),
    )
    assert choice.chosen == "second"


def test_without_a_right_way_the_first_is_taken(clock: Clock) -> None:
    choice = choose(first=clock.way("first", 0.1, gives=1), other=clock.way("other", 0.1, gives=2))
    assert choice.chosen == "first"
    assert choice.recorded()["ms"] == {}


def test_a_machine_without_memory_for_the_first_way_is_no_reason_to_take_another() -> None:
    def large() -> int:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError):
        choose(first=large, other=lambda: 42)


def test_it_stops_after_the_seconds_and_times_each_once_at_least(clock: Clock) -> None:
    choose(seconds=1, first=clock.way("first", 0.3), other=clock.way("other", 0.3))
    assert clock.calls == ["first", "other"] * 3  # once to check, then 1.2 s
    clock.calls.clear()
    choose(seconds=0, first=clock.way("first", 5), other=clock.way("other", 5))
    assert clock.calls == ["first", "other"] * 2


def test_a_hopeless_way_is_timed_once(clock: Clock) -> None:
    choose(first=clock.way("first", 0.01), slow=clock.way("slow", 0.03))
    assert clock.calls.count("slow") == 2
    assert clock.calls.count("first") > 5


def test_a_way_without_a_rival_is_not_timed(clock: Clock) -> None:
    choice = choose(first=clock.way("first", 0.1), wrong=clock.way("wrong", 0.1, gives=0))
    assert clock.calls == ["first", "wrong"]
    assert choice.recorded()["ms"] == {}


def test_what_raises_while_it_is_timed_is_left_out(clock: Clock) -> None:
    calls = iter(range(9))

    def weary() -> int:
        clock.now += 0.001
        if next(calls) > 1:  # right in its check and in one turn
            raise MemoryError("out of memory")
        return 42

    choice = choose(weary=weary, other=clock.way("other", 0.1), third=clock.way("third", 0.2))
    assert choice.chosen == "other"
    assert choice.recorded()["left_out"] == {"weary": "MemoryError: out of memory"}
