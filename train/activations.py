"""The activations: which latents each one keeps while training, the loss of its reconstruction, and
its gradients.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row (on average, but for TopK), p kept
    pairs.

    e = x - x_hat;  main = mean(e^2) / denominator

BatchTopK and its kin keep by a comparison among the rows of a batch, which a single row does not
have. So they train a threshold beside the weights, and the trained SAE keeps what is above it
(train/sae.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from train import kernels
from train.kernels import Bags, Kept, Matmul
from train.sae import SAE, WEIGHTS, SAEConfig

_THRESHOLD_DECAY = 0.99  # of BatchTopK's running mean, over about the last 100 batches


class Main(NamedTuple):
    """The loss of the reconstruction, AuxK apart."""

    loss: Tensor  # ()
    error: Tensor  # (n, d) e = x - x_hat
    kept: Kept
    bags: Bags  # its pairs by latent
    gradients: dict[
        str, Tensor
    ]  # by parameter name; of b_dec, without its path through the encoder


class Activation(Protocol):
    """What training needs of an activation."""

    learned: ClassVar[tuple[str, ...]]  # the parameters that the optimizer moves

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        """Set the threshold by the first batch, x - b_dec (n, d)."""
        ...

    def main(self, sae: SAE, centred: Tensor, denominator: float) -> Main:
        """Loss and gradients of one batch, x - b_dec (n, d)."""
        ...

    def after_(self, sae: SAE, kept: Kept) -> None:
        """Move the threshold once the weights have moved."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of each row, after ReLU (Gao et al., arXiv 2406.04093)."""

    k: int
    matmul: Matmul
    learned: ClassVar[tuple[str, ...]] = WEIGHTS

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        pass

    def main(self, sae: SAE, centred: Tensor, denominator: float) -> Main:
        kept = kernels.encode(centred, sae.W_enc, sae.b_enc, self.k, self.matmul)
        return reconstruction(sae, centred, kept, denominator)

    def after_(self, sae: SAE, kept: Kept) -> None:
        pass


@dataclass(frozen=True)
class BatchTopK:
    """The n k largest positive pre-activations of a batch of n rows (Bussmann et al., arXiv
    2412.06410).

    The threshold is one for all latents: the running mean of the smallest value that a batch kept
    (section 3 there).
    """

    k: int
    matmul: Matmul
    learned: ClassVar[tuple[str, ...]] = WEIGHTS

    def keep(self, sae: SAE, centred: Tensor) -> Kept:
        return kernels.encode_batch(centred, sae.W_enc, sae.b_enc, self.k, self.matmul)

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        _threshold(sae).copy_(_smallest(self.keep(sae, centred)))

    def main(self, sae: SAE, centred: Tensor, denominator: float) -> Main:
        return reconstruction(sae, centred, self.keep(sae, centred), denominator)

    def after_(self, sae: SAE, kept: Kept) -> None:
        _threshold(sae).lerp_(_smallest(kept), 1 - _THRESHOLD_DECAY)


@dataclass(frozen=True)
class JumpReLU:
    """Every pre-activation above its latent's own threshold theta (Rajamanoharan et al., arXiv
    2407.14435).

        loss = main + l0_coef (L0 / k - 1)^2          L0: mean latents above their threshold (appendix there: a target)

    theta learns by the paper's pseudo-derivatives, a rectangle of width `bandwidth` around it: d f
    / d theta = -theta / bandwidth and d L0 / d theta = -1 / bandwidth for each pre-activation
    inside, 0 outside.
    """

    k: int
    l0_coef: float
    bandwidth: float
    matmul: Matmul
    learned: ClassVar[tuple[str, ...]] = (*WEIGHTS, "threshold")

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        BatchTopK(self.k, self.matmul).begin_(sae, centred)

    def main(self, sae: SAE, centred: Tensor, denominator: float) -> Main:
        threshold, half = _threshold(sae), self.bandwidth / 2
        pairs = kernels.encode_above(centred, sae.W_enc, sae.b_enc, threshold - half, self.matmul)
        own = threshold[pairs.indices]
        active = ~(pairs.values <= own)  # NaN too, so that it cannot hide
        kept = pairs._replace(values=torch.where(active, pairs.values, 0.0))
        error, upstream = _error(sae, centred, kept, denominator)
        towards = kernels.values_gradient(upstream, kept, sae.W_dec)
        excess = active.to(error.dtype).sum() / (len(centred) * self.k) - 1
        slope = (
            2 * self.l0_coef * excess / (len(centred) * self.k)
        )  # of the loss, per latent of a row
        inside = (pairs.values - own).abs() < half
        pull = torch.where(inside, (own * towards + slope) / -self.bandwidth, 0.0)
        bags = kernels.group_by_latent(kept.indices, sae.d_sae)
        gradients = _gradients(
            sae, centred, kept, bags, upstream, torch.where(active, towards, 0.0)
        )
        gradients["threshold"] = kernels.latent_sums(pull, pairs.indices, sae.d_sae, bags)
        loss = error.square().mean() / denominator + self.l0_coef * excess.square()
        return Main(loss, error, kept, bags, gradients)

    def after_(self, sae: SAE, kept: Kept) -> None:
        _threshold(sae).clamp_min_(0.0)


@dataclass(frozen=True)
class Matryoshka:
    """BatchTopK whose first F / 2^j latents must reconstruct alone, for every j < nested (arXiv
    2503.17547).

        loss = mean over j of mean((x - x_hat of the first F / 2^j latents)^2) / denominator

    The error that AuxK and the figures see is that of all latents.
    """

    k: int
    nested: int
    matmul: Matmul
    learned: ClassVar[tuple[str, ...]] = WEIGHTS

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        BatchTopK(self.k, self.matmul).begin_(sae, centred)

    def main(self, sae: SAE, centred: Tensor, denominator: float) -> Main:
        kept, levels = BatchTopK(self.k, self.matmul).keep(sae, centred), self.nested
        ends = torch.tensor(
            [sae.d_sae >> level for level in reversed(range(levels))], device=centred.device
        )
        # Bag `row * levels + j` holds the row's pairs that the j-th dictionary adds; bags ascend,
        # as rows do.
        bags = kept.rows * levels + torch.searchsorted(ends, kept.indices, right=True)
        bags, order = bags.sort(stable=True)
        values, indices, rows = (part[order] for part in kept[:3])
        starts = torch.searchsorted(bags, torch.arange(len(centred) * levels, device=bags.device))
        split = Kept(values, indices, bags, starts)
        parts = kernels.decode(split, sae.W_dec).view(len(centred), levels, -1)
        errors = centred.unsqueeze(1) - parts.cumsum(1)  # (n, levels, d)
        upstream = errors * (-2 / (errors.numel() * denominator))
        # What a level adds is in its own reconstruction and in all later ones.
        upstream = upstream.flip(1).cumsum(1).flip(1)
        flat = upstream.reshape(-1, upstream.shape[-1])
        towards = kernels.values_gradient(flat, split, sae.W_dec) * (values > 0)
        by_latent = kernels.group_by_latent(indices, sae.d_sae)
        gradients = {
            "W_enc": kernels.weight_gradient(centred, towards, rows, by_latent).T,
            "W_dec": kernels.weight_gradient(flat, values, bags, by_latent),
            "b_enc": kernels.latent_sums(towards, indices, sae.d_sae, by_latent),
            "b_dec": upstream[:, 0].sum(0),
        }
        kept = Kept(values, indices, rows, kept.starts)
        return Main(errors.square().mean() / denominator, errors[:, -1], kept, by_latent, gradients)

    def after_(self, sae: SAE, kept: Kept) -> None:
        BatchTopK(self.k, self.matmul).after_(sae, kept)


def activation(config: SAEConfig, matmul: Matmul = "fp32") -> Activation:
    """The one that `config` names; `matmul` is the precision of its encoder product in training."""
    match config.activation:
        case "topk":
            return TopK(config.k, matmul)
        case "batchtopk":
            return BatchTopK(config.k, matmul)
        case "jumprelu":
            return JumpReLU(config.k, config.l0_coef, config.bandwidth, matmul)
        case _:
            return Matryoshka(config.k, config.nested, matmul)


def reconstruction(sae: SAE, centred: Tensor, kept: Kept, denominator: float) -> Main:
    """mean(e^2) / denominator and its gradients; a kept value of 0 has none, as ReLU is shut
    there.
    """
    error, upstream = _error(sae, centred, kept, denominator)
    towards = kernels.values_gradient(upstream, kept, sae.W_dec) * (kept.values > 0)
    bags = kernels.group_by_latent(kept.indices, sae.d_sae)
    gradients = _gradients(sae, centred, kept, bags, upstream, towards)
    return Main(error.square().mean() / denominator, error, kept, bags, gradients)


def _error(sae: SAE, centred: Tensor, kept: Kept, denominator: float) -> tuple[Tensor, Tensor]:
    """e (n, d), and the gradient of mean(e^2) / denominator at x_hat."""
    error = centred - kernels.decode(kept, sae.W_dec)
    return error, error * (-2 / (error.numel() * denominator))


def _gradients(
    sae: SAE, centred: Tensor, kept: Kept, bags: Bags, upstream: Tensor, values: Tensor
) -> dict[str, Tensor]:
    """By parameter, from those at x_hat (n, d) and at the pre-activations of the kept pairs
    (p,).
    """
    return {
        "W_enc": kernels.weight_gradient(centred, values, kept.rows, bags).T,
        "W_dec": kernels.weight_gradient(upstream, kept.values, kept.rows, bags),
        "b_enc": kernels.latent_sums(values, kept.indices, sae.d_sae, bags),
        "b_dec": upstream.sum(0),
    }


def _threshold(sae: SAE) -> Tensor:
    assert sae.threshold is not None
    return sae.threshold


def _smallest(kept: Kept) -> Tensor:
    """() the smallest kept value, 0 if none was kept."""
    return kept.values.amin() if len(kept.values) else kept.values.new_zeros(())
