"""The configuration of a harvest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from residual_saes.data.errors import SettingError
from residual_saes.data.site import RESID_POST, HookPoint, require_site
from residual_saes.data.store.codec import require_known
from residual_saes.harvest.encoder import Bad
from residual_saes.harvest.model import LanguageModel

# 335 MB a layer at width 2560. Larger shards gain nothing, and peak at 3 times their size in
# memory.
UNIT_TOKENS = 65_536
# Tokens that a unit has at least before a store is cut in more than 16 of them. A unit costs .02 s
# of a core beside its rows, which is as much as 512 rows of a small model.
_SMALL_UNIT = 1024
CHUNK_ROWS = 1024  # 5.2 MB at width 2560
# The least value of each setting.
_LEAST = {"tokens": 1, "context": 2, "batch": 1, "chunk": 1, "unit": 1, "readers": 1}


@dataclass(frozen=True)
class Faults:
    """What happens where the text, the model or the machine fails."""

    # out of memory: stop, or go on with half the batch, which changes bits
    oom: Literal["stop", "halve"] = "stop"
    non_finite: int = 0  # rows with NaN or infinity that a committed unit may have
    bad: Bad = "stop"  # a document that cannot be stored: stop, or skip (leave out and count) it

    def __post_init__(self) -> None:
        if self.oom not in ("stop", "halve"):
            raise SettingError(f"oom={self.oom} must be stop or halve")
        if self.bad not in ("stop", "skip"):
            raise SettingError(f"text.bad={self.bad} must be stop or skip")
        if self.non_finite < 0:
            raise SettingError(f"non_finite={self.non_finite} must be at least 0 (rows of a unit)")


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested into which store, and how.

    `rank`, `world`, `faults`, `max_bytes` and `readers` decide no byte of the store.
    """

    store: Path | str  # folder, or URL of an object store
    layers: tuple[int, ...]
    tokens: int
    context: int = 1024  # tokens per packed row
    max_tokens: int | None = None  # tokens of a document, BOS included; None: all of them
    seed: int = 0
    batch: int = 16  # packed rows per forward pass; another number changes bits
    unit: int | None = None  # tokens per unit; None: 65,536, less for small stores
    chunk: int = CHUNK_ROWS  # rows per inner chunk
    sites: tuple[str, ...] = (RESID_POST,)  # where in these layers rows are taken
    codec: Literal["blosc", "none", "int8"] = "blosc"
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto"  # in packed rows
    rank: int = 0  # of this process, from 0 to world - 1: where it begins its walk over the units
    world: int = 1  # processes that make the store
    faults: Faults = field(default_factory=Faults)
    max_bytes: int | None = None  # of residuals on the disk at a time; None: all of them stay
    readers: int = 1  # training runs that must register before a ring frees anything

    def __post_init__(self) -> None:
        if self.attention not in ("auto", "sdpa", "flash", "flex"):
            raise SettingError(f"attention={self.attention} must be auto, sdpa, flash or flex")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name}={value} must be at least {least}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise SettingError(
                f"text.max_tokens={self.max_tokens} must be at least 2: a BOS and a token behind it"
            )
        if not 0 <= self.rank < self.world:
            raise SettingError(
                f"rank={self.rank} must be from 0 to world - 1, and world={self.world}"
            )
        require_known(self.codec)
        if not self.sites:
            raise SettingError("site=[] asks for nothing; give a site or a list of them")
        for site in self.sites:
            require_site(site)
        if len(set(self.sites)) != len(self.sites):
            raise SettingError(f"site=[{','.join(self.sites)}] must be different sites")
        if not self.layers:
            raise SettingError("layer=[] asks for nothing; give a layer number or a list of them")
        if len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise SettingError(f"layer={list(self.layers)} must be different numbers from 0 on")
        if self.unit is not None and self.unit % self.context:
            raise SettingError(
                f"unit={self.unit} must be a multiple of context={self.context} (tokens)"
            )

    @property
    def points(self) -> list[HookPoint]:
        """Every site of every layer, in order."""
        return sorted(HookPoint(layer, site) for layer in self.layers for site in self.sites)

    @property
    def unit_tokens(self) -> int:
        """Tokens per unit.

        By default a power of two rows, such that a store has at least 32 units, or 16 where units
        would have less than 1,024 tokens: some are held out.
        """
        if self.unit is not None:
            return self.unit
        most = max(self.tokens // 32, min(self.tokens // 16, _SMALL_UNIT))
        rows = 1
        while self.context * rows * 2 <= min(UNIT_TOKENS, most):
            rows *= 2
        return self.context * rows

    @property
    def chunk_rows(self) -> int:
        """Rows per inner chunk: the largest divisor of the unit that is at most `chunk`."""
        rows = min(self.chunk, self.unit_tokens)
        while self.unit_tokens % rows:
            rows -= 1
        return rows

    @property
    def units(self) -> int:
        """Units of the whole store, if the text does not end early."""
        return -(-self.tokens // self.unit_tokens)


def check_context(config: HarvestConfig, max_context: int | None) -> None:
    """Raise SettingError for a context that the model does not have; None: it has any."""
    if max_context is not None and config.context > max_context:
        raise SettingError(
            f"context={config.context} is more than the model's {max_context} positions"
        )


def check_layers(config: HarvestConfig, lm: LanguageModel) -> None:
    """Raise SettingError for layers or a context that the model does not have."""
    deepest = max(config.layers)
    if deepest >= lm.n_layers:
        raise SettingError(
            f"layer={deepest} is out of range: {lm.identity['id']} has layers 0 to "
            f"{lm.n_layers - 1}; choose layer="
        )
    check_context(config, lm.max_context)
