"""TopK (Gao et al., arXiv 2406.04093): each row keeps its k largest pre-activations.

    f     = ReLU(TopK((x - b_dec) W_enc + b_enc))
    x_hat = f W_dec + b_dec
    main  = mean((x - x_hat)^2) / denominator          train/objective.py adds AuxK to it

denominator: 1 under aux_norm=raw (the reference), the rows' variance under variance (the paper).

Shapes: n rows, d = d_model, F = d_sae.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from residual_saes.train import product
from residual_saes.train.functions import bias, decode, encode, mean_square
from residual_saes.train.kernels import Kept
from residual_saes.train.objective import Main, Objective
from residual_saes.train.sae import SAE


@dataclass(frozen=True)
class TopK(Objective):
    whole_batch: ClassVar[bool] = False

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        b_enc = bias(sae.b_enc, sae)
        kept, bags = encode(self.largest, centred, sae.encoder, b_enc)
        # product.encode has applied ReLU. Here ReLU only makes the gradient 0 where the value is 0.
        f = kept._replace(values=kept.values.relu())
        error = target - decode(f, bags, sae.W_dec)  # y - y_hat: target has no b_dec, no skip
        return Main(mean_square(error, denominator), error, f, bags, b_enc)

    def largest(self, centred: Tensor, encoder: Tensor, b_enc: Tensor) -> Kept:
        """The k largest pre-activations of each row."""
        return product.encode(centred, encoder, b_enc, self.config.k, self.matmul)


OBJECTIVE = TopK
