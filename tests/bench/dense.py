"""A TopK SAE as it is written down with autograd: what ours is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from residual_saes.train.sae import initial
from tests.bench.train_phases import Shape


def dense_weights(shape: Shape) -> dict[str, Tensor]:
    """A TopK SAE's tensors, as autograd's leaves."""
    start = initial(shape.config().sae, torch.zeros(shape.d, device=shape.device), 0).tensors()
    return {name: tensor.contiguous().requires_grad_() for name, tensor in start.items()}


def dense_loss(weights: Mapping[str, Tensor], x: Tensor, k: int) -> Tensor:
    """A TopK SAE's loss as it is written down with autograd."""
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    kept = pre.topk(k, dim=1)
    f = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    return (f @ weights["W_dec"] + weights["b_dec"] - x).square().mean()
