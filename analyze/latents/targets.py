"""What each latent of a crosscoder writes to each of its targets, by its decoder.

    norm     of the latent's direction in a target's columns of W_dec, times the scale of the target
             in training: the targets then have the same E||y||, so norms can be compared
    share    norm over the sum of the latent's norms; of two targets the second one's share is the
             relative decoder norm |d_B| / (|d_A| + |d_B|) of Lindsey et al. (2024, "Sparse
             Crosscoders for Cross-Layer Features and Model Diffing")
    cosine   of its directions in two targets; of more than two, the smallest of all pairs

A latent is a target's own where that target's share is at least OWN, and shared where each target's
share is at least SHARED of an equal part: of two targets from 0.3 to 0.7. All others lie between.
Minder et al. (arXiv 2504.02922) have 0.83 and 0.38 to 0.62 in these units.

Shapes: F latents, T targets, d columns of a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.analyze.latents.nearest import unit
from residual_saes.analyze.subject import Subject

OWN = 0.9
SHARED = 0.6
ALIKE = 0.8  # cosine from which two directions are the same, and below whose negative opposite


def class_names(targets: Sequence[str]) -> list[str]:
    """The names of `Targets.classes`, by their numbers."""
    return [*(f"own of {name}" for name in targets), "shared", "between"]


class Targets(NamedTuple):
    """What latents write to T targets."""

    norms: NDArray[np.float64]  # (F, T)
    cosine: NDArray[np.float64]  # (F,) NaN where targets have different widths, or a norm is 0

    @property
    def shares(self) -> NDArray[np.float64]:
        """(F, T) of each latent's norms; equal parts for a latent that writes nothing."""
        total = self.norms.sum(1, keepdims=True)
        equal = np.full_like(self.norms, 1 / self.norms.shape[1])
        shares: NDArray[np.float64] = np.divide(self.norms, total, out=equal, where=total > 0)
        return shares

    @property
    def entropy(self) -> NDArray[np.float64]:
        """(F,) of the shares, over that of equal ones: 0 of a target's own, 1 of equal shares."""
        shares = self.shares
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.asarray(-(shares * logs).sum(1) / np.log(shares.shape[1]))

    @property
    def classes(self) -> NDArray[np.int64]:
        """(F,) t: target t's own; T: shared; T + 1: between."""
        shares = self.shares
        count = shares.shape[1]
        strongest = shares.argmax(1)
        is_shared = shares.min(1) >= SHARED / count
        others = np.where(is_shared, count, count + 1)
        classes: NDArray[np.int64] = np.where(shares.max(1) >= OWN, strongest, others)
        return classes


def names_of(subject: Subject) -> list[str]:
    """The targets for people: of several stores each with its store's name, where these differ."""
    ports = subject.ports.writes
    stores = [Path(store.name.rstrip("/")).stem for store in subject.stores]
    if len(set(stores)) < max(len(stores), 2):
        return [str(port) for port in ports]
    return [f"{port.point} of {stores[port.store]}" for port in ports]


def of(subject: Subject) -> Targets:
    """What the latents of a crosscoder write to each of its targets."""
    W_dec = subject.sae.W_dec
    parts = [W_dec[:, subject.columns(port)] for port in subject.ports.writes]
    norms = subject.decoder_norms().double()
    cosine = norms.new_full((len(W_dec),), torch.nan)
    if len({part.shape[1] for part in parts}) == 1:
        directions = torch.stack([unit(part) for part in parts])
        cosine = torch.einsum("sfd,tfd->fst", directions, directions).flatten(1).amin(1).double()
    cosine = torch.where((norms > 0).all(1), cosine, torch.nan)
    return Targets(norms.cpu().numpy(), cosine.cpu().numpy())
