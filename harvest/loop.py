"""Stage one: text -> tokens -> residuals -> store.

The spine (which token stands where) is committed by one reader of the text. Residuals are then a pure function of a
spine unit, so that any unit can be made at any time, by anyone, with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import transformers

from data import claims, ring, scales, summary
from data.claims import Claims
from data.documents import TextSource
from data.errors import SettingError, StopRequest, StoreError
from data.journal import duration, size, tell
from data.ledger import count_residuals
from data.manifest import agree
from data.place import place_of
from data.ring import Ring
from data.sources import has_chats
from data.store import Store
from harvest import residuals, spine
from harvest.lm import LanguageModel, choose_isolation, forward_inputs, run, truncate_checked_
from harvest.plan import HarvestConfig
from harvest.residuals import compute_unit, prepared
from harvest.spine import Spine

_PROBES = 3  # passes that are timed; the first also warms up
_CHECKED_ROWS = 2  # the reference keeps the hidden states of all layers: 0.44 GB at 43 x 2 x 1,024 x 2,560 in bfloat16


def environment(device: str) -> dict[str, Any]:
    """What bits depend on besides the settings."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    if device.startswith("cuda"):
        return {**found, "device": torch.cuda.get_device_name(device)}
    return {**found, "device": "cpu", "threads": torch.get_num_threads()}


def manifest(config: HarvestConfig, lm: LanguageModel, source: TextSource) -> dict[str, Any]:
    """Everything that the store's bytes follow from."""
    template = {"chat_template": lm.tokenizer.template_digest} if has_chats(source) else {}
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


def harvest(config: HarvestConfig, lm: LanguageModel, source: TextSource) -> Store:
    """Bring the store to what `config` asks for, from wherever it stands, beside whoever else is at work on it.

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
    with closing(place.claims(config.rank, config.world)) as rights, StopRequest() as stop:
        if config.max_bytes is not None:
            ring.require_exact(rights, place)
        store = Store.open_or_create(place, settings)
        with Spine(store, rights, source, lm.tokenizer, stop) as text:
            # A ring needs the text's end: which units are held out follows from how many there are.
            text.wait(0 if config.max_bytes is None and ring.read(place) is None else None)
            _check(store, lm, config.layers)
            before = store.units - len(store.missing(config.layers))
            if before:
                tell(f"going on: {before} of {store.units} units are committed")
            if config.codec == "int8":
                _freeze_scales(store, lm, config.layers)
            with rights.held(claims.METADATA):
                store.declare(config.layers)
            joined = _join_ring(store, config, rights)
            tokens = residuals.make(store, lm, config.layers, rights, text, stop, config.faults, joined)
            if joined:
                joined.sweep()
        spine.tell_end(store)
        with rights.held(claims.METADATA):
            _finish(store, config.layers)
    spent = time.monotonic() - began
    if tokens:
        share = f", {tokens:,} of them made here" if tokens < store.rows else ""
        speed = f"{duration(spent)}, {tokens / spent:,.0f} tokens/s"
        tell(f"{store.name} is complete: {store.rows:,} tokens{share} in {speed}")
    else:
        tell(f"{store.name} is complete: {store.units} units, {store.rows:,} rows a layer")
    return store


def _join_ring(store: Store, config: HarvestConfig, rights: Claims) -> Ring | None:
    """The ring that the store is or becomes; None if it keeps everything."""
    if not store.spine_complete:
        return None
    held_out = summary.parts(store)[summary.HELD_OUT]
    joined = ring.join(store, config.layers, held_out, rights, config.max_bytes, config.readers)
    if joined:
        record = joined.record
        tell(
            f"a ring of {size(record.max_bytes)}, freed behind its readers in groups of {record.span} units: training "
            f"may start now, with `python -m train store={store.name}`"
        )
    return joined


def share_done(config: HarvestConfig) -> float:
    """Share of the asked layers' units that are committed already."""
    units = -(-config.tokens // config.unit_tokens)
    # A store that was made with other settings, which is refused later, may have more units than are asked for.
    return min(1.0, count_residuals(place_of(config.store), config.layers) / (units * len(config.layers)))


def probe(lm: LanguageModel, config: HarvestConfig) -> float:
    """Tokens per second of the forward pass to the deepest layer, on random tokens in single pieces."""
    check_layers(config, lm)
    lm.truncate_(max(config.layers))
    tokens = np.random.default_rng(0).integers(0, lm.vocabulary, (config.batch, config.context), dtype=np.uint32)
    starts = np.zeros(tokens.shape, np.bool_)
    starts[:, 0] = True
    passes = forward_inputs(tokens, starts, "packed")
    speeds = []
    for _ in range(_PROBES):
        began = time.monotonic()
        rows = run(lm, passes, config.layers)
        rows[config.layers[0]][-1].cpu()  # waits for the device: the work must be done to be timed
        speeds.append(tokens.size / (time.monotonic() - began))
    return max(speeds)


def _finish(store: Store, layers: Sequence[int]) -> None:
    """What can be said of whole layers only: their statistics, and the final shapes."""
    for layer in layers:
        summary.write(store, layer)
    store.declare(layers)


def _freeze_scales(store: Store, lm: LanguageModel, layers: Sequence[int]) -> None:
    """The statistics that a lossy codec needs before its first row: those of unit 0, whoever makes them."""
    if lacking := [layer for layer in layers if not scales.exist(store.place, layer)]:
        rows = compute_unit(store, lm, 0, lacking, store.manifest["batch"])
        bos = torch.from_numpy(store.piece_starts(0).ravel())
        for layer, one in rows.items():
            scales.freeze(store.place, layer, one, bos.to(one.device))


def _check(store: Store, lm: LanguageModel, layers: Sequence[int]) -> None:
    """The self-check of every start, and on a store that has units the recomputation of one of them."""
    batch = slice(0, _CHECKED_ROWS)
    passes = forward_inputs(store.tokens(0)[batch], store.piece_starts(0)[batch], lm.isolation)
    truncate_checked_(lm, passes, layers)
    have = {layer: store.committed(layer) for layer in layers}
    some = np.flatnonzero(np.any(list(have.values()), axis=0))
    if found := ring.read(store.place):
        some = np.intersect1d(some, found.held_out)  # others may be freed while this one is recomputed
    if len(some):
        unit = int(some[0])
        require_same(store, lm, unit, [layer for layer in layers if have[layer][unit]])


def require_same(store: Store, lm: LanguageModel, unit: int, layers: Sequence[int]) -> None:
    """Recompute one committed unit; raise StoreError unless the store holds the very same bits."""
    for layer in layers:
        batch = store.batch_of(layer, unit)
        again = prepared(store, unit, compute_unit(store, lm, unit, [layer], batch))[layer]
        wrong = int((store.residuals(layer, unit) != again.stored).any(1).sum())
        if wrong:
            raise StoreError(
                f"unit {unit} of layer {layer} in {store.name} differs in {wrong} of {len(again.stored)} rows when "
                "recomputed here; go on where the store was begun, or harvest into another store="
            )
