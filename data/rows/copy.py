"""Batches copied to a GPU, each while the one before it is computed on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch


class Copy(NamedTuple):
    """A batch on its way to a device."""

    there: torch.Tensor
    done: torch.cuda.Event


class Side:
    """A CUDA stream that copies batches beside the one that computes. Not yet run on a GPU: its
    speed is unmeasured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, batch: torch.Tensor) -> Copy:
        """Have a batch copied; from pinned memory the host does not wait for it."""
        with torch.cuda.stream(self._stream):
            there = batch.to(self._device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return Copy(there, done)

    def finish(self, copy: Copy) -> None:
        """Come back when what was copied from may be overwritten: the host waits for this one copy,
        and no device.
        """
        copy.done.synchronize()

    def hand_over(self, copy: Copy) -> torch.Tensor:
        """The copy, for the stream that computes, which waits for it; the host does not."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copy.done)
        # It was allocated for the copying stream, which must not have it again before computing is
        # done with it.
        copy.there.record_stream(computing)
        return copy.there


def to_device(
    batches: Iterator[torch.Tensor],
    device: torch.device,
    has: Callable[[int], bool] = lambda _: True,
) -> Iterator[torch.Tensor]:
    """Batches on `device`, each copied while the one before it is computed on; on the CPU they are
    passed through.

    A batch on a GPU is the consumer's for good. An error is raised when the batch is asked for that
    it prevents.

    Args:
        batches: each good until the next is asked for; closed with this.
        has: whether the batch behind so many can be asked for now, or would only come later.
    """
    if device.type != "cuda":
        yield from batches
        return
    yield from one_ahead(batches, Side(device), has)


def one_ahead(
    batches: Iterator[torch.Tensor], side: Side, has: Callable[[int], bool]
) -> Iterator[torch.Tensor]:
    """What `to_device` does, with a stream that may be another's."""
    taken, early, failed = 0, None, None
    try:
        while True:
            if failed:
                raise failed
            if (current := early) is None:
                if (batch := next(batches, None)) is None:
                    return
                current, taken = side.begin(batch), taken + 1
            early = None
            if has(taken):
                side.finish(current)  # it was begun a step ago, but for the first
                try:
                    if (batch := next(batches, None)) is not None:
                        early, taken = side.begin(batch), taken + 1
                except Exception as error:
                    failed = error
            yield side.hand_over(current)
            if early is None:
                side.finish(current)
    finally:
        if isinstance(batches, Generator):
            batches.close()
