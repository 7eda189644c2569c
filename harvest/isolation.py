"""Keeping documents apart: a (B, T) batch of packed pieces as forward passes and attention masks.

Shapes: B packed rows, T context; b rows and t positions of one pass; n tokens of the batch that a
    pass computes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.harvest.attention import NAME

# packed: pieces share a row; positions and masks keep them apart. padded: each piece has a row of
# its own, padded on the right. alone: each piece is a pass of its own, as the model would run it.
Isolation = Literal["packed", "padded", "alone"]
Mask = torch.Tensor | dict[str, torch.Tensor | None] | None
# Fixed cost of a pass, in tokens. With it, padding adds 5 to 11 % at 16 rows
# of 1,024 in 5 to 10 passes. Filling each pass to the batch's size (2 or 3 passes) added 27 to
# 103 %.
PASS_TOKENS = 256


class Inputs(NamedTuple):
    """The inputs of one forward pass."""

    ids: torch.Tensor  # (b, t) int64
    # (b, t) int64, from 0 at every piece; None where each row is a single piece
    positions: torch.Tensor | None
    # (n,) int64 indices into the b*t tokens, padding left out; None: all of them
    inside: torch.Tensor | None
    # (n,) int64 flat indices of the same tokens in the (B, T) batch; None: the whole batch in order
    into: torch.Tensor | None
    # (pieces + 1,) int32: where packed pieces begin and end in the b*t tokens; None: not packed
    ends: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the batch that this pass computes."""
        return self.ids.numel() if self.into is None else self.into.numel()


def forward_inputs(
    tokens: NDArray[np.uint32],
    starts: NDArray[np.bool_],
    isolation: Isolation,
    *,
    one_pass: bool = False,
) -> list[Inputs]:
    """The forward passes for a (B, T) batch whose pieces begin where `starts` is true.

    A pure function. `packed` is one pass, in which positions tell pieces apart; `padded` gives each
    piece a row of its own, `alone` a pass of its own.

    Args:
        one_pass: pad all pieces to the longest of the batch, for a trial of padding.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))
    begins = np.flatnonzero(starts)
    lengths = np.diff([*begins, tokens.size])
    if isolation == "packed":
        positions = np.arange(tokens.size) - np.repeat(begins, lengths)
        ends = torch.from_numpy(np.append(begins, tokens.size).astype(np.int32))
        return [Inputs(ids, torch.from_numpy(positions.reshape(tokens.shape)), None, None, ends)]
    if one_pass and isolation == "padded":
        partition = [np.arange(len(lengths))]
    elif isolation == "padded":
        partition = groups(lengths, tokens.size)
    else:
        longest_first = np.argsort(-lengths, kind="stable")
        partition = [longest_first[i : i + 1] for i in range(len(lengths))]
    passes: list[Inputs] = []
    for group in partition:
        passes.append(_padded(ids.flatten(), begins[group], lengths[group]))
    return passes


def groups(
    lengths: NDArray[np.int64], most: int, pass_tokens: int = PASS_TOKENS
) -> list[NDArray[np.int64]]:
    """Partition pieces of these `lengths` into padded passes, at the least cost.

    A pass costs its longest piece times its number of pieces, plus `pass_tokens`. Some optimal
    partition takes neighbours in order of length, so dynamic programming over the sorted pieces
    finds it.

    Args:
        most: tokens of a pass, padding included.

    Returns:
        Indices of the pieces of each pass.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    ordered = lengths[longest_first]
    count = len(lengths)
    cost = np.zeros(count + 1)  # the least cost of the first pieces
    cut = np.zeros(count + 1, np.int64)  # where their last pass begins
    for end in range(1, count + 1):
        begin = np.arange(end)
        area = ordered[:end] * (end - begin)
        total = np.where(area <= most, cost[:end] + area + pass_tokens, np.inf)
        cut[end] = total.argmin()
        cost[end] = total[cut[end]]
    partition: list[NDArray[np.int64]] = []
    end = count
    while end:
        partition.append(longest_first[cut[end] : end])
        end = int(cut[end])
    return partition[::-1]


def _padded(ids: torch.Tensor, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Inputs:
    """Single pieces, padded on the right: causal attention never sees padding, so no mask.

    A group of one piece has no padding.
    """
    reach = np.arange(lengths.max())[None, :]
    valid = reach < lengths[:, None]
    source = torch.from_numpy(np.where(valid, starts[:, None] + reach, 0))
    inside = torch.from_numpy(np.flatnonzero(valid))
    return Inputs(ids[source] * torch.from_numpy(valid), None, inside, source.flatten()[inside])


def attention_mask(config: Any, positions: torch.Tensor | None) -> Mask:
    """The `attention_mask` for a decoder of text `config`, made without waiting for the device.

    Left to itself, transformers reads the positions' values to find out whether rows are packed. So
    it waits for the device once per kind of mask in every pass. Its decoders take a boolean (b, 1,
    t, t) mask as it is, or one per kind of layer. True is "seen": in the same piece, not later, and
    within the window. Families without SDPA (gpt-oss) add the mask to their scores instead.

    Every other way to attend is measured by SDPA with this mask (harvest/attention_trial.py), and
    layers whose head width it does not take go on with it.

    Returns:
        None where transformers must decide by itself: another kind of attention, or layers of an
            unknown kind.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if positions is None:
        # Single pieces. A missing mask means causal; that is wrong only for windows and for kinds
        # we do not know.
        known = "full_attention" in kinds and kinds <= {"full_attention", "linear_attention"}
        return dict.fromkeys(kinds) if known else None
    implementation = config._attn_implementation
    if (
        implementation not in ("sdpa", "eager", NAME)
        or not kinds <= {"full_attention", "sliding_attention"}
        or getattr(config, "attention_chunk_size", None) is not None
    ):
        return None
    window = getattr(config, "sliding_window", None)
    piece = (positions == 0).cumsum(1, dtype=torch.int32)
    index = torch.arange(positions.shape[1], device=positions.device)
    back = index[:, None] - index[None, :]
    seen = ((piece[:, :, None] == piece[:, None, :]) & (back >= 0))[:, None]
    near = seen if window is None else seen & (back < window)
    if implementation == "eager":
        seen = _added(seen, config.dtype)
        near = _added(near, config.dtype)
    if not kinds:
        return near
    return {kind: seen if kind == "full_attention" else near for kind in kinds}


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as eager attention adds it to scores: 0 where seen, else the least number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )
