"""A start from rows: the basis, decoder directions, the encoder's scale, the decoder's bias.

- init=random: random directions, b_dec the rows' mean; no row is needed (train/sae.py).
- init=rows: directions of rows. Measured on MiniLM's activations, d 384, F 4,096, k 32, 300,000
  tokens (docs/method.md).
- init=map: of a transcoder. Random directions that are written, read along what a linear map makes
  of them (docs/method.md).
- init=kaiming: random directions, a short encoder, b_dec the geometric median, as in
  caiovicentino/mechreward scripts/train_sae_qwen35.py.

Shapes: n rows, d = d_model, F = d_sae.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from residual_saes.train import kernels, product
from residual_saes.train.sae import SAE, SAEConfig

_LEAST_VARIANCE = 1e-3  # of the mean variance; an axis with less is mostly noise
_ROWS_PER_AXIS = 10  # rows per dimension, for the principal axes
_ROWS_OF_MEDIAN = 16_384  # as the reference has it
_WEISZFELD_STEPS = 5  # as the reference has it


def rows_needed(config: SAEConfig, d: int) -> int:
    """Rows for what the settings start from; 0: for none."""
    median = _ROWS_OF_MEDIAN if config.init == "kaiming" else 0
    if config.rotate or config.init in ("rows", "map"):
        return max(_ROWS_PER_AXIS * d, config.d_sae, median)
    return median


def geometric_median(rows: Tensor) -> Tensor:
    """(d,) the point of least mean distance to rows (n, d): Weiszfeld's steps from their median."""
    # CUDA's median has no deterministic way.
    half = (len(rows) - 1) // 2
    centre = rows.sort(0).values[half] if rows.is_cuda else rows.median(0).values
    for _ in range(_WEISZFELD_STEPS):
        distances = torch.linalg.vector_norm(rows - centre, dim=1, keepdim=True)
        weights = 1 / distances.clamp_min(1e-8)
        centre = (rows * weights).sum(0) / weights.sum()
    return centre


def principal_axes(centred: Tensor) -> Tensor:
    """(d, d) orthogonal, the principal axes of rows (n, d) about their mean, as columns."""
    rows = centred.double()
    covariance = rows.T @ rows / len(rows)
    # Device sync: eigh looks whether it converged.
    axes: Tensor = torch.linalg.eigh(covariance).eigenvectors
    return axes.to(centred.dtype)


def by_map_(sae: SAE, centred: Tensor, target: Tensor) -> None:
    """Let each latent of a transcoder read what a linear map takes to the direction that it writes.

    With M of the least |x M - y|^2 the encoder is W_dec M^T, its rows of norm 1, then scaled as
    `from_rows_` does.

    Args:
        centred: (n, d) rows x less b_in.
        target: (n, d_out) rows y less b_dec.
    """
    x = centred.double()
    # By the covariance and its pseudo-inverse: columns that are always 0 count for nothing.
    M = torch.linalg.pinv(x.T @ x, hermitian=True) @ (x.T @ target.double())
    sae.encoder.copy_(normalize(sae.W_dec.double() @ M.T, dim=1))
    _scale_(sae, centred, target)


def from_rows_(sae: SAE, centred: Tensor, target: Tensor, whiten: bool) -> None:
    """Set the decoder's directions to those of rows, and the encoder to the same, scaled.

    TopK keeps the same latents whatever the scale is. Directions for which there is no row stay
    random. A latent of a transcoder writes along a row of y, and reads along its token's row of x.

    Args:
        centred: (n, d) rows x less b_in, of an autoencoder less b_dec.
        target: (n, d_out) rows y less b_dec; of an autoencoder `centred` itself.
        whiten: first divide each axis by the fourth root of its variance, half of whitening.
    """
    norms = torch.linalg.vector_norm(target, dim=1)
    if sae.b_in is not None:
        norms = norms * torch.linalg.vector_norm(centred, dim=1)
    there = (norms > 0).nonzero().view(-1)[: sae.d_sae]  # device sync
    directions = target[there]
    if whiten:
        variances = target.square().mean(0)
        directions = directions * variances.clamp_min(_LEAST_VARIANCE * variances.mean()).pow(-0.25)
    sae.W_dec[: len(directions)] = directions
    sae.project_()
    if sae.b_in is None:
        sae.encoder.copy_(sae.W_dec)
    else:
        sae.encoder[: len(there)] = normalize(centred[there], dim=1)
    _scale_(sae, centred, target)


def _scale_(sae: SAE, centred: Tensor, target: Tensor) -> None:
    """Scale the encoder so that the first reconstructions fit best: <y, y_hat> / |y_hat|^2."""
    few, wanted = centred[:4096], target[:4096]
    y_hat = kernels.decode(product.encode(few, sae.encoder, sae.b_enc, sae.k), sae.W_dec)
    scale = (wanted * y_hat).sum() / y_hat.square().sum()
    sae.encoder.mul_(torch.where(scale.isfinite() & (scale > 0), scale, 1.0))
