"""HierarchicalTopK (Balagansky et al., arXiv 2505.24473): a TopK SAE to be read at many k.

    x_hat_j = the j largest latents of a row times their directions, + b_dec
    loss    = mean over j of mean((x - x_hat_j)^2) / denominator,     j = k, k / 2, k / 4, ...

`nested` says how many values j has. The paper's loss has every j up to k, which costs k errors of a
row; docs/method.md has both measured. The latents are TopK's, and so is the trained SAE: read at
another k' <= k it is `replace(sae, k=k')`. AuxK and the figures see the error at k.

Shapes: n rows, d = d_model, F = d_sae, levels = nested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from residual_saes.train.functions import bias, encode, mean_square
from residual_saes.train.kernels import Kept
from residual_saes.train.objective import Main
from residual_saes.train.objectives.matryoshka import halvings, nested_errors, require_nested
from residual_saes.train.objectives.topk import TopK
from residual_saes.train.sae import SAE


@dataclass(frozen=True)
class Hierarchical(TopK):
    def __post_init__(self) -> None:
        require_nested(self.config, "k")

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        b_enc = bias(sae.b_enc, sae)
        kept, bags = encode(self._largest_first, centred, sae.encoder, b_enc)
        f = kept._replace(values=kept.values.relu())  # as TopK does
        levels = len(self.budgets())
        errors = nested_errors(target, f, bags, self._bag_of(kept), levels, sae.W_dec)
        return Main(mean_square(errors, denominator), errors[:, -1], f, bags, b_enc)

    def budgets(self) -> list[int]:
        """The values of j, ascending; the last is k."""
        return [self.config.k >> level for level in reversed(range(self.config.nested))]

    def _largest_first(self, centred: Tensor, encoder: Tensor, b_enc: Tensor) -> Kept:
        """TopK's pairs; those of a row from the largest to the smallest."""
        kept = self.largest(centred, encoder, b_enc)
        values = kept.values.view(-1, self.config.k)
        indices = kept.indices.view(-1, self.config.k)
        order = values.sort(dim=1, descending=True, stable=True).indices
        return Kept.even(values.gather(1, order), indices.gather(1, order))

    def _bag_of(self, kept: Kept) -> Tensor:
        """(p,) row * levels + level: the smallest budget that has the pair."""
        budgets = halvings(self.config.k, self.config.nested, kept.indices.device)
        ranks = torch.arange(self.config.k, device=kept.indices.device)
        level_of_rank = torch.searchsorted(budgets, ranks, right=True)
        rows = kept.rows.view(-1, self.config.k) * len(budgets)
        return (rows + level_of_rank).view(-1)


OBJECTIVE = Hierarchical
