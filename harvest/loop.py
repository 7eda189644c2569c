"""Stage one: text -> tokens -> residuals -> store.

The spine (which token stands where) is committed first, by one reader of the text. Residuals are then a pure function
of a spine unit, so that any unit can be made at any time, by anyone, with the same bits.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from data import durable, text
from data.errors import MismatchError, PipelineError, SettingError, StopRequest, StoreError, differences
from data.journal import Progress, duration, tell
from data.store import SpineEnd, Store
from data.verify import damage
from harvest.lm import LanguageModel, choose_isolation, forward_inputs, run, truncate_checked_
from harvest.plan import HarvestConfig, plan, require_room, size

_CHECKED_ROWS = 2  # the reference keeps the hidden states of all layers: 0.44 GB at 43 x 2 x 1,024 x 2,560 in bfloat16
_TOLERATED_NON_FINITE = 1e-3  # share of a unit's rows; above it the model, not a token, is broken


def environment(device: str) -> dict[str, Any]:
    """What bits depend on besides the settings."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    if device.startswith("cuda"):
        return {**found, "device": torch.cuda.get_device_name(device)}
    return {**found, "device": "cpu", "threads": torch.get_num_threads()}


def manifest(config: HarvestConfig, lm: LanguageModel, source: text.TextSource) -> dict[str, Any]:
    """Everything that the store's bytes follow from."""
    return {
        "site": "resid_post",
        "model": lm.identity,
        "isolation": lm.isolation,
        "text": source.identity(),
        "tokens": config.tokens,
        "context": config.context,
        "seed": config.seed,
        "unit": config.unit_tokens,
        "chunk": config.chunk_rows,
        "batch": config.batch,
        "codec": config.codec,
        "environment": environment(lm.config.device),
    }


def check_layers(config: HarvestConfig, lm: LanguageModel) -> None:
    """Raise SettingError for layers or a context that the model does not have."""
    beyond = [layer for layer in config.layers if layer >= lm.n_layers]
    if beyond:
        raise SettingError(
            f"layer={beyond[0]} is out of range: {lm.identity['id']} has layers 0 to {lm.n_layers - 1}; choose layer="
        )
    if config.context > lm.max_context:
        raise SettingError(f"context={config.context} is more than the model's {lm.max_context} positions")


def harvest(config: HarvestConfig, lm: LanguageModel, source: text.TextSource) -> Store:
    """Bring the store to what `config` asks for, from wherever it stands.

    Raises:
        MismatchError: the store there was made with other settings.
        StoreError: the disk is too small, or what is on it is damaged.
        Interrupted: SIGINT or SIGTERM arrived; everything committed stays.
    """
    check_layers(config, lm)
    lm.isolation = choose_isolation(lm)
    planned = plan(config, lm.d_model, config.layers, share_done(config))
    tell(*planned.lines())
    require_room(planned, config.store)
    busy = f"{config.store} is being written by another process; wait for it or stop it"
    with durable.locked(config.store, busy), StopRequest() as stop:
        store = Store.open_or_create(config.store, manifest(config, lm, source))
        write_spine(store, lm, source, stop)
        store.declare_layers(config.layers)
        todo = store.missing(config.layers)
        _check(store, lm, config.layers)
        if len(todo) < store.units:
            tell(f"going on: {store.units - len(todo)} of {store.units} units are committed")
        write_residuals(store, lm, todo, stop)
    return store


def share_done(config: HarvestConfig) -> float:
    """Share of the asked layers' units that are committed already."""
    if not (config.store / "zarr.json").exists():
        return 0.0
    store = Store.open(config.store)
    lacking = sum(map(len, store.missing(config.layers).values()))
    return 1 - lacking / max(1, store.units * len(config.layers))


def write_spine(store: Store, lm: LanguageModel, source: text.TextSource, stop: StopRequest) -> None:
    """Commit the spine units that are missing, and the spine's end."""
    if store.spine_complete:
        return
    planned, progress = store.spine_rows, Progress()
    unit_rows = store.unit_tokens // store.context
    written, ended = store.spine_written(), False
    while written < planned and not ended:
        unit, cursor = store.spine_cursor()
        documents = text.tokenized(source.documents(cursor.document), lm.encode)
        rows = text.pack(documents, cursor, store.context, lm.bos)
        while written < planned and not ended and store.spine_cursor()[0] == unit:
            stop.check()
            block = list(islice(rows, min(unit_rows, planned - unit * unit_rows)))
            if block:
                tokens, document = np.stack([r.tokens for r in block]), np.stack([r.document for r in block])
                store.commit_spine(unit, tokens, document, block[-1].end)
            ended = len(block) < min(unit_rows, planned - unit * unit_rows)
            unit, written = unit + 1, written + len(block)
            line = f"tokens: {written * store.context:,} of {planned * store.context:,}"
            progress.show(line, last=written >= planned)
    if written == 0:
        raise StoreError(f"the text ends before one row of context={store.context} tokens is full; give more text")
    if ended:
        tell(
            f"the text ended at {written * store.context:,} of {planned * store.context:,} tokens: the store ends there"
        )
    if store.spine_end is None:
        store.close_spine(SpineEnd(written, ended_early=ended))


def compute_unit(store: Store, lm: LanguageModel, unit: int, layers: list[int]) -> dict[int, NDArray[np.uint16]]:
    """Residuals of one unit, in spine order: (n, d) bfloat16 bits per layer. A pure function of the spine."""
    tokens, starts = store.tokens(unit), store.piece_starts(unit)
    out = {layer: np.empty((tokens.size, lm.d_model), np.uint16) for layer in layers}
    for at in range(0, len(tokens), store.manifest["batch"]):
        part = slice(at, at + store.manifest["batch"])
        passes = forward_inputs(tokens[part], starts[part], lm.isolation)
        first = at * store.context
        for layer, rows in run(lm, passes, layers).items():
            # Waits for the device: the rows are needed on the host before the next batch reuses its memory.
            out[layer][first : first + len(rows)] = rows.cpu().view(torch.uint16).numpy()
    return out


def write_residuals(store: Store, lm: LanguageModel, todo: dict[int, list[int]], stop: StopRequest) -> None:
    """Make and commit the units of `todo`; one is written while the next is made."""
    if not todo:
        tell(f"{store.path} is complete: {store.units} units, {store.rows:,} rows a layer")
        return
    progress, began, done, written = Progress(), time.monotonic(), 0, 0
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="commit") as writer:
        for number, (unit, layers) in enumerate(todo.items(), 1):
            rows = compute_unit(store, lm, unit, layers)
            _require_finite(store, unit, rows)
            if pending is not None:
                pending.result()
            stop.check()
            pending = writer.submit(store.commit_residuals, unit, rows)
            done += sum(map(len, rows.values())) // len(layers)
            written += sum(bits.nbytes for bits in rows.values())
            rate = done / (time.monotonic() - began)
            left = duration((len(todo) - number) * store.unit_tokens / rate)
            line = f"unit {number}/{len(todo)} | {done:,} tokens | {rate:,.0f} tokens/s | {size(written)} | ETA {left}"
            progress.show(line, last=number == len(todo))
        assert pending is not None
        pending.result()
    for layer in sorted({layer for layers in todo.values() for layer in layers}):
        if bad := store.non_finite(layer):
            tell(f"layer {layer}: {bad} rows hold NaN or infinity; they are stored, counted and never served")
    spent = time.monotonic() - began
    tell(f"{store.path} is complete: {done:,} tokens in {duration(spent)}, {done / spent:,.0f} tokens/s")


def _require_finite(store: Store, unit: int, rows: dict[int, NDArray[np.uint16]]) -> None:
    for layer, bits in rows.items():
        # All exponent bits set: infinity or NaN.
        bad = int(((bits & np.uint16(0x7F80)) == np.uint16(0x7F80)).any(1).sum())
        if bad > _TOLERATED_NON_FINITE * len(bits):
            raise PipelineError(
                f"layer {layer} gave {bad} of {len(bits)} rows with NaN or infinity in unit {unit} of {store.path}; "
                "nothing of it was written; try model.dtype=float32 or another layer"
            )


def _check(store: Store, lm: LanguageModel, layers: tuple[int, ...]) -> None:
    """The self-check of every start, and on a store that has units the recomputation of one of them."""
    batch = slice(0, _CHECKED_ROWS)
    passes = forward_inputs(store.tokens(0)[batch], store.piece_starts(0)[batch], lm.isolation)
    truncate_checked_(lm, passes, layers)
    missing = store.missing(layers)
    for unit in range(store.units):
        committed = [layer for layer in layers if layer not in missing.get(unit, [])]
        if committed:
            require_same(store, lm, unit, committed)
            return


def require_same(store: Store, lm: LanguageModel, unit: int, layers: list[int]) -> None:
    """Recompute one committed unit; raise StoreError unless the store holds the very same bits."""
    permutation = store.permutation(unit)
    for layer, bits in compute_unit(store, lm, unit, layers).items():
        wrong = int((store.residuals(layer, unit) != bits[permutation]).any(1).sum())
        if wrong:
            raise StoreError(
                f"unit {unit} of layer {layer} in {store.path} differs in {wrong} of {len(bits)} rows when recomputed "
                "here; go on where the store was begun, or harvest into another store="
            )


def verify(path: Path, lm: LanguageModel) -> str:
    """Check every digest of the store, and one random unit through the model; what was found to be right.

    Raises:
        StoreError: something is wrong; a line for each object.
    """
    if wrong := [line for _, lines in damage(path) for line in lines]:
        raise StoreError("\n".join([*wrong, f"`python -m harvest action=repair store={path}` drops these units"]))
    store = Store.open(path)
    if unequal := differences(store.manifest["model"], lm.identity):
        raise MismatchError(f"store {path}", unequal, "Give the model it was made with as model= or model.path=.")
    if not store.spine_complete:
        raise StoreError(f"{path}: some units of its text have no record; run its `python -m harvest` again")
    missing = store.missing(store.layers)
    committed = [unit for unit in range(store.units) if unit not in missing]
    if not committed or not store.layers:
        return f"{path}: every object holds the bytes that were committed; no unit has residuals yet"
    lm.isolation = store.manifest["isolation"]
    lm.truncate_(max(store.layers))
    unit = random.choice(committed)
    require_same(store, lm, unit, store.layers)
    return f"{path}: every object holds the bytes that were committed; unit {unit}, recomputed, is the same"


def status(path: Path) -> list[str]:
    """How far a store is, a line per layer."""
    store = Store.open(path)
    end = store.spine_end
    spine = f"{store.rows:,} tokens" + ("" if end else " planned, spine unfinished")
    if end and not store.spine_complete:
        spine += ", units of the text missing: harvest again"
    lines = [f"{path}: {spine}, {store.units} units, model {store.manifest['model']['id']}"]
    for layer in store.layers:
        lines.append(f"layer {layer}: {store.units - len(store.missing([layer]))} of {store.units} units")
    return lines
