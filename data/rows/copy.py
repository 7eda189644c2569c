"""Batches copied to a GPU, each while the batch before it is computed on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch


class Copy(NamedTuple):
    """A batch on its way to a device."""

    batch: torch.Tensor  # on the device
    done: torch.cuda.Event


class Side:
    """A CUDA stream that copies batches beside the stream that computes.

    Not yet run on a GPU: its speed is unmeasured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, batch: torch.Tensor) -> Copy:
        """Queue the copy of a batch; from pinned memory the host does not wait for it."""
        with torch.cuda.stream(self._stream):
            on_device = batch.to(self._device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return Copy(on_device, done)

    def finish(self, copy: Copy) -> None:
        """Wait until the host's memory of a batch may be overwritten.

        The host waits for this one copy; no stream waits.
        """
        copy.done.synchronize()

    def hand_over(self, copy: Copy) -> torch.Tensor:
        """The copied batch. The stream that computes waits for the copy; the host does not."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copy.done)
        # The memory belongs to the copying stream. It must not be reused before the computing
        # stream is done with it.
        copy.batch.record_stream(computing)
        return copy.batch


def to_device(
    batches: Iterator[torch.Tensor],
    device: torch.device,
    has: Callable[[int], bool] = lambda _: True,
) -> Iterator[torch.Tensor]:
    """Batches on `device`; on the CPU they are passed through.

    A batch on a GPU is a copy and may be kept. An error is raised when the batch that it prevents
    is asked for.

    Args:
        batches: each valid until the next is asked for; closed with this iterator.
        has: has(n) tells whether batch n can be asked for without waiting.
    """
    if device.type != "cuda":
        yield from batches
        return
    yield from one_ahead(batches, Side(device), has)


def one_ahead(
    batches: Iterator[torch.Tensor], side: Side, has: Callable[[int], bool]
) -> Iterator[torch.Tensor]:
    """What `to_device` does, with any object that copies as `Side` does."""
    taken = 0  # batches
    early: Copy | None = None  # the copy of the next batch, if it is begun already
    failed: Exception | None = None  # why the next batch cannot be had
    try:
        while True:
            # This batch's copy: begun a step ago, or begun now.
            if failed:
                raise failed
            current = early
            if current is None:
                batch = next(batches, None)
                if batch is None:
                    return
                current = side.begin(batch)
                taken += 1
            early = None

            # The next batch's copy, which runs while this batch is computed on. The host's memory
            # of this batch is reused for it.
            if has(taken):
                side.finish(current)
                try:
                    batch = next(batches, None)
                    if batch is not None:
                        early = side.begin(batch)
                        taken += 1
                except Exception as error:
                    failed = error

            yield side.hand_over(current)
            if early is None:
                side.finish(current)
    finally:
        if isinstance(batches, Generator):
            batches.close()
