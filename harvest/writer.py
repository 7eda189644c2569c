"""Commits units in threads, beside the forward pass."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from residual_saes.data import stopping
from residual_saes.data.errors import PipelineError
from residual_saes.data.site import HookPoint
from residual_saes.data.store.claims import Claims, unit_claim
from residual_saes.data.store.store import Store
from residual_saes.data.store.unit import Prepared
from residual_saes.harvest.config import Faults
from residual_saes.harvest.forward import prepared

IN_FLIGHT = 2  # units made and not yet committed: 0.67 GB a hook point at width 2560


class Writer:
    """Commits at most `IN_FLIGHT` units at a time in threads. A context manager."""

    def __init__(self, store: Store, claims: Claims, faults: Faults, device: str) -> None:
        self._store = store
        self._claims = claims
        self._faults = faults
        self._gpu = torch.device(device) if device.startswith("cuda") else None
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="commit")
        self._pending: deque[Future[int]] = deque()
        self.holds: set[int] = set()  # units in flight
        self.written = 0  # bytes of residuals, before encoding

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Units in flight are whole: they are committed even if the run was asked to stop.
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()

    def submit(
        self, unit: int, residuals: dict[HookPoint, torch.Tensor], batch: int | None
    ) -> None:
        """Commit a unit once the device has its residuals; wait while too many are in flight.

        Args:
            residuals: (n, d) in spine order, by hook point. The writer empties the dict.
            batch: packed rows per forward pass, where it was not the manifest's.
        """
        self.wait(most=IN_FLIGHT - 1)
        made = None
        if self._gpu is not None:
            made = torch.cuda.Event()  # type: ignore[no-untyped-call]
            made.record(torch.cuda.current_stream(self._gpu))
        self.holds.add(unit)
        self._pending.append(self._pool.submit(self._finish, unit, residuals, batch, made))

    def wait(self, most: int = 0) -> None:
        """Return once at most `most` units are in flight; raise what a thread raised."""
        while len(self._pending) > most or (self._pending and self._pending[0].done()):
            self.written += self._pending.popleft().result()

    def _finish(
        self, unit: int, residuals: dict[HookPoint, torch.Tensor], batch: int | None, made: Any
    ) -> int:
        """`_commit`, also where a signal ends the process meanwhile."""
        with stopping.holding():
            return self._commit(unit, residuals, batch, made)

    def _commit(
        self, unit: int, residuals: dict[HookPoint, torch.Tensor], batch: int | None, made: Any
    ) -> int:
        """Commit a unit in this thread; the bytes of its rows."""
        with self._side_stream(made), torch.inference_mode():
            points = prepared(self._store, unit, residuals)
        residuals.clear()  # frees the device's memory before the slow part
        for point, rows in points.items():
            _require_finite(self._store, unit, point, rows, self._faults.non_finite)
        self._store.commit_residuals(unit, points, batch)
        self.holds.discard(unit)
        self._claims.release(unit_claim(unit))
        return sum(rows.bits.nbytes for rows in points.values())

    def _side_stream(self, made: Any) -> Any:
        """On a GPU, a stream of this thread's own that waits for the event `made`."""
        if made is None:
            return nullcontext()
        # By name: each thread has a current device of its own, which is GPU 0 at first.
        stream = torch.cuda.Stream(self._gpu)  # type: ignore[no-untyped-call]
        stream.wait_event(made)
        return torch.cuda.stream(stream)


def _require_finite(
    store: Store, unit: int, point: HookPoint, rows: Prepared, tolerated: int
) -> None:
    """Raise PipelineError if more than `tolerated` rows hold NaN or infinity."""
    bad = rows.non_finite
    if len(bad) > tolerated:
        first = int(store.permutation(unit)[bad].min())
        row, position = divmod(first, store.context)
        token = int(store.tokens(unit)[row, position])
        raise PipelineError(
            f"{point} gave NaN or infinity in {len(bad)} of {len(rows.bits)} rows of unit "
            f"{unit} of {store.name}, first at token {position} (id {token}) of packed row {row}; "
            "the unit was not committed. Try model.dtype=float32 or another layer, or allow "
            f"non_finite={len(bad)} rows a unit: they are counted and never served"
        )
