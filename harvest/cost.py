"""What a model costs to run to a layer, from its configuration alone: parameters, bytes,
floating-point operations.

The decoder is built without memory (on torch's `meta` device) and counted, so that any family has
its true numbers without a formula of its own, and a plan can be made before any weight is
downloaded.

Shapes: B rows, T context, d d_model, f the widest layer inside a block.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data.errors import SettingError
from harvest.model import find_blocks, narrow_per_layer_inputs_

# Dense bfloat16, without sparsity, FLOP/s: the vendors' data sheets. The first name found in the
# device's own counts.
_PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Cost:
    """What harvesting some layers of a model takes."""

    parameters: int  # of the text decoder, without a head of its own
    kept: int  # of them to the deepest layer, embedding tables included
    loaded_bytes: int  # weights on the device until the self-check at start is done
    kept_bytes: int  # weights on the device afterwards
    activation_bytes: (
        int  # beside the weights, at the peak of one forward pass of B rows; an estimate
    )
    matmul_flop: float  # per token: two for each weight of a matrix product to the deepest layer
    attention_flop: (
        float  # per token: scores and sums over what a token of a row of one document sees
    )

    @property
    def flop(self) -> float:
        """Per token."""
        return self.matmul_flop + self.attention_flop

    @property
    def peak_bytes(self) -> int:
        """On the device, at its highest."""
        return max(self.loaded_bytes, self.kept_bytes + self.activation_bytes)


def cost(config: Any, layers: Sequence[int], dtype: str, batch: int, context: int) -> Cost:
    """The cost of the residuals of `layers`.

    Args:
        config: a transformers configuration, of which the text part counts.
        dtype: of weights and activations, as torch names it.
        batch, context: B and T of a forward pass.

    Raises:
        SettingError: the model has no such layer, or no list of layers.
    """
    text = config.get_text_config()
    if max(layers) >= text.num_hidden_layers:
        raise SettingError(
            f"layer={max(layers)} is out of range: there are layers 0 to {text.num_hidden_layers - 1}"
        )
    decoder = _empty(text)
    blocks = find_blocks(decoder, text.num_hidden_layers)
    parameters = _parameters(decoder)
    del blocks[max(layers) + 1 :]
    narrow_per_layer_inputs_(decoder, len(blocks))
    kept = _parameters(decoder)
    size = getattr(torch, dtype).itemsize
    share = _active_share(text)
    matmul = sum(2.0 * p.numel() * (share if p.ndim == 3 else 1.0) for p in _matrices(decoder))
    attention = sum(_attention_flop(block, text, context) for block in blocks)
    working = _activation_bytes(decoder, blocks, len(layers), size, batch * context, context)
    return Cost(parameters, kept, parameters * size, kept * size, working, matmul, attention)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by the name that it gives itself; None if it is not
    known.
    """
    return next((peak for name, peak in _PEAK.items() if name.lower() in device_name.lower()), None)


def _empty(text: Any) -> nn.Module:
    from transformers import AutoModel

    with torch.device("meta"):
        decoder: nn.Module = AutoModel.from_config(copy.deepcopy(text), trust_remote_code=False)
    return decoder


def _parameters(decoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())


def _matrices(decoder: nn.Module) -> list[nn.Parameter]:
    """Weights that tokens are multiplied by: all with two sides or (experts) three, but no
    tables.
    """
    modules = (module for module in decoder.modules() if not isinstance(module, nn.Embedding))
    return [p for module in modules for p in module.parameters(recurse=False) if p.ndim in (2, 3)]


def _active_share(text: Any) -> float:
    """Share of a mixture's experts that a token goes through; 1 for dense models."""

    def first(*names: str) -> float:
        return next((float(value) for name in names if (value := getattr(text, name, None))), 0.0)

    experts = first("num_experts", "num_local_experts", "n_routed_experts")
    active = first("num_experts_per_tok", "top_k_experts")
    return active / experts if experts and active else 1.0


def _attention_flop(block: nn.Module, text: Any, context: int) -> float:
    """Per token, for a row of one document; 0 for layers that keep a state instead (linear
    attention).
    """
    for module in block.modules():
        if type(module).__name__.endswith("Attention"):
            # Gemma 4 has two widths, so the module is asked first; the projections around it are
            # counted as weights.
            width = (
                getattr(module, "head_dim", None) or text.hidden_size // text.num_attention_heads
            )
            window = min(getattr(module, "sliding_window", None) or context, context)
            seen = window - window * (window - 1) / (
                2 * context
            )  # mean over the row of min(position + 1, window)
            return float(4 * seen * width * text.num_attention_heads)
    return 0.0


def _activation_bytes(
    decoder: nn.Module, blocks: nn.Module, layers: int, size: int, tokens: int, context: int
) -> int:
    """The higher of two peaks, inside a gated MLP and where the inputs of every layer are prepared
    (Gemma 4).

    An estimate of what eager kernels hold at once; measured on the classes themselves, it is within
    a third.
    """
    config: Any = decoder.config
    d = config.hidden_size
    widest = max(max(p.shape) for p in _matrices(blocks) if p.ndim == 2)
    table = getattr(decoder, "embed_tokens_per_layer", None)
    inputs = 0 if table is None else table.embedding_dim
    in_block = size * (
        3 * widest + 3 * d + inputs
    )  # the gate, what it multiplies, their product; three of the stream
    in_inputs = inputs * (2 * size + 8)  # table, projection, and the norm's two of them in float32
    # Taken states in the model's type and in bfloat16; two masks of one byte, and one in the
    # scores' type.
    kept = layers * d * (size + 2) + context * (2 + size)
    return int(tokens * (max(in_block, in_inputs) + kept))
