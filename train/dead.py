"""Which latents are dead: how many tokens ago each one last fired."""

from __future__ import annotations

import torch
from torch import Tensor

from train import kernels
from train.kernels import Kept


def never_fired(d_sae: int, device: torch.device) -> Tensor:
    """(F,) counters at the start of training: every latent counts as having just fired."""
    return torch.zeros(d_sae, dtype=torch.int64, device=device)


def fired(kept: Kept, d_sae: int) -> Tensor:
    """(F,) which latents fired in a batch: were kept and positive. Among the k largest with 0 or less is silence."""
    positive = (kept.values > 0).to(kept.values.dtype)
    return kernels.latent_sums(positive, kept.indices, d_sae) > 0  # sums, because indexing by a mask syncs the device


def count_(silent: Tensor, kept: Kept) -> None:
    """Add a batch to the counters (F,) of tokens since each latent fired, in place."""
    silent.add_(len(kept.starts)).masked_fill_(fired(kept, len(silent)), 0)


def dead_latents(silent: Tensor, dead_after: int) -> Tensor:
    """(D,) indices of the latents that have been silent for at least `dead_after` tokens."""
    return (silent >= dead_after).nonzero().view(-1)
