"""Stage one: text -> tokens -> residuals -> store.

The spine (which token stands where) is committed by one reader of the text. Residuals are then a
pure function of a spine unit, so that any unit can be made at any time, by anyone, with the same
bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from data import environment
from data.errors import PipelineError, StopRequest
from data.journal import Progress, duration, size, tell
from data.rows import summary
from data.store import codec, retention, ring
from data.store.claims import METADATA, Claims, unit_claim
from data.store.manifest import agree
from data.store.place import place_of
from data.store.retention import KeepAll
from data.store.ring import Ring
from data.store.store import Store
from data.text.documents import TextSource
from harvest import spine
from harvest.forward import unit_residuals
from harvest.model import LanguageModel
from harvest.model_folder import is_out_of_memory
from harvest.plan import Faults, HarvestConfig, check_layers
from harvest.selfcheck import check, choose_isolation
from harvest.spine import POLL_S, Spine
from harvest.writer import Writer


def manifest(config: HarvestConfig, lm: LanguageModel, source: TextSource) -> dict[str, Any]:
    """Everything that the store's bytes follow from."""
    template = {"chat_template": lm.tokenizer.template_digest} if source.chats else {}
    return {
        "site": "resid_post",
        "model": lm.identity | template,
        "isolation": lm.isolation,
        "text": source.identity(),
        "tokens": config.tokens,
        "context": config.context,
        "seed": config.seed,
        "unit": config.unit_tokens,
        "chunk": config.chunk_rows,
        "batch": config.batch,
        "codec": config.codec,
        "environment": environment.of_harvest(torch.device(lm.config.device)),
    }


def harvest(config: HarvestConfig, lm: LanguageModel, source: TextSource) -> Store:
    """Bring the store to what `config` asks for, from wherever it stands, beside whoever else is at
    work on it.

    Raises:
        MismatchError: the store there was made with other settings.
        StoreError: the disk is too small, or what is on it is damaged.
        Interrupted: SIGINT or SIGTERM arrived; everything committed stays.
    """
    check_layers(config, lm)
    lm.isolation = choose_isolation(lm)
    place, began = place_of(config.store), time.monotonic()
    settings = manifest(config, lm, source)
    agree(place, settings)  # before anything is made in a folder that may be no store
    with closing(place.claims(config.rank, config.world)) as claims, StopRequest() as stop:
        whole_spine = retention.needs_whole_spine(place, claims, config.max_bytes)
        store = Store.open_or_create(place, settings)
        with Spine(store, claims, source, lm.tokenizer, stop) as text:
            if whole_spine:
                text.wait()
            else:
                text.wait_for(unit=0)
            check(store, lm, config.layers)
            before = store.units - len(store.missing(config.layers))
            if before:
                tell(f"going on: {before} of {store.units} units are committed")
            _fit_codec(store, lm, config.layers)
            with claims.held(METADATA):
                store.declare(config.layers)
            room = ring.join(store, config.layers, claims, config.max_bytes, config.readers)
            tokens = make(store, lm, config.layers, claims, text, stop, config.faults, room)
            room.sweep()
        spine.tell_end(store)
        with claims.held(METADATA):
            _finish(store, config.layers)
    spent = time.monotonic() - began
    if tokens:
        share = f", {tokens:,} of them made here" if tokens < store.rows else ""
        speed = f"{duration(spent)}, {tokens / spent:,.0f} tokens/s"
        tell(f"{store.name} is complete: {store.rows:,} tokens{share} in {speed}")
    else:
        tell(f"{store.name} is complete: {store.units} units, {store.rows:,} rows a layer")
    return store


def _finish(store: Store, layers: Sequence[int]) -> None:
    """What can be said of whole layers only: their statistics, and the final shapes."""
    for layer in layers:
        summary.write(store, layer)
    store.declare(layers)


def _fit_codec(store: Store, lm: LanguageModel, layers: Sequence[int]) -> None:
    """Fit a lossy codec to the rows of unit 0, before the first row is written."""
    lacking = codec.unfitted(store.manifest["codec"], store.place, layers)
    if lacking:
        rows = unit_residuals(store, lm, 0, lacking, store.manifest["batch"])
        bos = torch.from_numpy(store.piece_starts(0).ravel())
        for layer, of_layer in rows.items():
            codec.fit(store.place, layer, of_layer, bos.to(of_layer.device))


# -- units --------


class OutOfMemory(PipelineError):
    """A batch of `batch` packed rows of unit `unit` did not fit in memory; nothing of the unit was
    written.
    """

    def __init__(self, unit: int, batch: int) -> None:
        super().__init__(
            f"unit {unit}: a batch of {batch} rows does not fit in memory; what was committed before is intact. Go on "
            "with oom=halve (smaller batches may change bits, and are recorded), or begin another store= with less "
            "batch= or context="
        )
        self.unit, self.batch = unit, batch


_PATIENCE_S = 60.0  # without a commit by another rank, where no lock says whether it lives
_PATIENCE_UNITS = 10  # or this many times what a unit takes here, if that is longer


def make(
    store: Store,
    lm: LanguageModel,
    layers: Sequence[int],
    claims: Claims,
    spine: Spine,
    stop: StopRequest,
    faults: Faults,
    room: KeepAll | Ring,
) -> int:
    """Make and commit units until every one of `layers` is whole; how many tokens were made here.

    Args:
        room: on the disk: units are made in its order, when it admits them.
    """
    progress, began, batch, tokens = Progress(), time.monotonic(), int(store.manifest["batch"]), 0
    with Writer(store, claims, faults, lm.config.device) as writer:
        for unit, lacking in _to_make(store, layers, claims, spine, stop, writer, room):
            rows, batch = _computed(store, lm, unit, lacking, batch, stop, faults)
            stop.check()
            writer.submit(unit, rows, batch if batch != store.manifest["batch"] else None)
            tokens += store.rows_of(unit)
            rate = tokens / (time.monotonic() - began)
            progress.show(_line(store, layers, tokens, rate, writer.written))
    for layer in layers:
        if bad := store.non_finite(layer):
            tell(
                f"layer {layer}: {bad} rows hold NaN or infinity; they are stored, counted and never served"
            )
    return tokens


def _computed(
    store: Store,
    lm: LanguageModel,
    unit: int,
    layers: list[int],
    batch: int,
    stop: StopRequest,
    faults: Faults,
) -> tuple[dict[int, torch.Tensor], int]:
    """A unit's rows, and the batch that they were made with."""
    while True:
        try:
            return unit_residuals(store, lm, unit, layers, batch, stop), batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if faults.oom == "stop" or batch == 1:
                raise OutOfMemory(unit, batch) from error
        batch //= 2
        tell(
            f"unit {unit}: out of memory; going on with batch={batch}, which is recorded, since bits may differ"
        )
        if lm.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _to_make(
    store: Store,
    layers: Sequence[int],
    claims: Claims,
    spine: Spine,
    stop: StopRequest,
    writer: Writer,
    room: KeepAll | Ring,
) -> Iterator[tuple[int, list[int]]]:
    """Units that are ours to make, with the layers that each lacks, until there are none that
    anybody has to make.
    """
    others = _Others(claims)
    while True:
        took, missing = 0, store.missing(layers)
        for unit, lacking in room.ordered(missing):
            stop.check()
            if not spine.ready(unit):
                break
            if not room.admits(unit):
                break
            if unit in writer.holds or not claims.take(unit_claim(unit)):
                continue
            if store.committed_meanwhile(unit, lacking):
                claims.release(unit_claim(unit))
                continue
            room.clear(unit)
            began = time.monotonic()
            yield unit, lacking
            others.unit_s, took = time.monotonic() - began, took + 1
        if not took:
            writer.wait()
            spine.follow()
            if store.spine_complete and not store.missing(layers):
                return
            stop.check()
            others.wait(store, layers)


class _Others:
    """Waiting for what other ranks have in hand; where no lock says whether they live, their
    silence does.
    """

    def __init__(self, claims: Claims) -> None:
        self._claims, self.unit_s = claims, 0.0
        self._missing, self._since = -1, time.monotonic()

    def wait(self, store: Store, layers: Sequence[int]) -> None:
        missing = len(store.missing(layers))
        if missing != self._missing:
            self._missing, self._since = missing, time.monotonic()
        silence = time.monotonic() - self._since
        if not self._claims.exact and silence > max(_PATIENCE_S, _PATIENCE_UNITS * self.unit_s):
            tell(
                f"no other rank has committed anything for {duration(silence)}: taking over their {missing} units"
            )
            self._claims.take_over()
        time.sleep(POLL_S)


def _line(store: Store, layers: Sequence[int], tokens: int, rate: float, written: int) -> str:
    have = int(np.min([store.committed(layer).sum() for layer in layers]))
    left = duration((store.units - have) * store.unit_tokens / rate)
    return (
        f"{have}/{store.units} units | {tokens:,} tokens here | {rate:,.0f} tokens/s | "
        f"{size(written)} at {size(written * rate / max(tokens, 1))}/s | ETA {left}"
    )
