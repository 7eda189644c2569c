"""What a harvest will take, before anything runs: rows, bytes, disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.codec import require_known
from data.errors import SettingError, StoreError

UNIT_TOKENS = 65_536  # 335 MB a layer at width 2560; larger shards gain nothing and peak at 3x their size in memory
CHUNK_ROWS = 1024  # 5.2 MB at width 2560
_EXPECTED_RATIO = {"blosc": 1.45, "none": 1.0}  # measured on residuals of two models
_SPINE_BYTES = 3.0  # tokens, document and token_index per token, compressed


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested into which store. Every field is recorded in the manifest but the path."""

    store: Path
    layers: tuple[int, ...]
    tokens: int
    context: int = 1024  # tokens per packed row
    seed: int = 0
    batch: int = 16  # packed rows per forward pass; fixed, because another composition changes bits
    unit: int | None = None  # tokens per unit; None: 65,536, less for small stores
    chunk: int = CHUNK_ROWS  # rows per inner chunk
    codec: Literal["blosc", "none"] = "blosc"

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("context", 2), ("batch", 1), ("chunk", 1), ("unit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name}={value} must be at least {least}")
        require_known(self.codec)
        if not self.layers:
            raise SettingError("layer=[] asks for nothing; give a layer number or a list of them")
        if len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise SettingError(f"layer={list(self.layers)} must be different numbers from 0 on")
        if self.unit is not None and self.unit % self.context:
            raise SettingError(f"unit={self.unit} must be a multiple of context={self.context} (tokens)")

    @property
    def unit_tokens(self) -> int:
        """Tokens per unit: by default such that a store has at least 32 of them, for the held-out share."""
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
    expected_bytes: int  # still to be written to disk
    free_bytes: int

    def lines(self) -> list[str]:
        """The plan as text."""
        return [
            f"plan: {self.tokens:,} tokens in {self.rows:,} rows and {self.units:,} units, "
            f"layers {', '.join(map(str, self.layers))}"
            + ("; nothing can be held out of a single unit: for training, lower unit=" if self.units == 1 else ""),
            f"      {size(self.raw_bytes)} of residuals, about {size(self.expected_bytes)} still to write; "
            f"{size(self.free_bytes)} free",
        ]


def size(count: float) -> str:
    """Bytes as people say them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def plan(config: HarvestConfig, d_model: int, layers: Sequence[int], done: float = 0.0) -> Plan:
    """The plan for `layers`, of which the share `done` is on disk already."""
    rows = -(-config.tokens // config.context)
    tokens = rows * config.context
    raw = tokens * d_model * 2 * len(layers)
    # norms (4 bytes a row and layer) and the spine come on top
    expected = raw / _EXPECTED_RATIO[config.codec] + tokens * (4 * len(layers) + _SPINE_BYTES)
    existing = next(folder for folder in (config.store, *config.store.absolute().parents) if folder.exists())
    return Plan(
        tokens=tokens,
        rows=rows,
        units=-(-tokens // config.unit_tokens),
        layers=tuple(layers),
        raw_bytes=raw,
        expected_bytes=round(expected * (1 - done)),
        free_bytes=shutil.disk_usage(existing).free,
    )


def require_room(planned: Plan, store: Path) -> None:
    """Raise StoreError if the plan does not fit on the disk of `store`."""
    if planned.expected_bytes > planned.free_bytes:
        raise StoreError(
            f"{store} needs about {size(planned.expected_bytes)} and its disk has {size(planned.free_bytes)} free; "
            "give store= a larger disk, or take fewer tokens= or layers"
        )
