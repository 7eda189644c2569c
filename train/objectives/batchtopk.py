"""BatchTopK (Bussmann et al., arXiv 2412.06410): a batch keeps its n k largest pre-activations.

    f     = ReLU(the n k largest of all n rows of (x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec
    loss  = mean((x - x_hat)^2) / denominator

A single row has no batch to compete in. So the trained SAE keeps what is above a threshold, one
for all latents: the running mean of the smallest value that a batch kept (section 3 there).

Shapes: n rows, d = d_model, F = d_sae.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from residual_saes.train.functions import bias, decode, encode, mean_square
from residual_saes.train.kernels import Kept
from residual_saes.train.objective import Main, Objective, Thresholds
from residual_saes.train.sae import SAE

_THRESHOLD_DECAY = 0.99  # of the running mean, over about the last 100 batches


@dataclass(frozen=True)
class Thresholded(Objective):
    """An objective whose SAE has thresholds, which start by BatchTopK's first batch."""

    thresholds: ClassVar[Thresholds] = "followed"

    def started(self, sae: SAE) -> SAE:
        return replace(sae, threshold=sae.b_enc.new_zeros(sae.d_sae))

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        assert sae.threshold is not None
        sae.threshold.copy_(smallest(self.largest(centred, sae.encoder, sae.b_enc)))

    def take_(self, sae: SAE, threshold: Tensor) -> None:
        assert sae.threshold is not None
        sae.threshold.copy_(threshold)


@dataclass(frozen=True)
class BatchTopK(Thresholded):
    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        b_enc = bias(sae.b_enc, sae)
        f, bags = encode(self.largest, centred, sae.encoder, b_enc)  # positive, so no ReLU
        error = target - decode(f, bags, sae.W_dec)
        return Main(mean_square(error, denominator), error, f, bags, b_enc)

    def after_(self, sae: SAE, kept: Kept) -> None:
        follow_(sae, kept)


def follow_(sae: SAE, kept: Kept) -> None:
    """Move the threshold towards the smallest value that a batch kept."""
    assert sae.threshold is not None
    sae.threshold.lerp_(smallest(kept), 1 - _THRESHOLD_DECAY)


def smallest(kept: Kept) -> Tensor:
    """() the smallest kept value, 0 if none was kept."""
    return kept.values.amin() if len(kept.values) else kept.values.new_zeros(())


OBJECTIVE = BatchTopK
