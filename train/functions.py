"""The kernels of train/kernels.py as autograd functions, each with its exact gradient.

Autograd alone would need the dense (n, F) activations. These functions need the kept pairs only.

Shapes: n rows, d = d_model, F = d_sae, p kept pairs, D chosen latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from residual_saes.train import kernels
from residual_saes.train.kernels import Bags, Kept
from residual_saes.train.sae import SAE

Keep = Callable[[Tensor, Tensor, Tensor], Kept]  # of centred rows, the encoder, the bias


def bias(b_enc: Tensor, sae: SAE) -> Tensor:
    """`b_enc` (F,), through which the gradient of b_dec flows too.

    pre = (x - b_dec) @ W_enc + b_enc, so d pre / d b_dec = -W_enc where d pre / d b_enc = 1. One
    product of W_enc with the gradient of b_enc replaces a sum over all pairs. An SAE with a b_in of
    its own subtracts that, a constant: its b_dec has no part in the encoder.
    """
    if sae.b_in is not None:
        return b_enc
    result: Tensor = _Bias.apply(b_enc, sae.b_dec, sae.encoder)  # type: ignore[no-untyped-call]
    return result


class _Bias(Function):
    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, b_dec: Tensor, encoder: Tensor) -> Tensor:
        ctx.save_for_backward(encoder)
        return b_enc.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (encoder,) = ctx.saved_tensors
        return gradient, (encoder.T @ gradient).neg_(), None


def encode(keep: Keep, centred: Tensor, encoder: Tensor, bias: Tensor) -> tuple[Kept, Bags]:
    """The pairs that `keep` keeps of `centred` @ W_enc + `bias`, and the same pairs by latent.

    The gradient goes to the encoder and the bias. To b_dec it goes through `bias`, so `centred`
    gets none here.

    Args:
        centred: (n, d) rows x - b_dec, or x - b_in.
        encoder: (F, d).
        bias: (F,), a result of the function `bias`.
    """
    *pairs, order, starts = _Encode.apply(keep, centred, encoder, bias)  # type: ignore[no-untyped-call]
    return Kept(*pairs), Bags(order, starts)


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, keep: Keep, centred: Tensor, encoder: Tensor, bias: Tensor) -> Any:
        kept = keep(centred, encoder, bias)
        bags = kernels.group_by_latent(kept.indices, len(encoder))
        ctx.save_for_backward(centred, kept.indices, kept.rows, *bags)
        ctx.mark_non_differentiable(kept.indices, kept.rows, kept.starts, *bags)
        ctx.set_materialize_grads(False)  # the pairs' positions have no gradients
        return *kept, *bags

    @staticmethod
    def backward(ctx: Any, values: Tensor, *_: None) -> Any:
        centred, indices, rows, *bags = ctx.saved_tensors
        by_latent = Bags(*bags)
        encoder = kernels.weight_gradient(centred, values, rows, by_latent)
        bias = kernels.latent_sums(values, indices, len(encoder), by_latent)
        return None, None, encoder, bias


def decode(kept: Kept, bags: Bags, W_dec: Tensor) -> Tensor:
    """f @ W_dec for the activations f that `kept` holds: (n, d), or a row for each of its bags.

    Args:
        bags: the pairs of `kept` by latent.
        W_dec: (F, d).
    """
    result: Tensor = _Decode.apply(*kept, *bags, W_dec)  # type: ignore[no-untyped-call]
    return result


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        *pairs, _, _, W_dec = given
        ctx.save_for_backward(*given)
        return kernels.decode(Kept(*pairs), W_dec)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        *pairs, order, starts, W_dec = ctx.saved_tensors
        kept = Kept(*pairs)
        upstream = upstream.contiguous()
        weights = None
        by_latent = Bags(order, starts)
        values = kernels.values_gradient(upstream, kept, W_dec, by_latent)
        if ctx.needs_input_grad[-1]:
            weights = kernels.weight_gradient(upstream, kept.values, kept.rows, by_latent)
        return values, None, None, None, None, None, weights


def per_pair(parameter: Tensor, kept: Kept, bags: Bags) -> Tensor:
    """(p,) the element of `parameter` (F,) of each pair's latent."""
    result: Tensor = _PerPair.apply(parameter, kept.indices, *bags)  # type: ignore[no-untyped-call]
    return result


class _PerPair(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, indices: Tensor, *bags: Tensor) -> Tensor:
        ctx.save_for_backward(indices, *bags)
        return parameter.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        indices, *bags = ctx.saved_tensors
        by_latent = Bags(*bags)
        sums = kernels.latent_sums(gradient, indices, len(by_latent.starts), by_latent)
        return sums, None, None, None


def rows(parameter: Tensor, chosen: Tensor) -> Tensor:
    """(D, ...) the elements `chosen` (D,) of a parameter.

    The gradient is sparse. Autograd adds it in place to the parameter's dense gradient, so no
    second dense gradient is built: 335 MB for 32,768 latents at width 2560.
    """
    result: Tensor = _Rows.apply(parameter, chosen)  # type: ignore[no-untyped-call]
    return result


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(chosen)
        ctx.shape = parameter.shape
        return parameter[chosen]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (chosen,) = ctx.saved_tensors
        sparse = torch.sparse_coo_tensor(
            chosen.unsqueeze(0), gradient, ctx.shape, check_invariants=False, is_coalesced=True
        )
        return sparse, None


def mean_square(error: Tensor, denominator: float) -> Tensor:
    """() mean(error^2) / `denominator`."""
    result: Tensor = _MeanSquare.apply(error, denominator)  # type: ignore[no-untyped-call]
    return result


class _MeanSquare(Function):
    """Autograd's own gradient rounds in another order: it would change every run's bits."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, denominator: float) -> Tensor:
        ctx.save_for_backward(error)
        ctx.factor = 2 / (error.numel() * denominator)
        return error.square().mean() / denominator

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (error,) = ctx.saved_tensors
        return error * (gradient * ctx.factor), None
