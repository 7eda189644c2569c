"""JumpReLU (Rajamanoharan et al., arXiv 2407.14435): a threshold per latent, which is learned.

    z     = (x - b_dec) W_enc + b_enc
    f     = z H(z - theta)                                  H: Heaviside's step
    x_hat = f W_dec + b_dec
    L0    = the mean number of latents above their threshold in a row
    loss  = mean((x - x_hat)^2) / denominator + l0_coef (L0 / k - 1)^2

The penalty with a target for L0 is the one of the paper's appendix. theta learns by the paper's
pseudo-derivatives (equations 11 and 12), a rectangle of width `bandwidth` around it.

Shapes: n rows, d = d_model, F = d_sae, p pairs that are kept or nearly so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from residual_saes.data.errors import SettingError
from residual_saes.train import kernels, product
from residual_saes.train.functions import bias, decode, encode, mean_square
from residual_saes.train.kernels import Bags, Kept
from residual_saes.train.objective import Main, Thresholds
from residual_saes.train.objectives.batchtopk import Thresholded
from residual_saes.train.sae import SAE


@dataclass(frozen=True)
class JumpReLU(Thresholded):
    learned: ClassVar[tuple[str, ...]] = (*Thresholded.learned, "threshold")
    thresholds: ClassVar[Thresholds] = "learned"

    def __post_init__(self) -> None:
        l0_coef = self.config.l0_coef
        if not (math.isfinite(l0_coef) and l0_coef >= 0):
            raise SettingError(f"sae.l0_coef={l0_coef} must be 0 or a positive number")
        bandwidth = self.config.bandwidth
        if not (math.isfinite(bandwidth) and bandwidth > 0):
            raise SettingError(f"sae.bandwidth={bandwidth} must be a positive number")

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        theta = sae.threshold
        assert theta is not None

        def near(centred: Tensor, encoder: Tensor, b_enc: Tensor) -> Kept:
            """All pairs above theta or in its bandwidth; the others have no gradient."""
            lowest = theta - self.config.bandwidth / 2
            return product.encode_above(centred, encoder, b_enc, lowest, self.matmul)

        b_enc = bias(sae.b_enc, sae)
        z, bags = encode(near, centred, sae.encoder, b_enc)
        values, active = jump(z, bags, theta, self.config.bandwidth)
        f = z._replace(values=values)
        error = target - decode(f, bags, sae.W_dec)
        excess = active / (len(centred) * self.config.k) - 1  # L0 / k - 1
        loss = mean_square(error, denominator) + self.config.l0_coef * excess.square()
        return Main(loss, error, f, bags, b_enc)

    def after_(self, sae: SAE, kept: Kept) -> None:
        assert sae.threshold is not None
        sae.threshold.clamp_min_(0.0)


def jump(z: Kept, bags: Bags, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """(p,) z H(z - theta), and () the sum of H(z - theta) over all pairs."""
    result: tuple[Tensor, Tensor] = _Jump.apply(z.values, z.indices, *bags, theta, bandwidth)  # type: ignore[no-untyped-call]
    return result


class _Jump(Function):
    """Both outputs in one function: theta's gradient is one sum over the pairs.

    Where |z - theta| < bandwidth / 2, and 0 elsewhere:

        d f / d theta = -theta / bandwidth              equation 11
        d H / d theta = -1 / bandwidth                  equation 12
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        indices: Tensor,
        order: Tensor,
        starts: Tensor,
        theta: Tensor,
        bandwidth: float,
    ) -> Any:
        own = theta[indices]
        active = ~(z <= own)  # NaN too, so that it cannot hide
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(z, own, active, indices, order, starts)
        return torch.where(active, z, 0.0), active.to(z.dtype).sum()

    @staticmethod
    def backward(ctx: Any, f: Tensor, step: Tensor) -> Any:
        z, own, active, indices, order, starts = ctx.saved_tensors
        inside = (z - own).abs() < ctx.bandwidth / 2
        pull = torch.where(inside, (own * f + step) / -ctx.bandwidth, 0.0)
        theta = kernels.latent_sums(pull, indices, len(starts), Bags(order, starts))
        return torch.where(active, f, 0.0), None, None, None, theta, None


OBJECTIVE = JumpReLU
