"""The same arithmetic as train/, dense, in float64, with autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from train.sae import SAE, SAEConfig


def random_sae(d: int, d_sae: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> SAE:
    """An SAE with nothing special about it: no unit norms, no tied weights, no zero biases."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_sae, d), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,)}
    tensors = {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}
    return SAE(**{**tensors, "W_enc": tensors["W_enc"].T}, k=k)


def dense_activations(parameters: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    """(n, F) activations, zero where not kept."""
    pre = (x - parameters["b_dec"]) @ parameters["W_enc"] + parameters["b_enc"]
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def reference_losses(sae: SAE, x: Tensor, dead: Tensor, config: SAEConfig, mean_variance: float):
    """Total loss, AuxK's part of it, and the gradients by name."""
    p = {name: tensor.double().detach().requires_grad_() for name, tensor in sae.tensors().items()}
    x = x.double()
    error = x - (dense_activations(p, x, sae.k) @ p["W_dec"] + p["b_dec"])
    main, aux = error.square().mean(), torch.zeros((), dtype=torch.float64)
    if len(dead) and config.aux_coef:
        target = error.detach()
        pre = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])[:, dead]
        values, indices = pre.topk(min(config.k_aux, len(dead)), dim=1)
        e_hat = torch.zeros_like(pre).scatter(1, indices, values.relu()) @ p["W_dec"][dead]
        aux = config.aux_coef * (e_hat - target).square().mean()
        if config.aux_norm == "variance":
            aux = aux / (target - target.mean(0)).square().mean()
    if config.aux_norm == "variance":
        main = main / mean_variance
    (main + aux).backward()
    return (main + aux).detach(), aux.detach(), {name: tensor.grad for name, tensor in p.items()}
