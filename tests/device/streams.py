"""Streams, events and memory of a CUDA card that is not there: who may read what, and when.

Every operation is done at once, on the host. What a stream may rely on is kept as vector clocks:
a stream knows how far another one was when it waited for it. What it reads without knowing that it
was written is a fault, though the numbers are right here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class DeviceFault(AssertionError):
    """On a card this would fail, or give wrong numbers now and then."""


class Clock:
    """How far a stream, or the host, is, and how far it knows others to be."""

    def __init__(self) -> None:
        self.count = 0  # operations queued
        self.knows: dict[Clock, int] = {}

    def now(self) -> dict[Clock, int]:
        return {**self.knows, self: self.count}

    def learn(self, known: dict[Clock, int]) -> None:
        for clock, count in known.items():
            self.knows[clock] = max(count, self.knows.get(clock, 0))

    def has_seen(self, other: Clock, count: int) -> bool:
        return other is self or self.knows.get(other, 0) >= count


HOST = Clock()


class Stream(Clock):
    """Stands in for torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        super().__init__()
        from tests.device.card import touched

        self.device = touched(device)

    def wait_event(self, event: Event) -> None:
        self.learn(event.seen)

    def wait_stream(self, stream: Stream) -> None:
        self.learn(stream.now())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        HOST.learn(self.now())
        Arrival.check(self)


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: dict[Clock, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        from tests.device.card import current_stream, touched

        stream = stream or current_stream()
        touched(stream.device)
        self.seen = stream.now()

    def synchronize(self) -> None:
        HOST.learn(self.seen)
        for clock in self.seen:
            Arrival.check(clock)

    def wait(self, stream: Stream | None = None) -> None:
        from tests.device.card import current_stream

        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return all(HOST.has_seen(clock, count) for clock, count in self.seen.items())

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class Arrival:
    """A copy from pinned memory: it may read that memory until the host has waited for it."""

    under_way: ClassVar[list[Arrival]] = []

    def __init__(self, source: torch.Tensor, stream: Stream) -> None:
        self.source = source.detach()
        self.copied = source.detach().clone()
        self.stream, self.count = stream, stream.count
        Arrival.under_way.append(self)

    @classmethod
    def check(cls, clock: Clock | None) -> None:
        """Fault if memory has changed under a copy that the host waits for now; None: any copy."""
        for copy in list(cls.under_way):
            if clock is None or (copy.stream is clock and HOST.has_seen(copy.stream, copy.count)):
                cls.under_way.remove(copy)
                if not torch.equal(copy.source, copy.copied):
                    raise DeviceFault("host memory was written while a copy from it was under way")


class Place:
    """What a storage is: on which device, and by which streams it is used."""

    lost: ClassVar[list[str]] = []  # faults of memory that was freed too early

    def __init__(self, device: torch.device | None, stream: Stream | None = None) -> None:
        self.device = device  # None: of no device yet, a constant made within torch
        self.pinned = False
        self.home = stream  # whose memory it is
        self.written: tuple[Clock, int] | None = None
        self.used: dict[Clock, int] = {}
        self.recorded: set[Clock] = set()

    def use(self, clock: Clock, writes: bool, what: str) -> None:
        """Fault if `clock` reads or writes before it has waited for those that wrote or read."""
        before = list(self.used.items()) if writes else []
        for other, count in [*before, *([self.written] if self.written else [])]:
            if not clock.has_seen(other, count) and not HOST.has_seen(other, count):
                verb = "writes" if writes else "reads"
                raise DeviceFault(f"{what} {verb} what another stream wrote or reads, unwaited for")
        self.used[clock] = clock.count
        if writes:
            self.written = (clock, clock.count)

    def __del__(self) -> None:
        for clock, count in self.used.items():
            if self.home is None or clock is HOST or clock in self.recorded:
                continue
            if not self.home.has_seen(clock, count) and not HOST.has_seen(clock, count):
                Place.lost.append("memory freed while another stream uses it: record_stream")
