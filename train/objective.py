"""What training minimises: an objective's own loss, and AuxK's beside it.

Shapes: n rows, d = d_model, d_out = d but in a transcoder, F = d_sae, D = dead latents.

    main = what train/objectives/NAME.py says, of sae.activation=NAME
    loss = main + aux                                  aux: train/objectives/auxk.py
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from residual_saes.data.errors import SettingError
from residual_saes.train import objectives, product
from residual_saes.train.blocks import Matmul
from residual_saes.train.dead import firings
from residual_saes.train.kernels import Bags, Kept
from residual_saes.train.objectives.auxk import auxk
from residual_saes.train.optim import Adam
from residual_saes.train.parallel import Group
from residual_saes.train.sae import SAE, SAEConfig

Thresholds = Literal["none", "followed", "learned"]


class Main(NamedTuple):
    """An objective's loss on one batch, and what it was computed from."""

    loss: Tensor  # ()
    error: Tensor  # (n, d_out) e = y - y_hat
    kept: Kept  # the activations
    bags: Bags  # the same pairs by latent
    bias: Tensor  # (F,) the encoder's, through which an autoencoder's b_dec gets a gradient


@dataclass(frozen=True)
class Objective:
    """An activation function with its loss. train/objectives/NAME.py has one as OBJECTIVE."""

    config: SAEConfig
    matmul: Matmul = "fp32"  # precision of the encoder product in training
    # The tensors that the optimizer moves.
    learned: ClassVar[tuple[str, ...]] = ("encoder", "W_dec", "b_enc", "b_dec")
    # True: rows of a batch compete with each other, so processes cannot share a batch.
    whole_batch: ClassVar[bool] = True
    settings: ClassVar[type[SAEConfig]] = SAEConfig  # what `sae.` has for this objective
    # Those of the trained SAE: none, followed (set by what batches keep), or learned.
    thresholds: ClassVar[Thresholds] = "none"

    def __post_init__(self) -> None:
        """Raise SettingError for a setting that this objective cannot use."""

    def started(self, sae: SAE) -> SAE:
        """The SAE before its first step, with all tensors that this objective needs."""
        return sae

    def largest(self, centred: Tensor, encoder: Tensor, b_enc: Tensor) -> Kept:
        """The n k largest positive pre-activations of a batch of n rows."""
        return product.encode_batch(centred, encoder, b_enc, self.config.k, self.matmul)

    def kept_by_k(self, sae: SAE, x: Tensor) -> Kept:
        """The largest of rows x (n, d), by which thresholds begin where there are some."""
        return self.largest(sae.centred(x), sae.encoder, sae.b_enc)

    def begin_(self, sae: SAE, centred: Tensor) -> None:
        """Set thresholds by the first batch, centred (n, d)."""

    def take_(self, sae: SAE, threshold: Tensor) -> None:
        """Set thresholds (F,) to those of another SAE."""

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        """The loss of one batch; autograd follows `sae`'s learned tensors.

        Args:
            centred: (n, d) what the encoder reads: x - b_dec, of a transcoder x - b_in.
            target: (n, d_out) what the latents have to give: y - b_dec, less the skip's part. In an
                autoencoder it is `centred`, the same tensor.
            denominator: of squared errors.
        """
        raise NotImplementedError

    def parameters(self, sae: SAE) -> dict[str, Tensor]:
        """The tensors that the optimizer moves, by name."""
        names = self.learned if sae.W_skip is None else (*self.learned, "W_skip")
        return {name: getattr(sae, name) for name in names}

    def after_(self, sae: SAE, kept: Kept) -> None:
        """Move or bound thresholds once the optimizer has moved the weights."""

    def restart_(self, sae: SAE, adam: Adam, latents: Tensor) -> None:
        """Restart this objective's own tensors of resampled latents (D,)."""


def names() -> list[str]:
    """Allowed values of sae.activation."""
    modules = pkgutil.iter_modules(objectives.__path__)
    return [module.name for module in modules if module.name != "auxk"]


def find(name: str) -> type[Objective]:
    """The objective of sae.activation=NAME.

    Raises:
        SettingError: there is none.
    """
    if name not in names():
        raise SettingError(f"sae.activation={name!r} must be one of {', '.join(names())}")
    objective: type[Objective] = import_module(f"residual_saes.train.objectives.{name}").OBJECTIVE
    return objective


def _centred(sae: SAE, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder reads (n, d), and what the latents have to give (n, d_out)."""
    if sae.b_in is None:
        centred = x - sae.b_dec
        return centred, centred
    centred = x - sae.b_in
    target = y - sae.b_dec
    return centred, target if sae.W_skip is None else target - centred @ sae.W_skip


class Losses(NamedTuple):
    """One batch's losses and gradients."""

    loss: Tensor  # () what is minimised: main + aux
    aux: Tensor  # () AuxK's part of it
    error: Tensor  # (n, d_out) e = y - y_hat
    kept: Kept
    fired: Tensor  # (F,) times that each latent fired, in the whole batch
    gradients: dict[str, Tensor]  # by the name of a learned tensor, of its shape


def losses(
    objective: Objective,
    sae: SAE,
    x: Tensor,
    y: Tensor,
    dead: Tensor,
    mean_variance: float,
    group: Group,
) -> Losses:
    """Losses and gradients of a batch, or of this process's share: the batch's are the means.

    Args:
        x: (n, d) rows that are read, scaled.
        y: (n, d_out) rows that are written, scaled; of an autoencoder x itself.
        dead: (D,) indices of the dead latents.
        mean_variance: of y per dimension, averaged over dimensions; for aux_norm=variance.
    """
    config = objective.config
    denominator = 1.0 if config.aux_norm == "raw" else mean_variance
    learned: dict[str, Any] = {}
    for name, parameter in objective.parameters(sae).items():
        learned[name] = parameter.detach().requires_grad_()
    with torch.enable_grad():
        leaves = replace(sae, **learned)
        centred, target = _centred(leaves, x, y)
        main = objective.main(leaves, centred, target, denominator)
        aux = main.loss.new_zeros(())
        kept = main.kept._replace(values=main.kept.values.detach())
        fired = group.sum_(firings(kept, config.d_sae, main.bags))
        if len(dead) and not config.aux_relu:
            dead = dead[fired[dead] == 0]  # device sync
        if len(dead) and config.aux_coef:
            aux = auxk(
                leaves, main.bias, centred.detach(), main.error.detach(), dead, config, group
            )
        loss = main.loss + aux
    gradients = torch.autograd.grad(loss, list(learned.values()))
    return Losses(
        loss.detach(),
        aux.detach(),
        main.error.detach(),
        kept,
        fired,
        dict(zip(learned, gradients, strict=True)),
    )
