"""From the spine to residuals: a unit at a time, whichever is nobody's, until the layers are whole.

The forward never waits for a disk: while one unit's batches run, the last ones are permuted, described, encoded and
written by threads. What is in flight is bounded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from data import claims
from data.claims import Claims
from data.errors import PipelineError, StopRequest
from data.journal import Progress, duration, size, tell
from data.ring import Ring
from data.store import Store
from data.unit import Prepared, prepare
from harvest.lm import LanguageModel, OutOfMemory, forward_inputs, is_out_of_memory, run
from harvest.plan import Faults
from harvest.spine import POLL_S, Spine

IN_FLIGHT = 2  # units made and not yet committed: 0.67 GB a layer at width 2560
_PATIENCE_S = 60.0  # without a commit by another rank, where no lock says whether it lives
_PATIENCE_UNITS = 10  # or this many times what a unit takes here, if that is longer


def compute_unit(
    store: Store, lm: LanguageModel, unit: int, layers: Sequence[int], batch: int, stop: StopRequest | None = None
) -> dict[int, torch.Tensor]:
    """Residuals of one unit in spine order: (n, d) bfloat16 on the model's device. A pure function of the spine.

    Args:
        batch: packed rows per forward pass.
        stop: asked between batches.
    """
    tokens, starts = store.tokens(unit), store.piece_starts(unit)
    device = lm.config.device
    out = {layer: torch.empty(tokens.size, lm.d_model, dtype=torch.bfloat16, device=device) for layer in layers}
    for at in range(0, len(tokens), batch):
        if stop is not None:
            stop.check()
        part = slice(at, at + batch)
        passes = forward_inputs(tokens[part], starts[part], lm.isolation)
        rows = slice(at * store.context, (at + len(tokens[part])) * store.context)
        run(lm, passes, layers, {layer: out[layer][rows] for layer in layers})
    return out


def prepared(store: Store, unit: int, rows: Mapping[int, torch.Tensor]) -> dict[int, Prepared]:
    """Rows of one unit, in spine order, as they are committed."""
    permutation, starts = store.permutation(unit), store.piece_starts(unit).ravel()
    return {layer: prepare(one, permutation, starts, store.array(f"layer_{layer}")) for layer, one in rows.items()}


class Writer:
    """Commits units in threads, beside the forward; at most `IN_FLIGHT` at a time. A context manager."""

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

    def _commit(self, unit: int, rows: dict[int, torch.Tensor], batch: int | None, made: Any) -> int:
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


def make(
    store: Store,
    lm: LanguageModel,
    layers: Sequence[int],
    rights: Claims,
    spine: Spine,
    stop: StopRequest,
    faults: Faults,
    ring: Ring | None = None,
) -> int:
    """Make and commit units until every one of `layers` is whole; how many tokens were made here.

    Args:
        ring: the store's, if it is one: units are made in its order, when it has room.
    """
    progress, began, batch, tokens = Progress(), time.monotonic(), int(store.manifest["batch"]), 0
    with Writer(store, rights, faults, lm.config.device) as writer:
        for unit, lacking in _to_make(store, layers, rights, spine, stop, writer, ring):
            rows, batch = _computed(store, lm, unit, lacking, batch, stop, faults)
            stop.check()
            writer.submit(unit, rows, batch if batch != store.manifest["batch"] else None)
            tokens += store.rows_of(unit)
            rate = tokens / (time.monotonic() - began)
            progress.show(_line(store, layers, tokens, rate, writer.written))
    for layer in layers:
        if bad := store.non_finite(layer):
            tell(f"layer {layer}: {bad} rows hold NaN or infinity; they are stored, counted and never served")
    return tokens


def _computed(
    store: Store, lm: LanguageModel, unit: int, layers: list[int], batch: int, stop: StopRequest, faults: Faults
) -> tuple[dict[int, torch.Tensor], int]:
    """A unit's rows, and the batch that they were made with."""
    while True:
        try:
            return compute_unit(store, lm, unit, layers, batch, stop), batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if faults.oom == "stop" or batch == 1:
                raise OutOfMemory(unit, batch) from error
        batch //= 2
        tell(f"unit {unit}: out of memory; going on with batch={batch}, which is recorded, since bits may differ")
        if lm.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _to_make(
    store: Store,
    layers: Sequence[int],
    rights: Claims,
    spine: Spine,
    stop: StopRequest,
    writer: Writer,
    ring: Ring | None,
) -> Iterator[tuple[int, list[int]]]:
    """Units that are ours to make, with the layers that each lacks, until there are none that anybody has to make."""
    others, told = _Others(rights), set[str]()
    while True:
        took, missing = 0, store.missing(layers)
        for unit, lacking in ring.ordered(missing) if ring else missing.items():
            stop.check()
            if not spine.ready(unit):
                break
            if ring and not ring.room(unit):
                _tell_full(ring, told)
                break
            if unit in writer.holds or not rights.take(claims.unit(unit)):
                continue
            if store.committed_meanwhile(unit, lacking):
                rights.release(claims.unit(unit))
                continue
            if ring:
                ring.clear(unit)
            began = time.monotonic()
            yield unit, lacking
            others.unit_s, took = time.monotonic() - began, took + 1
        if not took:
            writer.wait(0)
            spine.follow()
            if store.spine_complete and not store.missing(layers):
                return
            stop.check()
            others.wait(store, layers)


def _tell_full(ring: Ring, told: set[str]) -> None:
    """Say whom the full ring waits for, of each once."""
    who, why = ring.waits_for()
    if who not in told:
        told.add(who)
        tell(f"ring full: {size(sum(ring.sizes().values()))} of {size(ring.record.max_bytes)}; {why}")


class _Others:
    """Waiting for what other ranks have in hand; where no lock says whether they live, their silence does."""

    def __init__(self, rights: Claims) -> None:
        self._claims, self.unit_s = rights, 0.0
        self._missing, self._since = -1, time.monotonic()

    def wait(self, store: Store, layers: Sequence[int]) -> None:
        missing = len(store.missing(layers))
        if missing != self._missing:
            self._missing, self._since = missing, time.monotonic()
        silence = time.monotonic() - self._since
        if not self._claims.exact and silence > max(_PATIENCE_S, _PATIENCE_UNITS * self.unit_s):
            tell(f"no other rank has committed anything for {duration(silence)}: taking over their {missing} units")
            self._claims.take_over()
        time.sleep(POLL_S)


def _line(store: Store, layers: Sequence[int], tokens: int, rate: float, written: int) -> str:
    have = int(np.min([store.committed(layer).sum() for layer in layers]))
    left = duration((store.units - have) * store.unit_tokens / rate)
    return (
        f"{have}/{store.units} units | {tokens:,} tokens here | {rate:,.0f} tokens/s | "
        f"{size(written)} at {size(written * rate / max(tokens, 1))}/s | ETA {left}"
    )
