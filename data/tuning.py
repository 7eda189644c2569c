"""The fastest right way of a computation on this machine: several are tried, checked and timed.

The first way is the reference, and the fallback. A way that raises, or whose result is wrong, is
left out with its reason, and ends nothing. Choosing depends on a clock: who needs the same bits
again keeps what was chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from residual_saes.data import machine
from residual_saes.data.errors import first_line

T = TypeVar("T")

_FASTER = 0.95  # of the reference's time: less than 5 % is noise, and changes bits for nothing
_HOPELESS = 2.0  # times the fastest: slower ways are not timed again
_TURNS = 10  # at most: the minimum of more is no better
_LONGEST = 100  # characters of a reason


class Trial(NamedTuple):
    """One way, and what came of it."""

    name: str
    ms: float | None  # the least time of one call; None: it was not timed
    fault: str | None  # why it was left out


@dataclass(frozen=True)
class Choice:
    """The way that is taken."""

    what: str  # the computation and its shape, for the user
    chosen: str
    trials: tuple[Trial, ...]

    def table(self) -> list[str]:
        """Lines for the user: the chosen way and the times, then each that was left out."""
        times = ", ".join(f"{way.name} {way.ms:.3g} ms" for way in self.trials if way.ms)
        lines = [f"{self.what}: {self.chosen}" + (f" ({times})" if times else "")]
        for way in self.trials:
            if way.fault:
                lines.append(f"{self.what}: {way.name} is left out: {way.fault}")
        return lines

    def recorded(self) -> dict[str, Any]:
        """Plain data for a record: the chosen way, the times in ms, the reasons."""
        kept: dict[str, Any] = {"chosen": self.chosen, "ms": {}, "left_out": {}}
        for way in self.trials:
            if way.ms is not None:
                kept["ms"][way.name] = float(f"{way.ms:.4g}")
            if way.fault is not None:
                kept["left_out"][way.name] = way.fault
        return kept


def choose(
    what: str,
    candidates: Mapping[str, Callable[[], T]],
    fault: Callable[[T], str | None],
    *,
    seconds: float,
    device: torch.device | str,
    repeats: Callable[[T, T], bool] | None = None,
) -> Choice:
    """The fastest right candidate; the first unless another is at least 5 % faster.

    Each is run once, which also compiles it. The right ones are then timed in turns, at most
    `_TURNS` each, until `seconds` are over. A way that has no rival is not timed.

    Args:
        fault: says in a few words why a result is wrong; None: it is right.
        repeats: whether two results are the same; then each is run twice, and one that gives
            another result the second time is left out.

    Raises:
        MemoryError or another refusal of an allocator: of the first candidate. Another way that
            needs more memory than there is is left out.
    """
    faults: dict[str, str | None] = {}
    first = next(iter(candidates))
    for name, run in candidates.items():
        try:
            found = run()
            faults[name] = fault(found)
            if repeats and not (faults[name] or repeats(found, run())):
                faults[name] = "gives other bits each time"
            _wait(device)  # an error of a kernel shows itself when the device is waited for
        except Exception as error:
            if name == first and machine.is_out_of_memory(error):
                raise
            faults[name] = _reason(error)
    right = {name: run for name, run in candidates.items() if faults[name] is None}
    times: dict[str, float] = {}
    if len(right) > 1:
        times, raised = _times(right, seconds, device)
        faults |= raised
    chosen = next((name for name in right if faults[name] is None), first)
    if times:
        fastest = min(times, key=times.__getitem__)
        if times[fastest] <= _FASTER * times.get(chosen, 0.0):
            chosen = fastest
    trials = tuple(Trial(name, times.get(name), faults[name]) for name in candidates)
    return Choice(what, chosen, trials)


def _times(
    ways: Mapping[str, Callable[[], T]], seconds: float, device: torch.device | str
) -> tuple[dict[str, float], dict[str, str]]:
    """The least time of a call of each, in ms; and why some raised, which have no time.

    In turns, so that a change of the machine's speed meets all of them.
    """
    times: dict[str, float] = {}
    raised: dict[str, str] = {}
    end = time.perf_counter() + seconds
    for turn in range(_TURNS):
        for name, run in ways.items():
            if name in raised or (turn and times[name] > _HOPELESS * min(times.values())):
                continue
            begin = time.perf_counter()
            if turn and begin >= end:
                return times, raised
            try:
                run()
                _wait(device)
            except Exception as error:  # it was right once: memory may have gone since
                raised[name] = _reason(error)
                times.pop(name, None)
                continue
            took = 1000 * (time.perf_counter() - begin)
            times[name] = min(took, times.get(name, took))
    return times, raised


def _reason(error: Exception) -> str:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."


def _wait(device: torch.device | str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)  # device sync: without it a launch is timed, and no kernel
