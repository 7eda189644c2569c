"""Gated SAE (Rajamanoharan et al., arXiv 2404.16014): a gate decides, a magnitude is free of L1.

    u       = (x - b_dec) W_gate                                W_gate is the encoder
    pi      = u + b_gate                                        the gate: open where pi > 0
    f       = H(pi) ReLU(exp(r_mag) u + b_mag)                  tied by r_mag; b_mag is b_enc
    x_hat   = f W_dec + b_dec
    x_gate  = ReLU(pi) W_dec + b_dec                            W_dec and b_dec are constants here
    loss    = mean over rows of (|x - x_hat|^2 + l1_coef sum_i ReLU(pi_i) + |x - x_gate|^2)
              / (d denominator)                                 formula 8 there, per element

The trained SAE is one with thresholds (appendix there). With z = exp(r_mag) u + b_mag, the gate is
open where z > b_mag - exp(r_mag) b_gate.

Unlike the paper, b_gate starts where the first batch keeps k latents a row: with gates open for
half of all latents the first steps would cost as much as dense ones.

Shapes: n rows, d = d_model, F = d_sae, p pairs whose gate is open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from residual_saes.data.errors import SettingError
from residual_saes.train import product
from residual_saes.train.functions import bias, decode, encode, mean_square, per_pair
from residual_saes.train.kernels import Kept
from residual_saes.train.objective import Main, Objective, Thresholds
from residual_saes.train.objectives.batchtopk import smallest
from residual_saes.train.optim import Adam
from residual_saes.train.sae import SAE, SAEConfig, Scales


@dataclass(frozen=True)
class GatedConfig(SAEConfig):
    """`sae.` of gated. L1 takes k's place: k decides the start alone."""

    activation: str = "gated"
    aux_coef: float = 0.0  # dead latents are restarted by resample instead
    # Weight of the gate's L1, on rows scaled to E||x|| = sqrt(d). Embedded model, 512 latents: 0.3
    # leaves 33 latents a row, 1.0 leaves 17. Not tuned for 32,768 latents.
    l1_coef: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aux_coef:
            raise SettingError(
                f"sae.aux_coef={self.aux_coef} must be 0 with sae.activation=gated, which has no "
                "AuxK; sae.resample=true restarts dead latents"
            )
        if not (math.isfinite(self.l1_coef) and self.l1_coef >= 0):
            raise SettingError(f"sae.l1_coef={self.l1_coef} must be 0 or a positive number")


@dataclass(frozen=True, kw_only=True)
class GatedSAE(SAE):
    """In training. Its file, its evaluation and its users have `thresholded`."""

    r_mag: Tensor  # (F,)
    b_gate: Tensor  # (F,)

    def thresholded(self) -> SAE:
        """The same function as an SAE with a threshold per latent."""
        growth = self.r_mag.exp()
        threshold = (self.b_enc - growth * self.b_gate).clamp_min(0)  # at least 0: ReLU
        encoder = self.encoder * growth.unsqueeze(1)
        return SAE(
            encoder,
            self.W_dec,
            self.b_enc,
            self.b_dec,
            self.k,
            threshold,
            self.b_in,
            self.W_skip,
            self.by,
        )

    def encode(self, x: Tensor) -> Kept:
        return self.thresholded().encode(x)

    def folded(self, scale: float | Scales, basis: Tensor | None = None) -> SAE:
        return self.thresholded().folded(scale, basis)


@dataclass(frozen=True)
class Gated(Objective):
    learned: ClassVar[tuple[str, ...]] = (*Objective.learned, "r_mag", "b_gate")
    whole_batch: ClassVar[bool] = False
    settings: ClassVar[type[SAEConfig]] = GatedConfig
    thresholds: ClassVar[Thresholds] = "learned"

    def __post_init__(self) -> None:
        if not isinstance(self.config, GatedConfig):
            raise SettingError(
                "sae.activation=gated has settings of its own; in Python, give a GatedConfig"
            )

    def started(self, sae: SAE) -> GatedSAE:
        zeros = torch.zeros_like(sae.b_enc)
        own: dict[str, Any] = {field.name: getattr(sae, field.name) for field in fields(sae)}
        return GatedSAE(**own, r_mag=zeros, b_gate=zeros.clone())

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        assert isinstance(sae, GatedSAE)
        self.take_(sae, smallest(self.largest(centred, sae.encoder, sae.b_enc)))

    def take_(self, sae: SAE, threshold: Tensor) -> None:
        assert isinstance(sae, GatedSAE)
        sae.b_gate.copy_(sae.b_enc - threshold)  # r_mag is 0, so z = u + b_enc

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        assert isinstance(sae, GatedSAE) and isinstance(self.config, GatedConfig)
        n, d = target.shape

        def open_gates(centred: Tensor, encoder: Tensor, zero: Tensor) -> Kept:
            return product.encode_above(centred, encoder, zero, -sae.b_gate, self.matmul)

        zero = bias(torch.zeros_like(sae.b_enc), sae)  # u has no bias but the one b_dec makes
        u, bags = encode(open_gates, centred, sae.encoder, zero)

        # The reconstruction: magnitudes of the open gates.
        growth = per_pair(sae.r_mag.exp(), u, bags)
        f = u._replace(values=(growth * u.values + per_pair(sae.b_enc, u, bags)).relu())
        error = target - decode(f, bags, sae.W_dec)

        # The gate learns by L1 and by its own reconstruction, whose decoder and skip are frozen.
        pi = u._replace(values=u.values + per_pair(sae.b_gate, u, bags))
        gate_error = target.detach() - decode(pi, bags, sae.W_dec.detach())
        l1 = pi.values.sum() / (n * d * denominator)

        loss = mean_square(error, denominator) + mean_square(gate_error, denominator)
        return Main(loss + self.config.l1_coef * l1, error, f, bags, zero)

    def restart_(self, sae: SAE, adam: Adam, latents: Tensor) -> None:
        assert isinstance(sae, GatedSAE)
        sae.r_mag[latents] = 0.0
        sae.b_gate[latents] = sae.b_gate.mean()
        for name in ("r_mag", "b_gate"):
            adam.restart_(name, latents)


OBJECTIVE = Gated
