"""How layers attend in packed rows: by SDPA with a mask, by FlashAttention, by FlexAttention.

SDPA with the mask of harvest/isolation.py is the reference. The other ways skip what no token sees.
A layer calls `_attend`, which stands in transformers' table of attention functions under `NAME`;
the forward pass tells it where pieces end. Nothing is downloaded: of FlashAttention's packages only
those that are installed count, and none of `kernels`' hub.

Shapes: b rows and t positions of a pass, h heads (fewer of keys and values), w their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from residual_saes.data.errors import StoreError

# In transformers' table. Without `flash` or `sdpa`, by which models know their own ways.
NAME = "packed_rows"
# The packages of FlashAttention, newest first, as transformers and as pip name them. The second
# ends at head width 256; the fourth takes 512 on Hopper. Which widths work is found by trying.
FLASH = {
    "flash_attention_4": "flash-attn-4",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_2": "flash-attn",
}
# What a family may add to its scores, which the reference refuses or ignores.
_ADDED = {"softcap": "a softcap", "s_aux": "sinks", "position_bias": "a position bias"}


class Call(NamedTuple):
    """What a layer asks of its attention."""

    module: nn.Module
    query: torch.Tensor  # (b, h, t, w)
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None  # (b, 1, t, t) bool, True: seen
    rows: PackedRows
    options: dict[str, Any]  # transformers' own: scaling, sliding_window

    def rounded(self, dtype: torch.dtype) -> Call:
        """The same with query, key and value of another type."""
        q, k, v = (states.to(dtype) for states in (self.query, self.key, self.value))
        return self._replace(query=q, key=k, value=v)


class Attending(Protocol):
    """Whatever computes attention: (b, t, h, w) of a call."""

    def attend(self, call: Call) -> torch.Tensor: ...


@dataclass(frozen=True)
class Attention:
    """One way to attend, as a store's manifest records it."""

    way: str = "sdpa"  # or flex, or a key of FLASH
    widths: tuple[int, ...] = ()  # of the heads that it takes; layers of others attend by SDPA
    version: str | None = None  # of FlashAttention's package; torch's is in the environment

    @classmethod
    def of(cls, recorded: Mapping[str, Any] | None) -> Attention:
        """The way that a manifest records, in the version that is here; None: SDPA.

        Raises:
            StoreError: its package is not installed.
        """
        if recorded is None:
            return SDPA
        way = recorded["way"]
        if way in FLASH and way not in installed():
            raise StoreError(
                f"the store's rows were made by {way}, which is not here; install {FLASH[way]} "
                f"{recorded.get('version', '')}, or harvest into another store="
            )
        return cls(way, tuple(recorded["widths"]), version_here(way))

    def recorded(self) -> dict[str, Any]:
        """Its entry in a manifest; empty for SDPA, as in stores that know no other way."""
        if self.way == SDPA.way:
            return {}
        here = {} if self.version is None else {"version": self.version}
        return {"attention": {"way": self.way, "widths": [*self.widths], **here}}

    @property
    def kind(self) -> str:
        """As the setting `attention=` names it."""
        return "flash" if self.way in FLASH else self.way

    def attend(self, call: Call) -> torch.Tensor:
        """(b, t, h, w) of a call."""
        if call.query.shape[-1] not in self.widths:
            return by_sdpa(call)
        return by_flex(call) if self.way == "flex" else by_flash(call, self.way)


SDPA = Attention()


@dataclass
class PackedRows:
    """What a pass tells its layers."""

    attention: Attending
    ends: torch.Tensor  # (pieces + 1,) int32: where they begin and end in the b*t tokens
    positions: torch.Tensor  # (b, t), 0 where a piece begins
    blocks: dict[int | None, Any] = field(default_factory=dict)  # BlockMask of a window


def switch_(config: Any, on: bool) -> None:
    """Have a decoder's layers call `_attend`, or SDPA again."""
    from transformers import AttentionInterface

    if on:
        AttentionInterface.register(NAME, _attend)
        config._attn_implementation = NAME
    elif config._attn_implementation == NAME:
        config._attn_implementation = "sdpa"


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    packed_rows: PackedRows | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' layers call it.

    Raises:
        TypeError: only SDPA is right in this family.
    """
    if packed_rows is None:
        raise TypeError("its code does not tell its layers where pieces end")
    for name, what in _ADDED.items():
        if options.get(name) is not None:
            raise TypeError(f"its attention has {what}")
    call = Call(module, query, key, value, mask, packed_rows, options)
    return packed_rows.attention.attend(call), None


# -- the ways --------------------------------------------------------------------------------------


def installed() -> list[str]:
    """FlashAttention's packages that are here, newest first."""
    from transformers import utils

    return [name for name in FLASH if getattr(utils, f"is_flash_attn_{name[-1]}_available")()]


def version_here(way: str) -> str | None:
    """The version of FlashAttention's package; None for other ways, and where it is not here."""
    try:
        return version(FLASH[way])
    except (KeyError, PackageNotFoundError):
        return None


def by_sdpa(call: Call) -> torch.Tensor:
    """As transformers calls SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    states = (call.query, call.key, call.value)
    out: torch.Tensor = sdpa_attention_forward(call.module, *states, call.mask, **call.options)[0]
    return out


def by_flash(call: Call, way: str) -> torch.Tensor:
    """By the variable lengths of FlashAttention's package.

    They are told: transformers would read them off the positions, and wait for the device in every
    layer. A row's length bounds a piece's; the true longest would differ from batch to batch.
    """
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    context = call.query.shape[2]
    states = (states.transpose(1, 2) for states in (call.query, call.key, call.value))
    out: torch.Tensor = _flash_attention_forward(
        *states,
        attention_mask=None,
        query_length=context,
        is_causal=True,
        softmax_scale=call.options.get("scaling"),
        sliding_window=call.options.get("sliding_window"),
        cu_seq_lens_q=call.rows.ends,
        cu_seq_lens_k=call.rows.ends,
        max_length_q=context,
        max_length_k=context,
        attn_implementation=way,
    )
    return out


def by_flex(call: Call) -> torch.Tensor:
    """By FlexAttention, with blocks of pieces and windows."""
    window = call.options.get("sliding_window")
    if window not in call.rows.blocks:
        call.rows.blocks[window] = _blocks(call.rows.positions, window)
    out: torch.Tensor = flex()(
        call.query,
        call.key,
        call.value,
        block_mask=call.rows.blocks[window],
        scale=call.options.get("scaling"),
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


@cache
def flex() -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled for each shape.

    A kernel for any shape would be compiled when a second one comes, and with that the bits might
    depend on what ran before.
    """
    from torch import _dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # Behind this many shapes torch goes on without compiling: batches, windows, head widths.
    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, 64)
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _blocks(positions: torch.Tensor, window: int | None) -> Any:
    """The BlockMask of causal attention inside pieces, and inside the window."""
    from torch.nn.attention.flex_attention import create_block_mask

    piece = (positions == 0).cumsum(1, dtype=torch.int32)

    def seen(row: torch.Tensor, _: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        near = (piece[row, query] == piece[row, key]) & (query >= key)
        return near if window is None else near & (query - key < window)

    rows, context = positions.shape
    return create_block_mask(seen, rows, None, context, context, device=positions.device)
