"""What a harvest will take, before anything runs: rows, bytes, disk, memory, hours."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data import order
from data.device import free_bytes
from data.errors import SettingError, StoreError
from data.journal import duration, size
from data.store import retention, ring_state
from data.store.arrays import rows_name
from data.store.codec import EXPECTED_RATIO, require_known
from data.store.ledger import count_residuals
from data.store.place import place_of
from harvest.cost import Cost
from harvest.forward import batch_residuals
from harvest.isolation import forward_inputs
from harvest.model import LanguageModel

# 335 MB a layer at width 2560; larger shards gain nothing and peak at 3x their size in memory
UNIT_TOKENS = 65_536
CHUNK_ROWS = 1024  # 5.2 MB at width 2560
_SPINE_BYTES = 3.0  # tokens, document and token_index per token, compressed


@dataclass(frozen=True)
class Faults:
    """What is done where the model or the machine fails."""

    oom: Literal["stop", "halve"] = (
        "stop"  # out of memory: stop, or go on with half the batch, which changes bits
    )
    non_finite: int = 0  # rows with NaN or infinity that a unit may have and still be committed

    def __post_init__(self) -> None:
        if self.oom not in ("stop", "halve"):
            raise SettingError(f"oom={self.oom} must be stop or halve")
        if self.non_finite < 0:
            raise SettingError(f"non_finite={self.non_finite} must be at least 0 (rows of a unit)")


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested into which store, and how."""

    store: Path | str  # folder, or URL of an object store
    layers: tuple[int, ...]
    tokens: int
    context: int = 1024  # tokens per packed row
    seed: int = 0
    batch: int = 16  # packed rows per forward pass; fixed, because another composition changes bits
    unit: int | None = None  # tokens per unit; None: 65,536, less for small stores
    chunk: int = CHUNK_ROWS  # rows per inner chunk
    codec: Literal["blosc", "none", "int8"] = "blosc"
    rank: int = (
        0  # of this process among those that make the store; matters only where there are no locks
    )
    world: int = 1  # how many there are
    faults: Faults = field(default_factory=Faults)  # decides no byte by itself
    max_bytes: int | None = (
        None  # of residuals on the disk at a time; None: all of them stay. Decides no byte either
    )
    readers: int = (
        1  # training runs that must have registered before any shard of such a ring is freed
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("tokens", 1),
            ("context", 2),
            ("batch", 1),
            ("chunk", 1),
            ("unit", 1),
            ("readers", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name}={value} must be at least {least}")
        if not 0 <= self.rank < self.world:
            raise SettingError(
                f"rank={self.rank} must be from 0 to world - 1, and world={self.world}"
            )
        require_known(self.codec)
        if not self.layers:
            raise SettingError("layer=[] asks for nothing; give a layer number or a list of them")
        if len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise SettingError(f"layer={list(self.layers)} must be different numbers from 0 on")
        if self.unit is not None and self.unit % self.context:
            raise SettingError(
                f"unit={self.unit} must be a multiple of context={self.context} (tokens)"
            )

    @property
    def unit_tokens(self) -> int:
        """Tokens per unit: by default such that a store has at least 32 of them, for the held-out
        share.
        """
        if self.unit is not None:
            return self.unit
        rows = max(1, min(UNIT_TOKENS, self.tokens // 32) // self.context)
        return self.context * (1 << rows.bit_length() - 1)

    @property
    def chunk_rows(self) -> int:
        """Rows per inner chunk: the largest divisor of the unit that is not above `chunk`."""
        unit = self.unit_tokens
        return next(rows for rows in range(min(self.chunk, unit), 0, -1) if unit % rows == 0)


@dataclass(frozen=True)
class Plan:
    """The size of the work."""

    tokens: int
    rows: int  # packed rows of `context` tokens
    units: int
    layers: tuple[int, ...]
    raw_bytes: int  # of all residuals as bfloat16
    expected_bytes: int  # still to be written
    ring_bytes: int | None  # residuals that are on the disk at a time, at most; None: all of them
    disk_bytes: int  # room that is needed for what is still to be written
    free_bytes: int | None  # None where that is unbounded or unknown
    model: Cost
    device_bytes: int | None  # memory of the device; None if unknown

    def lines(self) -> list[str]:
        """The plan as text."""
        free = "room unknown" if self.free_bytes is None else f"{size(self.free_bytes)} free"
        memory = "" if self.device_bytes is None else f" of {size(self.device_bytes)}"
        return [
            f"plan: {self.tokens:,} tokens in {self.rows:,} rows and {self.units:,} units, "
            f"layers {', '.join(map(str, self.layers))}"
            + (
                "; nothing can be held out of a single unit: for training, lower unit="
                if self.units == 1
                else ""
            ),
            f"      {size(self.raw_bytes)} of residuals, about {size(self.expected_bytes)} still to write; {free}"
            + (
                f"; a ring of {size(self.ring_bytes)} needs {size(self.disk_bytes)}"
                if self.ring_bytes
                else ""
            ),
            f"      {self.model.flop / 1e9:.3g} GFLOP a token; about {size(self.model.peak_bytes)}{memory} on the "
            f"device ({size(self.model.kept_bytes)} of weights in use)",
        ]

    def hours(self, tokens_per_s: float, world: int) -> str:
        """What the whole run will take at a measured speed of one process."""
        rate = tokens_per_s * world
        written = self.expected_bytes / self.tokens * rate
        return (
            f"      {tokens_per_s:,.0f} tokens/s in a short probe: {duration(self.tokens / rate)} with world={world}, "
            f"writing {size(written)}/s"
        )


def plan(config: HarvestConfig, model: Cost, d_model: int, device: str, done: float = 0.0) -> Plan:
    """The plan for `config`, of which the share `done` is stored already."""
    rows = -(-config.tokens // config.context)
    tokens = rows * config.context
    layers = len(config.layers)
    raw = tokens * d_model * 2 * layers
    # norms (4 bytes a row and layer) and the spine come on top
    residuals, beside = raw / EXPECTED_RATIO[config.codec], tokens * (4 * layers + _SPINE_BYTES)
    limit = _ring_bytes(config, d_model)
    disk = residuals * (1 - done)
    if limit is not None:
        place = place_of(config.store)
        there = sum(sum(place.sizes(rows_name(layer)).values()) for layer in config.layers)
        disk = min(disk, max(0, limit - there))
    return Plan(
        tokens=tokens,
        rows=rows,
        units=-(-tokens // config.unit_tokens),
        layers=config.layers,
        raw_bytes=raw,
        expected_bytes=round((residuals + beside) * (1 - done)),
        ring_bytes=limit,
        disk_bytes=round(disk + beside * (1 - done)),
        free_bytes=place_of(config.store).free_bytes(),
        model=model,
        device_bytes=free_bytes(torch.device(device)),
    )


def _ring_bytes(config: HarvestConfig, d_model: int) -> int | None:
    """Most bytes of residuals at a time, as asked or as the store was made; refused if no training
    could follow.
    """
    if config.max_bytes is None:
        return retention.read(place_of(config.store)).max_bytes
    held_out = len(order.held_out(-(-config.tokens // config.unit_tokens), config.seed))
    each = ring_state.unit_bytes(config.unit_tokens, config.chunk_rows, d_model, len(config.layers))
    ring_state.span_of(config.max_bytes, held_out, each)
    return config.max_bytes


def require_fit(planned: Plan, store: str | Path) -> None:
    """Raise StoreError if the plan does not fit on the disk, SettingError if the model does not fit
    on the device.
    """
    if planned.free_bytes is not None and planned.disk_bytes > planned.free_bytes:
        raise StoreError(
            f"{store} needs about {size(planned.disk_bytes)} and its disk has {size(planned.free_bytes)} free; "
            "give store= a larger disk, take fewer tokens= or layers, or codec=int8, or train beside it with max_bytes="
        )
    if planned.device_bytes is not None and planned.model.peak_bytes > planned.device_bytes:
        raise SettingError(
            f"the model needs about {size(planned.model.peak_bytes)} and the device has {size(planned.device_bytes)} "
            "free; lower batch= or context=, take model.dtype=bfloat16 or another device="
        )


_PROBES = 3  # passes that are timed; the first also warms up


def check_layers(config: HarvestConfig, lm: LanguageModel) -> None:
    """Raise SettingError for layers or a context that the model does not have."""
    beyond = [layer for layer in config.layers if layer >= lm.n_layers]
    if beyond:
        raise SettingError(
            f"layer={beyond[0]} is out of range: {lm.identity['id']} has layers 0 to {lm.n_layers - 1}; choose layer="
        )
    if config.context > lm.max_context:
        raise SettingError(
            f"context={config.context} is more than the model's {lm.max_context} positions"
        )


def share_done(config: HarvestConfig) -> float:
    """Share of the asked layers' units that are committed already."""
    units = -(-config.tokens // config.unit_tokens)
    # A store that was made with other settings, which is refused later, may have more units than
    # are asked for.
    return min(
        1.0, count_residuals(place_of(config.store), config.layers) / (units * len(config.layers))
    )


def probe(lm: LanguageModel, config: HarvestConfig) -> float:
    """Tokens per second of the forward pass to the deepest layer, on random tokens in single
    pieces.
    """
    check_layers(config, lm)
    lm.truncate_(max(config.layers))
    tokens = np.random.default_rng(0).integers(
        0, lm.vocabulary, (config.batch, config.context), dtype=np.uint32
    )
    starts = np.zeros(tokens.shape, np.bool_)
    starts[:, 0] = True
    passes = forward_inputs(tokens, starts, "packed")
    speeds = []
    for _ in range(_PROBES):
        began = time.monotonic()
        rows = batch_residuals(lm, passes, config.layers)
        rows[config.layers[0]][-1].cpu()  # waits for the device: the work must be done to be timed
        speeds.append(tokens.size / (time.monotonic() - began))
    return max(speeds)
