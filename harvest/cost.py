"""Parameters, bytes and FLOP of running a model to a layer, from its configuration alone.

The decoder is built without memory, on torch's `meta` device, and counted. So every family has its
true numbers without a formula of its own, and a plan needs no downloaded weight.

FLOP are counted from the weights' shapes. `torch.utils.flop_counter` on the meta decoder was tried:
it stops at Qwen 3.5's linear attention and at a mixture of experts, whose kernels read values; and
it counts dense masks (2.9 % more for E4B to layer 21 at 1,024 tokens, 32 % for small models), where
this counts what a token sees.

Shapes: B rows, T context, d d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from residual_saes.data.errors import SettingError
from residual_saes.data.site import HookPoint, Point
from residual_saes.harvest.decoder import (
    find_blocks,
    meta_decoder,
    narrow_per_layer_inputs_,
    outline,
)


@dataclass(frozen=True)
class Cost:
    """What harvesting some hook points of a model takes."""

    parameters: int  # of the text decoder, without a language-model head
    kept: int  # parameters up to the deepest layer, embedding tables included
    kept_bytes: int  # of these weights, in the model's type
    activation_bytes: int  # at the peak of one forward pass of B rows, an estimate
    check_bytes: int  # of the self-check at start: two rows in float32, and the widest layer
    matmul_flop: float  # per token: two for each weight of a matrix product
    attention_flop: float  # per token: scores and sums, mean over a row of one document

    @property
    def flop(self) -> float:
        """FLOP per token."""
        return self.matmul_flop + self.attention_flop


def cost(config: Any, points: Sequence[Point], dtype: str, batch: int, context: int) -> Cost:
    """The cost of the rows of `points`.

    Args:
        config: a transformers configuration; its text part counts.
        dtype: of weights and activations, as torch names it.
        batch, context: B and T of a forward pass.

    Raises:
        SettingError: the model has no such layer, or no list of layers.
    """
    text = config.get_text_config()
    deepest = max(HookPoint.of(point).layer for point in points)
    outline(text)  # a family without residuals is refused here, before its weights are there
    decoder = meta_decoder(text)
    blocks = find_blocks(decoder)
    if deepest >= len(blocks):
        raise SettingError(
            f"layer={deepest} is out of range: there are layers 0 to {len(blocks) - 1}"
        )
    parameters = _parameters(decoder)
    del blocks[deepest + 1 :]
    narrow_per_layer_inputs_(decoder, len(blocks))
    kept = _parameters(decoder)
    size = getattr(torch, dtype).itemsize
    # In float32 a layer has a second copy (harvest/precise.py), and of each point there are the
    # rows of the pieces alone, of a trial and of another one.
    widened = 0 if size == 4 else 4 * max(_parameters(block) for block in blocks)
    compared = 3 * len(points) * 2 * context * text.hidden_size * 4
    check = _activation_bytes(decoder, blocks, len(points), 4, 2 * context, context)
    return Cost(
        parameters=parameters,
        kept=kept,
        kept_bytes=kept * size,
        activation_bytes=_activation_bytes(
            decoder, blocks, len(points), size, batch * context, context
        ),
        check_bytes=widened + compared + check,
        matmul_flop=_matmul_flop(decoder, text),
        attention_flop=sum(_attention_flop(block, text, context) for block in blocks),
    )


def _parameters(decoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())


def _matrices(decoder: nn.Module) -> list[nn.Parameter]:
    """Weights of matrix products: those with two axes, or three (experts), embeddings left out."""
    matrices: list[nn.Parameter] = []
    for module in decoder.modules():
        if not isinstance(module, nn.Embedding):
            own = module.parameters(recurse=False)
            matrices += [parameter for parameter in own if parameter.ndim in (2, 3)]
    return matrices


def _matmul_flop(decoder: nn.Module, text: Any) -> float:
    """FLOP per token of all matrix products with weights."""
    share = _active_share(text)
    flop = 0.0
    for matrix in _matrices(decoder):
        flop += 2.0 * matrix.numel() * (share if matrix.ndim == 3 else 1.0)
    return flop


def _active_share(text: Any) -> float:
    """Share of a mixture's experts that a token passes through; 1 for dense models."""
    experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts")
    active = _first(text, "num_experts_per_tok", "top_k_experts")
    return active / experts if experts and active else 1.0


def _first(text: Any, *names: str) -> float:
    """The first of these settings that the configuration has; 0 if it has none."""
    for name in names:
        if value := getattr(text, name, None):
            return float(value)
    return 0.0


def _attention_flop(block: nn.Module, text: Any, context: int) -> float:
    """FLOP per token of scores and sums in a row of one document; 0 for linear attention.

    The projections around attention are weights, and counted as such.
    """
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0.0  # none, or another number in each layer: it is counted without
    for module in block.modules():
        if type(module).__name__.endswith("Attention"):
            # Gemma 4 has two head widths, so the module's own counts first.
            width = getattr(module, "head_dim", None)
            width = width or text.hidden_size // heads
            window = min(getattr(module, "sliding_window", None) or context, context)
            # mean over the row of min(position + 1, window)
            seen = window - window * (window - 1) / (2 * context)
            return float(4 * seen * width * heads)
    return 0.0


def _activation_bytes(
    decoder: nn.Module, blocks: nn.Module, points: int, size: int, tokens: int, context: int
) -> int:
    """Bytes that one forward pass of `tokens` holds at its peak, beside the weights.

    There are two peaks: inside a gated MLP, and where the inputs of every layer are prepared
    (Gemma 4). The result is the higher one. It is an estimate of what eager kernels hold at once,
    within a third of what was measured.

    Args:
        points: how many are taken.
        size: bytes per element of weights and activations.
    """
    config: Any = decoder.config
    d = config.hidden_size
    widest = max(max(matrix.shape) for matrix in _matrices(blocks) if matrix.ndim == 2)
    table = getattr(decoder, "embed_tokens_per_layer", None)
    inputs = 0 if table is None else table.embedding_dim
    # In a gated MLP: gate, its factor, their product; three copies of the residual stream.
    in_block = size * (3 * widest + 3 * d + inputs)
    # Per-layer inputs: table, projection, and two float32 copies in the norm.
    in_inputs = inputs * (2 * size + 8)
    # Taken states in the model's type and in bfloat16; two masks of one byte, one in the scores'
    # type.
    kept = points * d * (size + 2) + context * (2 + size)
    return int(tokens * (max(in_block, in_inputs) + kept))
