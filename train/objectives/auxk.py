"""AuxK (Gao et al., arXiv 2406.04093, appendix A.2): dead latents learn what is left over.

    e_hat = ReLU(TopK_aux((x - b_dec) W_enc + b_enc, of the dead)) W_dec        without b_dec
    aux   = aux_coef mean((e_hat - e)^2)                            aux_norm=raw, as the reference
            aux_coef mean((e_hat - e)^2) / mean((e - mean_n(e))^2)  aux_norm=variance; NaN is 0

The error e = x - x_hat is a constant here. aux_relu=false leaves the ReLU out, as the reference:
then latents whose pre-activations are negative get gradients too.

Shapes: n rows, d = d_model, D = dead latents.

AuxK works on its dead columns by dense products. By gathers it would cost less only once 64 % of
the dictionary were dead (d 2560, F 32,768, k_aux 512: 5 x 1,154 ms x share against 1,154 ms x share
+ 4 x (114 + 137 + 2 x 244) ms).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from residual_saes.train import kernels
from residual_saes.train.functions import rows
from residual_saes.train.parallel import Group
from residual_saes.train.sae import SAE, SAEConfig


def auxk(
    sae: SAE,
    bias: Tensor,
    centred: Tensor,
    error: Tensor,
    dead: Tensor,
    config: SAEConfig,
    group: Group,
) -> Tensor:
    """() the loss of the dead latents.

    Args:
        bias: (F,) the encoder's, a result of train.functions.bias.
        centred: (n, d) rows x - b_dec, a constant: b_dec's gradient flows through `bias`.
        error: (n, d_out) e, a constant.
        dead: (D,) indices, at least one.
    """
    encoder = rows(sae.encoder, dead)
    pre = torch.addmm(rows(bias, dead), centred, encoder.T)  # (n, D)
    f = _largest(pre, config.k_aux, config.aux_relu)
    e_hat = f @ rows(sae.W_dec, dead)
    factor = torch.full_like(error[0, 0], config.aux_coef)
    if config.aux_norm == "variance":
        factor /= group.mean_((group.mean_(error.mean(0)) - error).square().mean())
    return _mean_square_or_zero(e_hat - error, factor)


def _largest(pre: Tensor, k: int, relu: bool) -> Tensor:
    """The k largest of each row of `pre` (n, D), 0 elsewhere; all if D is at most k."""
    result: Tensor = _Largest.apply(pre, k, relu)  # type: ignore[no-untyped-call]
    return result


class _Largest(Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, k: int, relu: bool) -> Tensor:
        if pre.shape[1] > k:
            values, indices = kernels.topk(pre, k)
            if relu:
                values = values.relu()
            f = torch.zeros_like(pre).scatter_(1, indices, values)
        else:
            f = pre.relu() if relu else pre.clone()
        # Without ReLU the gradient goes to every chosen latent: a value of 0 is as good as none.
        ctx.save_for_backward(f > 0 if relu else f != 0)
        return f

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (passed,) = ctx.saved_tensors
        return gradient * passed, None, None


def _mean_square_or_zero(residual: Tensor, factor: Tensor) -> Tensor:
    """() `factor` mean(residual^2), but 0 where that is NaN: of a perfect reconstruction."""
    result: Tensor = _MeanSquareOrZero.apply(residual, factor)  # type: ignore[no-untyped-call]
    return result


class _MeanSquareOrZero(Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, factor: Tensor) -> Tensor:
        loss = factor * residual.square().mean()
        defined = ~loss.isnan()
        slope = torch.where(defined, factor * (2 / residual.numel()), 0.0)
        ctx.save_for_backward(residual, slope)
        return torch.where(defined, loss, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        residual, slope = ctx.saved_tensors
        return residual * (gradient * slope), None
