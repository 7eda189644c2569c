"""Keeping documents apart: how a (B, T) batch of packed pieces becomes forward passes and attention
masks.

Shapes: B packed rows, T context; b rows and t positions of one pass; n tokens of the batch that a
    pass computes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Isolation = Literal["packed", "padded"]
Mask = torch.Tensor | dict[str, torch.Tensor | None] | None
# What one more pass costs beside its tokens, in tokens: with it, padding adds 5 to 11 % at 16 rows
# of 1,024 in 5 to 10 passes; filling each pass to the batch's size in 2 or 3 passes added 27 to 103
# %.
_PASS_TOKENS = 256


class Inputs(NamedTuple):
    """One forward pass."""

    ids: torch.Tensor  # (b, t) int64
    positions: (
        torch.Tensor | None
    )  # (b, t) int64, starting anew at every piece; None where rows are single pieces
    inside: (
        torch.Tensor | None
    )  # (n,) int64: the tokens among the b*t that are no padding; None: all of them
    into: (
        torch.Tensor | None
    )  # (n,) int64: their flat places in the (B, T) batch; None: in order, the whole batch

    @property
    def tokens(self) -> int:
        """Tokens of the batch that this pass computes."""
        return self.ids.numel() if self.into is None else self.into.numel()


def forward_inputs(
    tokens: NDArray[np.uint32], starts: NDArray[np.bool_], isolation: Isolation
) -> list[Inputs]:
    """The forward passes for a (B, T) batch whose pieces begin where `starts` is true: a pure
    function.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))
    flat = np.flatnonzero(starts)
    lengths = np.diff([*flat, tokens.size])
    if isolation == "packed":
        positions = np.arange(tokens.size) - np.repeat(flat, lengths)
        return [Inputs(ids, torch.from_numpy(positions.reshape(tokens.shape)), None, None)]
    return [
        _padded(ids.flatten(), flat[group], lengths[group])
        for group in groups(lengths, tokens.size)
    ]


def groups(lengths: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """Share pieces of these `lengths` out to padded passes of at most `most` tokens each, at the
    least cost.

    The cost of a pass is its longest piece times its pieces, and `_PASS_TOKENS` for itself. Some
    best partition takes neighbours in order of length, so dynamic programming over the sorted
    pieces finds it.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    ordered, count = lengths[longest_first], len(lengths)
    cost, cut = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        begin = np.arange(end)
        area = ordered[:end] * (end - begin)
        total = np.where(area <= most, cost[:end] + area + _PASS_TOKENS, np.inf)
        cut[end] = total.argmin()
        cost[end] = total[cut[end]]
    found, end = [], count
    while end:
        found.append(longest_first[cut[end] : end])
        end = int(cut[end])
    return found[::-1]


def _padded(ids: torch.Tensor, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Inputs:
    """Single pieces, padded on the right, where a causal model cannot see it: no mask is needed."""
    reach = np.arange(lengths.max())[None, :]
    valid = reach < lengths[:, None]
    source = torch.from_numpy(np.where(valid, starts[:, None] + reach, 0))
    inside = torch.from_numpy(np.flatnonzero(valid))
    return Inputs(ids[source] * torch.from_numpy(valid), None, inside, source.flatten()[inside])


def attention_mask(config: Any, positions: torch.Tensor | None) -> Mask:
    """What the decoder of text `config` is to be given as `attention_mask`, made without waiting
    for the device.

    Left to itself, transformers looks at the positions' values to see whether rows are packed, and
    so waits for the device once per kind of mask in every pass. Its decoders take a boolean (b, 1,
    t, t) mask as it is, or one per kind of layer. True is "seen": the same piece, not later, and
    within the window.

    SDPA with this mask was chosen over FlashAttention's variable lengths, which end at head widths
    of 256 (Gemma 4 has 512), and over FlexAttention, which needs compilation, and its bits depend
    on what the compiler chose.

    Returns:
        None where transformers must decide by itself: other attention than SDPA, or layers of an
            unknown kind.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if positions is None:
        # Single pieces: a missing mask means causal, which is wrong only for windows and kinds that
        # we do not know.
        return (
            dict.fromkeys(kinds)
            if kinds and kinds <= {"full_attention", "linear_attention"}
            else None
        )
    if (
        config._attn_implementation != "sdpa"
        or not kinds <= {"full_attention", "sliding_attention"}
        or getattr(config, "attention_chunk_size", None) is not None
    ):
        return None
    window = getattr(config, "sliding_window", None)
    piece = (positions == 0).cumsum(1, dtype=torch.int32)
    at = torch.arange(positions.shape[1], device=positions.device)
    back = at[:, None] - at[None, :]
    seen = ((piece[:, :, None] == piece[:, None, :]) & (back >= 0))[:, None]
    near = seen if window is None else seen & (back < window)
    return {kind: seen if kind == "full_attention" else near for kind in kinds} if kinds else near
