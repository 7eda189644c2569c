"""Data-parallel training: every process has all weights and takes its share of each batch's rows.

`accelerate launch` and torchrun set RANK, WORLD_SIZE and LOCAL_RANK; nothing else of them is used,
and no other engine's variables make a group: see `data.rank.processes`.
Losses, gradients and firings are added up over the processes, so that each makes the same step on
the same weights, and dead latents are those that no process saw fire. Process 0 alone writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from residual_saes.data.errors import SettingError, TemporaryError, first_line
from residual_saes.data.journal import tell

_LOST = re.compile("gloo|closed by peer|reset by peer|timed? ?out|refused", re.IGNORECASE)
_TIMEOUT = timedelta(hours=6)  # process 0 evaluates and saves while the others wait
_JOINING = timedelta(minutes=10)  # an engine starts all of them at about the same time


@contextmanager
def _together() -> Iterator[None]:
    """Turn the loss of another process into a TemporaryError."""
    try:
        yield
    except RuntimeError as error:  # gloo has no exception class of its own
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        raise TemporaryError(
            f"another process of this training was lost ({first_line(error)[:200]}); the same "
            "command goes on from the last checkpoint"
        ) from error


def _require_meeting_place(environment: Mapping[str, str]) -> None:
    """Raise SettingError if the variables of the processes' engine cannot be right.

    `data.rank.processes` has found that there are several.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world, address, port = (environment.get(name, "") for name in names)
    numbers_are_right = int(rank) < int(world or 0)
    port_is_right = port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
    if not (numbers_are_right and address and port_is_right):
        given = ", ".join(f"{name}={environment.get(name, '')}" for name in names)
        raise SettingError(
            f"{given} name no group of processes that could meet; start all of them by torchrun or "
            "`accelerate launch`, or unset RANK and WORLD_SIZE to train in one process"
        )
    tell(f"process {rank} of {world}: waiting for the others at {address}:{port}")


class Group:
    """The processes that train one SAE together; by default this process alone."""

    def __init__(self, device: torch.device | None = None) -> None:
        """Join the others.

        Args:
            device: this process's own; None: there are no others.
        """
        self.rank = 0
        self.world = 1
        self._device = device
        if device is not None:
            backend = "nccl" if device.type == "cuda" else "gloo"
            _require_meeting_place(os.environ)
            with _together():
                store, rank, world = next(rendezvous("env://", timeout=_JOINING))
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT
                )
            self.rank = dist.get_rank()
            self.world = dist.get_world_size()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        if self._device is not None:
            dist.destroy_process_group()

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch (n, d)."""
        return batch[self.rank :: self.world]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; returns `tensor`, which must be contiguous."""
        if self.world > 1:
            with _together():
                dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, in place; returns `tensor`, which must be contiguous."""
        return self.sum_(tensor).div_(self.world) if self.world > 1 else tensor

    def from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by process 0's."""
        for tensor in tensors if self.world > 1 else ():
            whole = tensor.contiguous()
            with _together():
                dist.broadcast(whole, 0)
            tensor.copy_(whole)

    def text_from_first(self, text: str) -> str:
        """Process 0's text."""
        if self.world == 1:
            return text
        size = self.largest(len(text.encode()) if self.rank == 0 else 0)
        found = torch.zeros(size, dtype=torch.uint8, device=self._device)
        if self.rank == 0:
            found = torch.tensor([*text.encode()], dtype=torch.uint8, device=self._device)
        self.from_first_([found])
        return bytes(found.tolist()).decode()  # device sync, once a run

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        numbers = torch.tensor([number], device=self._device)
        with _together():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())  # device sync, once a step: all must stop at the same one
