"""The same arithmetic as train/, dense, in float64, with autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from residual_saes.train.objectives.gated import GatedConfig, GatedSAE
from residual_saes.train.sae import SAE, SAEConfig


def random_sae(
    d: int,
    d_sae: int,
    k: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    threshold: float | None = None,
    d_out: int | None = None,
    skip: bool = False,
) -> SAE:
    """An SAE with nothing special about it: no unit norms, no tied weights, no zero biases;
    thresholds around one. With d_out it is a transcoder.
    """
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_sae, d), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,)}
    tensors = {
        name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()
    }
    if d_out is not None:
        widths = {"W_dec": (d_sae, d_out), "b_dec": (d_out,), "b_in": (d,)}
        if skip:
            widths["W_skip"] = (d, d_out)
        for name, shape in widths.items():
            tensors[name] = torch.randn(shape, generator=draw, dtype=dtype)
    if threshold is not None:
        tensors["threshold"] = threshold + torch.rand(d_sae, generator=draw, dtype=dtype)
    return SAE.of(**{**tensors, "W_enc": tensors["W_enc"].T}, k=k)


def random_gated(
    d: int,
    d_sae: int,
    dtype: torch.dtype = torch.float64,
    d_out: int | None = None,
    skip: bool = False,
) -> GatedSAE:
    """Of which about half of all gates are open."""
    draw = torch.Generator().manual_seed(1)
    plain = random_sae(d, d_sae, 4, dtype=dtype, d_out=d_out, skip=skip)
    r_mag, b_gate = torch.randn(2, d_sae, generator=draw, dtype=dtype)
    return GatedSAE(**plain.parameters(), k=4, r_mag=r_mag / 2, b_gate=b_gate)


class Jump(torch.autograd.Function):
    """z H(z - theta), with the pseudo-derivative at theta of arXiv 2407.14435, equation 11."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta)

    @staticmethod
    def backward(ctx, upstream):
        z, theta = ctx.saved_tensors
        inside = ((z - theta).abs() < ctx.bandwidth / 2).double()
        return upstream * (z > theta), -(theta / ctx.bandwidth * inside * upstream).sum(0), None


class Step(torch.autograd.Function):
    """H(z - theta), with the pseudo-derivative at theta of arXiv 2407.14435, equation 12."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).double()

    @staticmethod
    def backward(ctx, upstream):
        z, theta = ctx.saved_tensors
        inside = ((z - theta).abs() < ctx.bandwidth / 2).double()
        return torch.zeros_like(z), -(inside / ctx.bandwidth * upstream).sum(0), None


def pre_activations(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """(n, F) what the encoder makes of rows; a transcoder's has a bias of its own."""
    return (x - p.get("b_in", p["b_dec"])) @ p["W_enc"] + p["b_enc"]


def without_latents(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """(n, d_out) the reconstruction where no latent fires."""
    if "W_skip" not in p:
        return p["b_dec"].expand(len(x), -1)
    return p["b_dec"] + (x - p["b_in"]) @ p["W_skip"]


def activations_and_penalty(
    p: dict[str, Tensor], x: Tensor, y: Tensor, config: SAEConfig
) -> tuple[Tensor, Tensor]:
    """(n, F) activations as training has them, and what JumpReLU adds to the loss."""
    pre = pre_activations(p, x)
    none = torch.zeros((), dtype=torch.float64)
    if config.activation in ("topk", "hierarchical"):
        return dense_activations(p, x, config.k), none
    if config.activation == "jumprelu":
        l0 = Step.apply(pre, p["threshold"], config.bandwidth).sum(1).mean()
        return Jump.apply(pre, p["threshold"], config.bandwidth), config.l0_coef * (
            l0 / config.k - 1
        ) ** 2
    if config.activation == "gated":
        return gated_and_penalty(p, x, y, config)
    values, indices = pre.flatten().topk(len(x) * config.k)
    return torch.zeros_like(pre).flatten().scatter(0, indices, values.relu()).view_as(pre), none


def gated_and_penalty(
    p: dict[str, Tensor], x: Tensor, y: Tensor, config: GatedConfig
) -> tuple[Tensor, Tensor]:
    """(n, F) activations of arXiv 2404.16014, and its loss (8) but for the reconstruction's."""
    u = pre_activations(p, x) - p["b_enc"]
    gate = (u + p["b_gate"]).relu()
    f = (gate > 0) * (p["r_mag"].exp() * u + p["b_enc"]).relu()
    frozen = gate @ p["W_dec"].detach() + without_latents(p, x).detach()
    l1 = gate.sum(1).mean() / y.shape[1]
    return f, config.l1_coef * l1 + (y - frozen).square().mean()


def dense_activations(parameters: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    """(n, F) activations, zero where not kept."""
    pre = pre_activations(parameters, x)
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def reference_losses(
    sae: SAE, x: Tensor, y: Tensor, dead: Tensor, config: SAEConfig, mean_variance: float
):
    """Total loss, AuxK's part of it, and the gradients by name. b_in is a constant."""
    p = {name: tensor.double().detach() for name, tensor in sae.tensors().items()}
    p = {name: tensor.requires_grad_(name != "b_in") for name, tensor in p.items()}
    x = x.double()
    y = y.double()
    f, penalty = activations_and_penalty(p, x, y, config)
    other, aux = without_latents(p, x), torch.zeros((), dtype=torch.float64)
    error = y - (f @ p["W_dec"] + other)
    levels = range(config.nested if config.activation in ("matryoshka", "hierarchical") else 1)
    parts = []  # of the activations: those that must reconstruct alone too
    for level in levels:
        if config.activation == "hierarchical":
            parts.append(dense_activations(p, x, config.k >> level))
        else:
            first = torch.arange(config.d_sae) < config.d_sae >> level
            parts.append(f * first)
    errors = [y - (part @ p["W_dec"] + other) for part in parts]
    main = torch.stack([e.square().mean() for e in errors]).mean()
    if len(dead) and config.aux_coef:
        target = error.detach()
        pre = pre_activations(p, x)[:, dead]
        values, indices = pre.topk(min(config.k_aux, len(dead)), dim=1)
        e_hat = torch.zeros_like(pre).scatter(1, indices, values.relu()) @ p["W_dec"][dead]
        aux = config.aux_coef * (e_hat - target).square().mean()
        if config.aux_norm == "variance":
            aux = aux / (target - target.mean(0)).square().mean()
    if config.aux_norm == "variance":
        main = main / mean_variance
        if config.activation == "gated":
            penalty = penalty / mean_variance
    total = main + penalty + aux
    total.backward()
    return (
        total.detach(),
        aux.detach(),
        {name: tensor.grad for name, tensor in p.items() if tensor.grad is not None},
    )
