"""The training loss and its gradients, written out by hand.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row, D = dead latents.

    e      = x - x_hat
    main   = mean(e^2)                                        aux_norm=raw       (per element, as the reference)
             mean(e^2) / mean_variance                        aux_norm=variance  (Gao et al.: fixed once)
             with what the activation adds to it (train/activations.py)
    e_hat  = ReLU(pre, the k_aux largest of the dead) @ W_dec                    (no bias; e is a constant here)
    aux    = aux_coef * mean((e_hat - e)^2)                   aux_norm=raw
             aux_coef * mean((e_hat - e)^2) / mean((mean_n(e) - e)^2)            aux_norm=variance, NaN counts as 0

AuxK works on its dead columns by dense products. By gathers it would cost less only once 64 % of
the dictionary were dead (d 2560, F 32,768, k_aux 512: 5 x 1,154 ms x share against 1,154 ms x share
+ 4 x (114 + 137 + 2 x 244) ms).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from train import kernels
from train.activations import Activation
from train.kernels import Bags, Kept
from train.parallel import Group
from train.sae import SAE, SAEConfig


class Losses(NamedTuple):
    """One batch's losses, and what they were computed from."""

    loss: Tensor  # () what is minimised: main + aux
    aux: Tensor  # () AuxK's part of it
    error: Tensor  # (n, d) e = x - x_hat
    kept: Kept
    bags: Bags  # its pairs by latent
    gradients: dict[str, Tensor]  # by parameter name, each of its parameter's shape


class _Aux(NamedTuple):
    """AuxK's loss, and its gradients at the dead latents alone."""

    loss: Tensor  # ()
    W_enc: Tensor  # (D, d), latent by latent
    W_dec: Tensor  # (D, d)
    b_enc: Tensor  # (D,)


def losses(
    activation: Activation,
    sae: SAE,
    x: Tensor,
    dead: Tensor,
    config: SAEConfig,
    mean_variance: float,
    group: Group,
) -> Losses:
    """Loss and gradients of one batch, or of this process's share of it: their means over `group`
    are the batch's.

    Args:
        x: (n, d) rows, scaled.
        dead: (D,) indices of the dead latents.
        mean_variance: the rows' per-dimension variance, averaged over dimensions; used by
            aux_norm=variance alone.
    """
    centred = x - sae.b_dec
    main = activation.main(sae, centred, 1.0 if config.aux_norm == "raw" else mean_variance)
    gradients, aux_loss = main.gradients, main.loss.new_zeros(())
    if len(dead) and config.aux_coef:
        aux = _aux(sae, centred, main.error, dead, config, group)
        gradients["W_enc"].T.index_add_(0, dead, aux.W_enc)
        gradients["W_dec"].index_add_(0, dead, aux.W_dec)
        gradients["b_enc"].index_add_(0, dead, aux.b_enc)
        aux_loss = aux.loss
    # b_dec is also subtracted from the encoder's input, for both losses.
    gradients["b_dec"].sub_(sae.W_enc @ gradients["b_enc"])
    return Losses(main.loss + aux_loss, aux_loss, main.error, main.kept, main.bags, gradients)


def _aux(
    sae: SAE, centred: Tensor, error: Tensor, dead: Tensor, config: SAEConfig, group: Group
) -> _Aux:
    """AuxK: the dead latents learn to reconstruct what the living ones leave over."""
    W_enc, W_dec = sae.W_enc.T[dead], sae.W_dec[dead]  # (D, d) both
    pre = torch.addmm(sae.b_enc[dead], centred, W_enc.T)  # (n, D)
    activations = _keep_largest(pre, config.k_aux).relu_()
    residual = activations @ W_dec - error  # (n, d)
    factor = torch.full_like(residual[0, 0], config.aux_coef)
    if config.aux_norm == "variance":
        factor /= group.mean_((group.mean_(error.mean(0)) - error).square().mean())
    loss = factor * residual.square().mean()
    finite = ~loss.isnan()
    upstream = residual * torch.where(
        finite, factor * (2 / residual.numel()), 0.0
    )  # d loss / d e_hat
    inner = (upstream @ W_dec.T) * (activations > 0)  # (n, D)
    return _Aux(
        torch.where(finite, loss, 0.0), inner.T @ centred, activations.T @ upstream, inner.sum(0)
    )


def _keep_largest(pre: Tensor, k: int) -> Tensor:
    """`pre` (n, D) with all but the k largest of each row set to 0; all of it if there are no more
    than k.
    """
    if pre.shape[1] <= k:
        return pre
    values, indices = kernels.topk(pre, k)
    return torch.zeros_like(pre).scatter_(1, indices, values)
