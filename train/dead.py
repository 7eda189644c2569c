"""Which latents are dead: how many tokens ago each one last fired."""

from __future__ import annotations

import torch
from torch import Tensor

from residual_saes.train import kernels
from residual_saes.train.kernels import Bags, Kept
from residual_saes.train.optim import Adam
from residual_saes.train.sae import SAE

_TINY = 1e-30  # of a norm, so that an error of 0 gives a direction of 0


def fresh_counters(d_sae: int, device: torch.device) -> Tensor:
    """(F,) counters at the start of training: 0 tokens since each latent fired."""
    return torch.zeros(d_sae, dtype=torch.int64, device=device)


def firings(kept: Kept, d_sae: int, bags: Bags | None = None) -> Tensor:
    """(F,) times that each latent fired in a batch: was kept with a value above 0.

    Args:
        bags: the pairs grouped by latent, if that has been done.
    """
    # Sums, because indexing by a mask syncs the device.
    positive = (kept.values > 0).to(kept.values.dtype)
    return kernels.latent_sums(positive, kept.indices, d_sae, bags)


def count_(silent: Tensor, fired: Tensor, tokens: int) -> None:
    """Count a batch, in place.

    Args:
        silent: (F,) tokens since each latent fired.
        fired: (F,) times that each latent fired in the batch.
        tokens: rows of the batch.
    """
    silent.add_(tokens).masked_fill_(fired > 0, 0)


def dead_latents(silent: Tensor, dead_after: int) -> Tensor:
    """(D,) indices of the latents that have been silent for at least `dead_after` tokens."""
    return (silent >= dead_after).nonzero().view(-1)


def in_turns(latents: Tensor, most: int, step: int) -> Tensor:
    """At most `most` of latents (D,): steps in a row take others, so each has its turn."""
    if len(latents) <= most:
        return latents
    turn = torch.arange(step * most, (step + 1) * most, device=latents.device) % len(latents)
    return latents.index_select(0, turn.sort().values)


def resample_(
    sae: SAE, adam: Adam, latents: Tensor, error: Tensor, draw: Tensor, read: Tensor | None = None
) -> None:
    """Restart latents (D,) along the errors of random rows, where the reconstruction is worst.

    Each reads and writes along the error e of one row. Its encoder is as long as the others' are
    along their own directions, its bias is 0, and the optimizer's moments start anew. One of a
    transcoder reads along what was read of that row, with an encoder as long as the others'.

    Args:
        error: (n, d_out) of the batch.
        draw: (D,) numbers of the rows.
        read: (n, d) centred rows, of a transcoder.
    """
    directions = _unit(error[draw])
    if read is None:
        along = (sae.encoder * sae.W_dec).sum(1).mean()
        sae.encoder[latents] = directions * along
    else:
        length = torch.linalg.vector_norm(sae.encoder, dim=1).mean()
        sae.encoder[latents] = _unit(read[draw]) * length
    sae.W_dec[latents] = directions
    sae.b_enc[latents] = 0.0
    for name in ("W_dec", "encoder", "b_enc"):
        adam.restart_(name, latents)


def _unit(rows: Tensor) -> Tensor:
    """Rows with norm 1; a row of 0 stays."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min_(_TINY)
