"""Commits units in threads, beside the forward pass."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from data.errors import PipelineError
from data.store import claims
from data.store.claims import Claims
from data.store.store import Store
from data.store.unit import Prepared
from harvest.forward import prepared
from harvest.plan import Faults

IN_FLIGHT = 2  # units made and not yet committed: 0.67 GB a layer at width 2560


class Writer:
    """Commits units in threads, beside the forward; at most `IN_FLIGHT` at a time. A context
    manager.
    """

    def __init__(self, store: Store, rights: Claims, faults: Faults, device: str) -> None:
        self._store, self._claims, self._faults = store, rights, faults
        self._cuda = device.startswith("cuda")
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="commit")
        self._pending: deque[Future[int]] = deque()
        self.holds: set[int] = set()  # units in flight
        self.written = 0  # bytes of residuals, before encoding

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is in flight is whole; it is committed even if the run was asked to stop.
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait(0)

    def submit(self, unit: int, rows: dict[int, torch.Tensor], batch: int | None) -> None:
        """Commit a unit when its rows are there; waits while too many are in flight."""
        self.wait(IN_FLIGHT - 1)
        made = torch.cuda.Event() if self._cuda else None  # type: ignore[no-untyped-call]
        if made is not None:
            made.record()
        self.holds.add(unit)
        self._pending.append(self._pool.submit(self._commit, unit, rows, batch, made))

    def wait(self, most: int) -> None:
        """Come back when at most `most` units are in flight; raises what went wrong in a thread."""
        while len(self._pending) > most or (self._pending and self._pending[0].done()):
            self.written += self._pending.popleft().result()

    def _commit(
        self, unit: int, rows: dict[int, torch.Tensor], batch: int | None, made: Any
    ) -> int:
        with _side_stream(made), torch.inference_mode():
            layers = prepared(self._store, unit, rows)
        rows.clear()
        for layer, one in layers.items():
            _require_finite(self._store, unit, layer, one, self._faults.non_finite)
        self._store.commit_residuals(unit, layers, batch)
        self.holds.discard(unit)
        self._claims.release(claims.unit(unit))
        return sum(one.bits.nbytes for one in layers.values())


def _side_stream(made: Any) -> Any:
    """On a GPU, a stream of this thread's own that begins where the rows are made."""
    if made is None:
        return nullcontext()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_event(made)
    return torch.cuda.stream(stream)


def _require_finite(store: Store, unit: int, layer: int, rows: Prepared, tolerated: int) -> None:
    bad = rows.non_finite
    if len(bad) > tolerated:
        first = int(store.permutation(unit)[bad].min())
        row, at = divmod(first, store.context)
        token = int(store.tokens(unit)[row, at])
        raise PipelineError(
            f"layer {layer} gave NaN or infinity in {len(bad)} of {len(rows.bits)} rows of unit {unit} of "
            f"{store.name}, first at token {at} (id {token}) of packed row {row}; the unit was not committed. Try "
            f"model.dtype=float32 or another layer, or allow non_finite={len(bad)} rows a unit: they are counted and "
            "never served"
        )
