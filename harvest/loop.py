"""Stage one, the loop: text -> tokens -> residuals -> store.

The spine (which token stands where) is committed by one reader of the text. The residuals of a unit
are then a pure function of its spine, so any process can make any unit at any time, with the same
bits. `harvest` is the whole stage, `make` its loop over units.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from residual_saes.data import stopping
from residual_saes.data.allocator import kept_when_freed
from residual_saes.data.errors import MismatchError, PipelineError, StopRequest
from residual_saes.data.journal import Progress, duration, size, tell
from residual_saes.data.machine import is_out_of_memory
from residual_saes.data.rows import summary
from residual_saes.data.site import HookPoint
from residual_saes.data.store import codec, retention, ring
from residual_saes.data.store.claims import METADATA, Claims, unit_claim
from residual_saes.data.store.manifest import exists, require_free
from residual_saes.data.store.manifest import read as read_manifest
from residual_saes.data.store.place import Place, place_of
from residual_saes.data.store.retention import KeepAll
from residual_saes.data.store.ring import Ring
from residual_saes.data.store.store import Store
from residual_saes.data.text.documents import TextSource
from residual_saes.harvest.attention import SDPA, Attention
from residual_saes.harvest.attention_trial import settle_attention_
from residual_saes.harvest.config import Faults, HarvestConfig, check_layers
from residual_saes.harvest.forward import unit_residuals
from residual_saes.harvest.isolation import Isolation
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.provenance import manifest_of
from residual_saes.harvest.selfcheck import check, choose_isolation
from residual_saes.harvest.spine import Spine, begun, tell_end
from residual_saes.harvest.spine_writer import Begun
from residual_saes.harvest.waiting import Waiting, pause
from residual_saes.harvest.writer import Writer


def harvest(
    config: HarvestConfig, lm: LanguageModel, source: TextSource, reader: Begun | None = None
) -> Store:
    """Bring the store to what `config` asks for, from whatever it holds, beside other ranks.

    Args:
        reader: the process that will read the text, if the caller has begun it.

    Raises:
        MismatchError: the store there was made with other settings.
        StoreError: the disk is full, or the store is damaged.
        Interrupted: SIGINT or SIGTERM arrived; everything committed stays.
    """
    if reader is None:
        with begun(config, source) as reader:
            return _harvest(config, lm, source, reader)
    return _harvest(config, lm, source, reader)


def _harvest(
    config: HarvestConfig, lm: LanguageModel, source: TextSource, reader: Begun | None
) -> Store:
    """The stage itself."""
    points = config.points
    check_layers(config, lm)
    place = place_of(config.store)
    lm.truncate_(max(config.layers))
    begun = read_manifest(place) if exists(place) else None
    first: Isolation = begun["isolation"] if begun else "packed"
    lm.isolation = choose_isolation(lm, points, config.context, first)
    settle_attention_(lm, config, begun)

    # Join the others before anything is written: whoever believes to be alone removes temporaries.
    require_free(place)  # joining makes a file, and the folder may be no store
    with closing(place.claims()) as claims, StopRequest() as stop:
        whole_spine = retention.needs_whole_spine(place, claims, config.max_bytes)
        store = open_(place, config, lm, source, claims)

        bad = config.faults.bad
        with Spine(store, points, claims, source, lm.tokenizer, stop, bad, reader) as spine:
            # Wait for the spine: a ring needs all of it, else the first unit is enough.
            if whole_spine:
                spine.wait()
            else:
                spine.wait_for(unit=0)

            # Recompute a committed unit.
            store.refresh()
            check(store, lm, points)

            # Describe the arrays for other Zarr readers; a lossy codec is part of that.
            fit_codec(store, lm, points)
            if not store.is_declared(points):
                with claims.held(METADATA):
                    store.declare(points)
            if claims.take(METADATA):
                store.pack()
                claims.release(METADATA)

            # Make every missing unit.
            room = ring.join(store, points, claims, config.max_bytes, config.readers)
            made = make(store, lm, points, claims, spine, stop, config, room)
            room.sweep()
        finish(store, points, claims, stop)
    tell_end(store)
    tell_bad(store, points)
    _tell_complete(store, made)
    return store


def open_(
    place: Place, config: HarvestConfig, lm: LanguageModel, source: TextSource, claims: Claims
) -> Store:
    """The store. Where another process has just begun it, with its way to attend.

    Raises:
        MismatchError: the store was made with other settings.
    """
    try:
        return Store.open_or_create(place, manifest_of(config, lm, source), claims)
    except MismatchError:
        begun = read_manifest(place)
        there = Attention.of(begun.get("attention"))
        if there == lm.attention or config.attention not in ("auto", there.kind):
            raise
        lm.attend_by_(SDPA)
        settle_attention_(lm, config, begun)
    return Store.open_or_create(place, manifest_of(config, lm, source), claims)


class Made(NamedTuple):
    """What one process has made."""

    tokens: int
    seconds: float  # that it took, without the checks at its start


def make(
    store: Store,
    lm: LanguageModel,
    points: Sequence[HookPoint],
    claims: Claims,
    spine: Spine,
    stop: StopRequest,
    config: HarvestConfig,
    room: KeepAll | Ring,
) -> Made:
    """Make and commit units until each of `points` is whole.

    Args:
        room: on the disk. It decides the order of units, and admits a unit when it fits.
    """
    faults = config.faults
    began = time.monotonic()
    progress = Progress()
    waiting = Waiting()
    batch = int(store.manifest["batch"])  # halved where memory runs out
    tokens = 0
    device = lm.config.device
    # On a CPU this halves the time at width 2,560, and takes one unit more of memory.
    keeping = kept_when_freed() if device == "cpu" else nullcontext()
    with keeping, Writer(store, claims, faults, device) as writer:
        while True:
            # Make all units that are free at present, each process from a place of its own on.
            went_on = False
            is_full = False
            for unit, lacking in room.ordered(spine.ready(store.missing(points)), config.rank):
                stop.check()
                is_full = not room.admits(unit)
                if is_full:
                    break

                # Claim the unit. Skip it if it is in other hands, or was committed meanwhile.
                if unit in writer.holds or not claims.take(unit_claim(unit)):
                    continue
                if store.committed_meanwhile(unit, lacking):
                    claims.release(unit_claim(unit))
                    went_on = True
                    if spine.is_due() and not claims.exact:
                        break  # one listing tells of many units, without three requests for each
                    continue
                room.clear(unit)

                # Compute its residuals.
                residuals, batch = compute(store, lm, unit, lacking, batch, stop, faults)
                stop.check()

                # Hand them to the writer, which commits them beside the next unit's forward pass.
                halved = batch if batch != store.manifest["batch"] else None
                writer.submit(unit, residuals, halved)
                went_on = True
                tokens += store.rows_of(unit)
                rate = tokens / (time.monotonic() - began)
                done = store.units - store.lacking(points)
                stopping.left.saved = f"{done:,} of {store.units:,} units are in {store.name}"
                line = progress_line(store, done, tokens, rate, writer.written)
                progress.show(line, share=done / store.units)
            spine.follow()
            if went_on:
                waiting.over()
                continue

            # No unit is free: the store is complete, or we wait for the spine or another process.
            writer.wait()
            missing = store.missing(points)
            if store.spine_complete and not missing:
                break
            if not is_full:
                tell_waiting(waiting, store, claims, list(spine.ready(missing)))
            spine.pause()
    return Made(tokens, time.monotonic() - began)


def finish(store: Store, points: Sequence[HookPoint], claims: Claims, stop: StopRequest) -> None:
    """Have one process write what only whole hook points have: statistics, and the final shapes."""
    waiting = Waiting()
    while not is_finished(store, points):
        if claims.take(METADATA):
            store.refresh()
            for point in points:
                summary.write(store, point)
            store.pack()
            store.declare(points)
            claims.clear()
            claims.release(METADATA)
        else:
            waiting.on("the statistics of the layers, which another process writes")
            pause(claims.poll_s, stop)
    store.refresh()


def is_finished(store: Store, points: Sequence[HookPoint]) -> bool:
    """Whether `finish` has nothing to do."""
    summed_up = all(summary.exists(store, point) for point in points)
    return summed_up and store.is_declared(points) and store.is_packed()


def compute(
    store: Store,
    lm: LanguageModel,
    unit: int,
    points: list[HookPoint],
    batch: int,
    stop: StopRequest,
    faults: Faults,
) -> tuple[dict[HookPoint, torch.Tensor], int]:
    """A unit's rows by hook point, and the batch that fitted in memory: `batch`, or less.

    Raises:
        OutOfMemory: the batch did not fit, and `faults` allows no smaller one.
    """
    while True:
        try:
            return unit_residuals(store, lm, unit, points, batch, stop), batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if faults.oom == "stop" or batch == 1:
                raise OutOfMemory(unit, batch, store.context) from error
        batch //= 2
        tell(
            f"unit {unit}: out of memory; going on with batch={batch}, which is recorded, since "
            "bits may differ"
        )
        if lm.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


class OutOfMemory(PipelineError):
    """A batch did not fit in memory; nothing of its unit was written."""

    def __init__(self, unit: int, batch: int, context: int) -> None:
        super().__init__(
            f"unit {unit}: a batch of {batch} rows does not fit in memory; what was committed "
            "before is intact. Go on with oom=halve (smaller batches may change bits, and are "
            f"recorded), or begin another store= with less than batch={batch} or context={context}"
        )
        self.unit = unit
        self.batch = batch  # packed rows
        self.context = context  # tokens of each

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, by which a launcher's job returns it."""
        return type(self), (self.unit, self.batch, self.context)


def fit_codec(store: Store, lm: LanguageModel, points: Sequence[HookPoint]) -> None:
    """Fit a lossy codec to the rows of unit 0, before the first row is written."""
    unfitted = codec.unfitted(store.manifest["codec"], store.place, points)
    if unfitted:
        residuals = unit_residuals(store, lm, 0, unfitted, store.manifest["batch"])
        bos = torch.from_numpy(store.piece_starts(0).ravel())
        for point, rows in residuals.items():
            codec.fit(store.place, point, rows, bos.to(rows.device))


# -- messages --------------------------------------------------------------------------------------


def progress_line(store: Store, done: int, tokens: int, rate: float, written: int) -> str:
    """How far the store is.

    Args:
        done: units that are committed.
        tokens: made here.
        rate: tokens/s made here.
        written: bytes of residuals committed here, before encoding.
    """
    units = f"{done:,}".rjust(len(f"{store.units:,}"))
    left = duration((store.units - done) * store.unit_tokens / rate)
    bytes_per_s = size(written * rate / max(tokens, 1))
    return (
        f"unit {units}/{store.units:,}   {left:>6} left   {rate:>7,.0f} tokens/s   "
        f"{size(written):>7} at {bytes_per_s:>7}/s   {tokens:,} tokens here"
    )


def tell_waiting(waiting: Waiting, store: Store, claims: Claims, units: Sequence[int]) -> None:
    """Say what no free unit means, if that lasts.

    Args:
        units: that are missing though their text is there.
    """
    if not units:
        there = np.count_nonzero(store.ledger.spine_rows)
        waiting.on("the text", f": {there} of {store.units} units are read")
        return
    listed = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
    dead = "" if claims.exact else "; this process takes over what nobody renews"
    waiting.on(f"units that other processes make: {listed}", dead)


def tell_bad(store: Store, points: Sequence[HookPoint]) -> None:
    """Tell the user of rows that are not finite."""
    for point in points:
        if bad := store.non_finite(point):
            tell(
                f"{point}: {bad} rows hold NaN or infinity; they are stored, counted and "
                "never served"
            )


def _tell_complete(store: Store, made: Made) -> None:
    if made.tokens:
        share = f", {made.tokens:,} of them made here" if made.tokens < store.rows else ""
        speed = f"{duration(made.seconds)}, {made.tokens / made.seconds:,.0f} tokens/s"
        tell(f"{store.name} is complete: {store.rows:,} tokens{share} in {speed}")
    else:
        tell(f"{store.name} is complete: {store.units} units, {store.rows:,} rows a layer")
