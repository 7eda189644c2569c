"""What a transcoder is compared with: maps from what it reads to what it writes, without latents.

A linear map is fit by ridge regression on training rows, each column that is read scaled to
variance 1:

    minimise  mean |y - mu_y - (x - mu_x) D^-1 W|^2 + RIDGE |W|^2        D the deviations of x

Shapes: n rows, d the width that is read, d_out the width that is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from residual_saes.analyze.parts import Arrays
from residual_saes.analyze.subject import Subject
from residual_saes.data.journal import Progress
from residual_saes.data.rows.split import training_units
from residual_saes.data.rows.statistics import FITTED, sample
from residual_saes.data.store import retention
from residual_saes.train.sae import SAE

RIDGE = 1e-4  # of the variance of a column, which is 1
_BLOCK = 4096  # rows held as float64 at a time
VERSION = 1  # of the kept map: raise it when the same rows give another one


class LinearMap(NamedTuple):
    """y_hat = (x - mean_in) @ W + mean_out."""

    W: Tensor  # (d, d_out) float32
    mean_in: Tensor  # (d,) float32
    mean_out: Tensor  # (d_out,) float32
    rows: int  # that it was fit on

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d_out) of (n, d) rows."""
        return (x - self.mean_in) @ self.W + self.mean_out


def skip_of(sae: SAE) -> Callable[[Tensor], Tensor]:
    """What a transcoder writes if no latent fires: b_dec, and its skip if it has one."""

    def skip(x: Tensor) -> Tensor:
        constant = sae.b_dec.expand(len(x), -1)
        return constant if sae.W_skip is None else constant + sae.centred(x) @ sae.W_skip

    return skip


def fitted(subject: Subject) -> LinearMap | None:
    """The linear map of a transcoder's training rows, kept; None in a ring, which has freed them.

    Raises:
        StoreError: the store is incomplete.
    """
    subject.require_complete()
    if retention.read(subject.store.place).span is not None:
        return None
    key = {"version": VERSION, **subject.recorded, "policy": subject.policy.recorded()}
    part = subject.parts("linear", key).of(0, lambda: _fit(subject))
    W, mean_in, mean_out = (
        torch.from_numpy(part[name]).to(subject.device) for name in ("W", "mean_in", "mean_out")
    )
    return LinearMap(W, mean_in, mean_out, int(part["rows"]))


def _fit(subject: Subject) -> Arrays:
    """Sums of products about the first block's means, then the normal equations."""
    sae = subject.sae
    d = sae.d_model
    width = d + sae.d_out
    products = torch.zeros(width, width, dtype=torch.float64, device=subject.device)
    sums = products.new_zeros(width)
    about: Tensor | None = None
    rows = 0
    progress = Progress(quiet_s=5.0)
    for number in sample(training_units(subject.store), subject.store.unit_tokens, FITTED):
        unit = subject.unit(number)
        chosen = torch.from_numpy(np.flatnonzero(unit.of_kinds(subject.policy.kinds)))
        for start in range(0, len(chosen), _BLOCK):
            part = chosen[start : start + _BLOCK].to(subject.device)
            block = torch.cat([unit.rows[part], unit.targets[part]], 1).double()
            about = block.mean(0) if about is None else about
            block -= about
            products.addmm_(block.T, block)
            sums += block.sum(0)
            rows += len(part)
        progress.show(f"a linear map of {rows:,} training rows, for comparison")
    progress.close()
    assert about is not None and rows, "training kept none of these rows"
    mean = sums / rows
    covariance = products / rows - torch.outer(mean, mean)
    deviation = covariance.diagonal()[:d].clamp_min(0).sqrt()
    inverse = torch.where(deviation > 0, 1 / deviation, 0)
    within = covariance[:d, :d] * inverse[:, None] * inverse
    within.diagonal().add_(RIDGE)
    W = inverse[:, None] * torch.linalg.solve(within, inverse[:, None] * covariance[:d, d:])
    mean += about
    found = {"W": W, "mean_in": mean[:d], "mean_out": mean[d:]}
    arrays = {name: tensor.float().cpu().numpy() for name, tensor in found.items()}
    return {**arrays, "rows": np.array(rows)}
