"""What a harvest will take, before anything runs: rows, bytes, disk, memory, hours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import order
from data.device import free_bytes
from data.errors import SettingError, StoreError
from data.journal import duration, size
from data.store import retention, ring_state
from data.store.arrays import rows_name
from data.store.codec import EXPECTED_RATIO
from data.store.ledger import count_residuals
from data.store.place import place_of
from harvest.config import HarvestConfig, check_layers
from harvest.cost import Cost
from harvest.forward import batch_residuals
from harvest.isolation import forward_inputs
from harvest.model import LanguageModel

_SPINE_BYTES = 3.0  # tokens, document and token_index per token, compressed
_NORM_BYTES = 4  # per row and layer
_PROBES = 3  # passes that are timed; the first also warms up


@dataclass(frozen=True)
class Plan:
    """The size of the work."""

    tokens: int
    rows: int  # packed rows of `context` tokens
    units: int
    layers: tuple[int, ...]
    raw_bytes: int  # of all residuals as bfloat16
    expected_bytes: int  # still to be written
    ring_bytes: int | None  # most bytes of residuals at a time; None: no limit
    disk_bytes: int  # room needed for what is still to be written
    free_bytes: int | None  # None where that is unbounded or unknown
    model: Cost
    device_bytes: int | None  # free memory of the device; None if unknown

    def lines(self) -> list[str]:
        """The plan as text."""
        layers = ", ".join(map(str, self.layers))
        alone = "; nothing can be held out of a single unit: for training, lower unit="
        free = "room unknown" if self.free_bytes is None else f"{size(self.free_bytes)} free"
        ring = ""
        if self.ring_bytes:
            ring = f"; a ring of {size(self.ring_bytes)} needs {size(self.disk_bytes)}"
        memory = "" if self.device_bytes is None else f" of {size(self.device_bytes)}"
        return [
            f"plan: {self.tokens:,} tokens in {self.rows:,} rows and {self.units:,} units, "
            f"layers {layers}{alone if self.units == 1 else ''}",
            f"      {size(self.raw_bytes)} of residuals, about {size(self.expected_bytes)} still "
            f"to write; {free}{ring}",
            f"      {self.model.flop / 1e9:.3g} GFLOP a token; about "
            f"{size(self.model.peak_bytes)}{memory} on the device ({size(self.model.kept_bytes)} "
            "of weights in use)",
        ]

    def hours(self, tokens_per_s: float, world: int) -> str:
        """The duration of the whole run as text, at a measured speed of one process."""
        rate = tokens_per_s * world
        written = self.expected_bytes / self.tokens * rate
        return (
            f"      {tokens_per_s:,.0f} tokens/s in a short probe: {duration(self.tokens / rate)} "
            f"with world={world}, writing {size(written)}/s"
        )


def plan(config: HarvestConfig, model: Cost, d_model: int, device: str, done: float = 0.0) -> Plan:
    """The plan for `config`, of which the share `done` is stored already.

    Raises:
        SettingError: max_bytes= is too small for a ring that training could follow.
    """
    place = place_of(config.store)
    rows = -(-config.tokens // config.context)
    tokens = rows * config.context
    layers = len(config.layers)
    raw = tokens * d_model * 2 * layers
    to_write = raw / EXPECTED_RATIO[config.codec] * (1 - done)
    beside = tokens * (_NORM_BYTES * layers + _SPINE_BYTES) * (1 - done)
    limit = _ring_bytes(config, d_model)
    disk = to_write
    if limit is not None:
        present = sum(sum(place.sizes(rows_name(layer)).values()) for layer in config.layers)
        disk = min(disk, max(0, limit - present))
    return Plan(
        tokens=tokens,
        rows=rows,
        units=config.units,
        layers=config.layers,
        raw_bytes=raw,
        expected_bytes=round(to_write + beside),
        ring_bytes=limit,
        disk_bytes=round(disk + beside),
        free_bytes=place.free_bytes(),
        model=model,
        device_bytes=free_bytes(torch.device(device)),
    )


def _ring_bytes(config: HarvestConfig, d_model: int) -> int | None:
    """Most bytes of residuals at a time: as asked, or as the store was made; None: no limit."""
    if config.max_bytes is None:
        return retention.read(place_of(config.store)).max_bytes
    held_out = len(order.held_out(config.units, config.seed))
    layers = len(config.layers)
    unit_bytes = ring_state.unit_bytes(config.unit_tokens, config.chunk_rows, d_model, layers)
    ring_state.span_of(config.max_bytes, held_out, unit_bytes)  # raises for a ring too small
    return config.max_bytes


def share_done(config: HarvestConfig) -> float:
    """Share of the asked layers' units that are committed already."""
    committed = count_residuals(place_of(config.store), config.layers)
    # A store made with other settings may have more units than are asked for. It is refused later.
    return min(1.0, committed / (config.units * len(config.layers)))


def require_fit(planned: Plan, store: str | Path) -> None:
    """Check the plan against the machine.

    Raises:
        StoreError: the store does not fit on the disk.
        SettingError: the model does not fit on the device.
    """
    if planned.free_bytes is not None and planned.disk_bytes > planned.free_bytes:
        raise StoreError(
            f"{store} needs about {size(planned.disk_bytes)} and its disk has "
            f"{size(planned.free_bytes)} free; give store= a larger disk, take fewer tokens= or "
            "layers, or codec=int8, or train beside it with max_bytes="
        )
    if planned.device_bytes is not None and planned.model.peak_bytes > planned.device_bytes:
        raise SettingError(
            f"the model needs about {size(planned.model.peak_bytes)} and the device has "
            f"{size(planned.device_bytes)} free; lower batch= or context=, take "
            "model.dtype=bfloat16 or another device="
        )


def probe(lm: LanguageModel, config: HarvestConfig) -> float:
    """Tokens/s of the forward pass to the deepest layer, on random tokens in single pieces."""
    check_layers(config, lm)
    lm.truncate_(max(config.layers))
    shape = (config.batch, config.context)
    tokens = np.random.default_rng(0).integers(0, lm.vocabulary, shape, dtype=np.uint32)
    starts = np.zeros(shape, np.bool_)
    starts[:, 0] = True
    passes = forward_inputs(tokens, starts, "packed")
    speeds: list[float] = []
    for _ in range(_PROBES):
        began = time.monotonic()
        residuals = batch_residuals(lm, passes, config.layers)
        residuals[config.layers[0]][-1].cpu()  # waits for the device, so that its work is timed
        speeds.append(tokens.size / (time.monotonic() - began))
    return max(speeds)
