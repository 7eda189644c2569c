"""Which latents are dead: how many tokens ago each one last fired."""

from __future__ import annotations

import torch
from torch import Tensor

from train import kernels
from train.kernels import Bags, Kept
from train.optim import Adam
from train.sae import SAE

_TINY = 1e-30  # of a norm, so that an error of 0 gives a direction of 0


def never_fired(d_sae: int, device: torch.device) -> Tensor:
    """(F,) counters at the start of training: every latent counts as having just fired."""
    return torch.zeros(d_sae, dtype=torch.int64, device=device)


def firings(kept: Kept, d_sae: int, bags: Bags | None = None) -> Tensor:
    """(F,) times that each latent fired in a batch: was kept and positive. Among the k largest with
    0 is silence.

    Args:
        bags: the pairs grouped by latent, if that has been done.
    """
    positive = (kept.values > 0).to(kept.values.dtype)
    return kernels.latent_sums(
        positive, kept.indices, d_sae, bags
    )  # sums, because indexing by a mask syncs the device


def count_(silent: Tensor, fired: Tensor, tokens: int) -> None:
    """Add a batch of `tokens` rows to the counters (F,) of tokens since each latent fired, in
    place.

    Args:
        fired: (F,) times that each latent fired in it.
    """
    silent.add_(tokens).masked_fill_(fired > 0, 0)


def dead_latents(silent: Tensor, dead_after: int) -> Tensor:
    """(D,) indices of the latents that have been silent for at least `dead_after` tokens."""
    return (silent >= dead_after).nonzero().view(-1)


def resample_(sae: SAE, adam: Adam, latents: Tensor, error: Tensor, draw: Tensor) -> None:
    """Restart latents (D,) where the reconstruction is worst off: along the errors of random rows.

    Each reads and writes along the error e of a row, with an encoder as long as the others' along
    their own directions, no bias, and the optimizer's moments of a latent that it knows nothing of.

    Args:
        error: (n, d) of the batch.
        draw: (D,) numbers of the rows.
    """
    directions = error[draw]
    directions = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True).clamp_min_(
        _TINY
    )
    along = (sae.encoder * sae.W_dec).sum(1).mean()
    sae.W_dec[latents] = directions
    sae.encoder[latents] = directions * along
    sae.b_enc[latents] = 0.0
    for name in ("W_dec", "encoder", "b_enc"):
        adam.restart_(name, latents)
