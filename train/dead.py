"""Which latents are dead: how many tokens ago each one last fired."""

from __future__ import annotations

import torch
from torch import Tensor

from train import kernels
from train.kernels import Kept


def never_fired(d_sae: int, device: torch.device) -> Tensor:
    """(F,) counters at the start of training: every latent counts as having just fired."""
    return torch.zeros(d_sae, dtype=torch.int64, device=device)


def firings(kept: Kept, d_sae: int) -> Tensor:
    """(F,) times that each latent fired in a batch: was kept and positive. Among the k largest with 0 is silence."""
    positive = (kept.values > 0).to(kept.values.dtype)
    return kernels.latent_sums(positive, kept.indices, d_sae)  # sums, because indexing by a mask syncs the device


def count_(silent: Tensor, fired: Tensor, tokens: int) -> None:
    """Add a batch of `tokens` rows to the counters (F,) of tokens since each latent fired, in place.

    Args:
        fired: (F,) times that each latent fired in it.
    """
    silent.add_(tokens).masked_fill_(fired > 0, 0)


def dead_latents(silent: Tensor, dead_after: int) -> Tensor:
    """(D,) indices of the latents that have been silent for at least `dead_after` tokens."""
    return (silent >= dead_after).nonzero().view(-1)
