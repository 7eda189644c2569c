"""Matryoshka (Bussmann et al., arXiv 2503.17547): BatchTopK whose first latents work alone.

    x_hat_j = the part of f W_dec of the first F / 2^j latents, + b_dec,      j < nested
    loss    = mean over j of mean((x - x_hat_j)^2) / denominator

f is BatchTopK's. AuxK and the figures see the error of all latents.

Shapes: n rows, d = d_model, F = d_sae, levels = nested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from residual_saes.data.errors import SettingError
from residual_saes.train.functions import bias, decode, encode, mean_square
from residual_saes.train.kernels import Bags, Kept, starts_of
from residual_saes.train.objective import Main
from residual_saes.train.objectives.batchtopk import Thresholded, follow_
from residual_saes.train.sae import SAE, SAEConfig


@dataclass(frozen=True)
class Matryoshka(Thresholded):
    def __post_init__(self) -> None:
        require_nested(self.config, "d_sae")

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        levels = self.config.nested
        b_enc = bias(sae.b_enc, sae)
        f, bags = encode(self._by_level, centred, sae.encoder, b_enc)
        errors = nested_errors(target, f, bags, self._bag_of(f), levels, sae.W_dec)
        return Main(mean_square(errors, denominator), errors[:, -1], f, bags, b_enc)

    def after_(self, sae: SAE, kept: Kept) -> None:
        follow_(sae, kept)

    def _by_level(self, centred: Tensor, encoder: Tensor, b_enc: Tensor) -> Kept:
        """BatchTopK's pairs; those of a row in the order of the dictionaries that add them."""
        kept = self.largest(centred, encoder, b_enc)
        order = self._bag_of(kept).sort(stable=True).indices
        return Kept(kept.values[order], kept.indices[order], kept.rows[order], kept.starts)

    def _bag_of(self, kept: Kept) -> Tensor:
        """(p,) row * levels + j: the j-th dictionary, smallest first, adds the pair to the row."""
        levels = self.config.nested
        ends = halvings(self.config.d_sae, levels, kept.indices.device)
        return kept.rows * levels + torch.searchsorted(ends, kept.indices, right=True)


def halvings(whole: int, levels: int, device: torch.device) -> Tensor:
    """(levels,) int64 ..., whole / 4, whole / 2, whole; made there, so that nothing is copied."""
    return whole >> torch.arange(levels - 1, -1, -1, device=device)


def require_nested(config: SAEConfig, halved: Literal["d_sae", "k"]) -> None:
    """Raise SettingError unless the setting `halved` can be halved sae.nested - 1 times."""
    nested = config.nested
    if isinstance(nested, bool) or not isinstance(nested, int) or nested < 1:
        raise SettingError(f"sae.nested={nested!r} must be a whole number of at least 1")
    if getattr(config, halved) >> (nested - 1) < 1:
        raise SettingError(
            f"sae.nested={nested} halvings leave nothing of sae.{halved}="
            f"{getattr(config, halved)}; lower it"
        )


def nested_errors(
    target: Tensor, f: Kept, bags: Bags, level_bags: Tensor, levels: int, W_dec: Tensor
) -> Tensor:
    """(n, levels, d) x - x_hat_j, where each level adds pairs to the reconstruction before it.

    Args:
        target: (n, d) what the latents have to give: rows x - b_dec.
        bags: the pairs of `f` by latent.
        level_bags: (p,) row * levels + level of each pair of `f`, ascending.
    """
    split = Kept(f.values, f.indices, level_bags, starts_of(level_bags, len(target) * levels))
    added = decode(split, bags, W_dec).view(len(target), levels, -1)
    result: Tensor = _NestedErrors.apply(target, added)  # type: ignore[no-untyped-call]
    return result


class _NestedErrors(Function):
    """What a level adds is in its own reconstruction and in all later ones."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, added: Tensor) -> Tensor:
        return target.unsqueeze(1) - added.cumsum(1)

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> Any:
        later = errors.flip(1).cumsum(1).flip(1)
        return later[:, 0], later.neg()


OBJECTIVE = Matryoshka
