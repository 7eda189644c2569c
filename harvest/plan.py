"""What a harvest will take, before any weight is read: rows, bytes, disk, memory, hours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from residual_saes.data import order
from residual_saes.data.device import free_bytes
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.journal import Progress, duration, size, tell
from residual_saes.data.site import RESID_POST, SITES, HookPoint
from residual_saes.data.store import retention, ring_state
from residual_saes.data.store.arrays import rows_name
from residual_saes.data.store.codec import EXPECTED_RATIO
from residual_saes.data.store.ledger import count_residuals
from residual_saes.data.store.place import place_of
from residual_saes.harvest.config import HarvestConfig, check_layers
from residual_saes.harvest.cost import Cost
from residual_saes.harvest.forward import batch_residuals
from residual_saes.harvest.isolation import forward_inputs
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.writer import IN_FLIGHT

_SPINE_BYTES = 3.0  # tokens, document and token_index per token, compressed
_NORM_BYTES = 4  # per row and hook point
_PROBES = 3  # passes that are timed; the first also warms up
# Share of the speed of one large matrix product that a forward pass reaches: 30 to 50 % of the
# peak are usual on a GPU with models of this size.
_REACHED = 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes that a harvest holds in the memory of its device, and that no setting of the system
    can take back from it.
    """

    weights: int  # up to the deepest layer; on a CPU those alone that are not mapped files
    mapped: int  # of weights that stay in their files: they take what is free, and no more
    activations: int  # of one forward pass
    units: int  # residuals that are made and not yet written
    check: int  # of the self-check, before the first forward pass

    @property
    def total(self) -> int:
        """The peak: at the self-check, or while units are made."""
        return self.weights + max(self.check, self.activations + self.units)

    def line(self, device: str, free: int | None) -> str:
        """These figures as text, beside the `free` bytes of the device."""
        of = "" if free is None else f" of {size(free)} that are free"
        mapped = f"; {size(self.mapped)} of weights stay in their files" if self.mapped else ""
        return (
            f"about {size(self.total)}{of} on {device}: {size(self.weights)} of weights, "
            f"{size(self.activations)} for a forward pass, {size(self.units)} of units on their "
            f"way to the disk, before these {size(self.check)} for the self-check{mapped}"
        )


@dataclass(frozen=True)
class Plan:
    """The size of the work."""

    tokens: int
    rows: int  # packed rows of `context` tokens
    units: int
    points: list[HookPoint]
    codec: str
    raw_bytes: int  # of all residuals as bfloat16
    expected_bytes: int  # still to be written
    ring_bytes: int | None  # most bytes of residuals at a time; None: no limit
    disk_bytes: int  # room needed for what is still to be written
    free_bytes: int | None  # None where that is unbounded or unknown
    model: Cost
    memory: Memory
    device: str
    device_bytes: int | None  # free memory of the device; None if unknown

    def figures(self) -> dict[str, str]:
        """The plan as text, by what it is about."""
        alone = "; nothing can be held out of a single unit: for training, lower unit="
        free = "room unknown" if self.free_bytes is None else f"{size(self.free_bytes)} free"
        ring = ""
        if self.ring_bytes:
            ring = f"; a ring of {size(self.ring_bytes)} needs {size(self.disk_bytes)}"
        by_codec: list[str] = []
        for codec, ratio in EXPECTED_RATIO.items():
            by_codec.append(f"{size(self.raw_bytes / ratio)} with codec={codec}")
        return {
            "read": _listed(self.points),
            "tokens": f"{self.tokens:,} in {self.rows:,} rows and {self.units:,} units"
            f"{alone if self.units == 1 else ''}",
            "disk": f"{size(self.raw_bytes)} of residuals, about {size(self.expected_bytes)} "
            f"still to write; {free}{ring}",
            "codec": f"about {', '.join(by_codec)}",
            "memory": self.memory.line(self.device, self.device_bytes),
        }

    def hours(self, tokens_per_s: float, world: int, how: str) -> str:
        """The duration of the whole run, as text.

        Args:
            tokens_per_s: of one process.
            how: where that figure is from.
        """
        rate = tokens_per_s * world
        written = self.expected_bytes / self.tokens * rate
        return (
            f"{duration(self.tokens / rate)} at {tokens_per_s:,.0f} tokens/s {how}, "
            f"world={world}, writing {size(written)}/s; {self.model.flop / 1e9:.3g} GFLOP a token"
        )


def plan(
    config: HarvestConfig,
    model: Cost,
    d_model: int,
    device: str,
    done: float = 0.0,
    *,
    copied: float = 1.0,
) -> Plan:
    """The plan for `config`.

    Args:
        done: share of the residuals that is stored already.
        copied: share of the weights that a CPU copies, because their files have another type.

    Raises:
        SettingError: max_bytes= is too small for a ring that training could follow.
    """
    place = place_of(config.store)
    rows = -(-config.tokens // config.context)
    tokens = rows * config.context
    points = len(config.points)
    raw = tokens * d_model * 2 * points
    to_write = raw / EXPECTED_RATIO[config.codec] * (1 - done)
    beside = tokens * (_NORM_BYTES * points + _SPINE_BYTES) * (1 - done)
    limit = _ring_bytes(config, d_model)
    disk = to_write
    if limit is not None:
        present = sum(sum(place.sizes(rows_name(point)).values()) for point in config.points)
        disk = min(disk, max(0, limit - present))
    return Plan(
        tokens=tokens,
        rows=rows,
        units=config.units,
        points=config.points,
        codec=config.codec,
        raw_bytes=raw,
        expected_bytes=round(to_write + beside),
        ring_bytes=limit,
        disk_bytes=round(disk + beside),
        free_bytes=place.free_bytes(),
        model=model,
        memory=_memory(config, model, d_model, device, copied),
        device=device,
        device_bytes=free_bytes(torch.device(device)),
    )


def _memory(config: HarvestConfig, model: Cost, d_model: int, device: str, copied: float) -> Memory:
    unit_bytes = min(config.unit_tokens, config.tokens) * d_model * 2 * len(config.points)
    if device.startswith("cuda"):
        # One unit is computed while others are permuted, a hook point at a time, on to the host.
        units = unit_bytes * (1 + IN_FLIGHT * (1 + 1 / len(config.points)))
        return Memory(model.kept_bytes, 0, model.activation_bytes, round(units), model.check_bytes)
    # A CPU computes a unit for longer than it takes to write one, so a single one is written
    # meanwhile, from a permuted copy. Freed memory is kept, and its holes add up to a unit.
    # Measured: 2.57 GB where this gives 2.70 (width 2,560).
    weights = round(model.kept_bytes * copied)
    mapped = model.kept_bytes - weights
    units = unit_bytes * 4
    return Memory(weights, mapped, model.activation_bytes, units, model.check_bytes)


def _ring_bytes(config: HarvestConfig, d_model: int) -> int | None:
    """Most bytes of residuals at a time: as asked, or as the store was made; None: no limit."""
    if config.max_bytes is None:
        return retention.read(place_of(config.store)).max_bytes
    held_out = len(order.held_out(config.units, config.seed))
    points = len(config.points)
    unit_bytes = ring_state.unit_bytes(config.unit_tokens, config.chunk_rows, d_model, points)
    ring_state.span_of(config.max_bytes, held_out, unit_bytes)  # raises for a ring too small
    return config.max_bytes


def share_done(config: HarvestConfig) -> float:
    """Share of the asked hook points' units that are committed already."""
    committed = count_residuals(place_of(config.store), config.points)
    # A store made with other settings may have more units than are asked for. It is refused later.
    return min(1.0, committed / (config.units * len(config.points)))


def require_fit(planned: Plan, store: str | Path, *, force: bool = False) -> None:
    """Check the plan against the machine.

    Args:
        force: say what does not fit, and go on.

    Raises:
        StoreError: the store does not fit on the disk.
        SettingError: the model does not fit on the device.
    """
    if planned.free_bytes is not None and planned.disk_bytes > planned.free_bytes:
        _refuse(
            StoreError,
            f"{store} needs about {size(planned.disk_bytes)} and its disk has "
            f"{size(planned.free_bytes)} free; give store= a larger disk, take fewer tokens=, "
            "layers or sites, or codec=int8, or train beside it with max_bytes=",
            force,
        )
    needed = planned.memory.total
    if planned.device_bytes is not None and needed > planned.device_bytes:
        _refuse(
            SettingError,
            f"the harvest needs about {size(needed)} of memory and device={planned.device} has "
            f"{size(planned.device_bytes)} free; lower batch=, context= or unit=, take "
            "model.dtype=bfloat16 or another device=",
            force,
        )


def _listed(points: Sequence[HookPoint]) -> str:
    """The hook points, by site: `layers 21, 27; mlp_in of layers 21, 27`."""
    listed: list[str] = []
    for site in SITES[::-1]:  # resid_post first
        layers = ", ".join(str(point.layer) for point in points if point.site == site)
        if layers:
            word = "layers" if "," in layers else "layer"
            listed.append(f"{'' if site == RESID_POST else f'{site} of '}{word} {layers}")
    return "; ".join(listed)


def _refuse(kind: Callable[[str], Exception], reason: str, force: bool) -> None:
    if not force:
        raise kind(f"{reason}; force=true goes on as it is")
    tell(f"warning: {reason}")


# -- speed -----------------------------------------------------------------------------------------


def guess(planned: Plan, dtype: str) -> float:
    """Tokens/s of the forward pass, guessed from the speed of one matrix product here."""
    device = torch.device(planned.device)
    n = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(n, n, dtype=getattr(torch, dtype), device=device)
    seconds: list[float] = []
    for _ in range(_PROBES):
        began = time.monotonic()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.monotonic() - began)
    flops = 2.0 * n**3 / max(min(seconds), 1e-9)
    return _REACHED * flops / planned.model.flop


def probe(lm: LanguageModel, config: HarvestConfig) -> float:
    """Tokens/s of the forward pass to the deepest layer, on random tokens in single pieces."""
    check_layers(config, lm)
    shape = (config.batch, config.context)
    tokens = np.random.default_rng(0).integers(0, lm.vocabulary, shape, dtype=np.uint32)
    starts = np.zeros(shape, np.bool_)
    starts[:, 0] = True
    passes = forward_inputs(tokens, starts, "packed")
    progress = Progress()
    speeds: list[float] = []
    for number in range(_PROBES):
        progress.show(f"probe: batch {number + 1} of {_PROBES}, {tokens.size:,} tokens")
        began = time.monotonic()
        residuals = batch_residuals(lm, passes, config.points)
        residuals[config.points[0]][-1].cpu()  # waits for the device, so that its work is timed
        speeds.append(tokens.size / (time.monotonic() - began))
    progress.close()
    return max(speeds)
