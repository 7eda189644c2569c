"""How well an SAE reconstructs rows: one accumulator for training batches and for held-out rows.

Sums are float64. With e = x - x_hat on raw rows x (n, d) and mu (d,) the store's mean of the
training rows:

    mse                         mean of e^2 over all n d elements
    variance_explained          1 - sum(e^2) / sum((x - mu)^2): centred per dimension; quote this
    variance_explained_scalar   1 - mse / x.var(): one variance over all elements, as the reference
                                has it; nearly uncentred, so higher
    l0                          kept latents per row with a value above 0
    coverage                    share of latents that fired on these rows
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from train import dead
from train.kernels import Kept
from train.parallel import Group
from train.sae import SAE


class Fidelity:
    """Sums over rows, from which every figure above follows."""

    def __init__(self, mean: Tensor, d_sae: int, scale: float) -> None:
        """Start empty.

        Args:
            mean: (d,) float64, mu times `scale`.
            scale: what the rows that `add` sees are multiplied by; figures are of raw rows.
        """
        self._mean = mean
        self._scale = scale
        self._rows = 0
        # sums of: squared error, squares about mu, elements, squared elements, active latents
        self._sums = torch.zeros(5, dtype=torch.float64, device=mean.device)
        self._fired = torch.zeros(d_sae, dtype=torch.bool, device=mean.device)

    def add(self, x: Tensor, error: Tensor, kept: Kept) -> None:
        """Count rows.

        Args:
            x: (n, d) scaled rows.
            error: (n, d) their errors, in any orthogonal basis.
            kept: their latents.
        """
        rows = x.double()
        active = kept.values > 0
        self._rows += len(x)
        self._sums += torch.stack(
            [
                error.double().square().sum(),
                (rows - self._mean).square().sum(),
                rows.sum(),
                rows.square().sum(),
                active.sum(),
            ]
        )
        self._fired |= dead.firings(kept, len(self._fired)) > 0

    def over_(self, group: Group) -> None:
        """Count what the other processes saw too."""
        self._rows *= group.world  # shares of a batch are equal
        self._fired = group.sum_(self._fired.to(self._sums.dtype)) > 0
        group.sum_(self._sums)

    def figures(self) -> dict[str, float]:
        """The figures, by name."""
        # Device sync: six numbers.
        squared_error, about_mean, total, squares, active = self._sums.tolist()
        elements = self._rows * len(self._mean)
        variance = (squares - total**2 / elements) / (elements - 1)
        return {
            "mse": squared_error / elements / self._scale**2,
            # Rows that are all the same have no variance to explain.
            "variance_explained": 1 - squared_error / about_mean if about_mean else math.nan,
            "variance_explained_scalar": 1 - squared_error / elements / variance
            if variance
            else math.nan,
            "l0": active / self._rows,
            "coverage": int(self._fired.sum()) / len(self._fired),
        }


class Evaluation:
    """Figures of an SAE that works on scaled rows, over raw rows."""

    def __init__(
        self, sae: SAE, mean: Tensor, scale: float, limit: int | None, basis: Tensor | None = None
    ) -> None:
        """Start empty.

        Args:
            mean: as in `Fidelity`.
            limit: rows, to the end of the batch that reaches it; None: all.
            basis: (d, d) orthogonal, if the SAE works on scaled rows times that.
        """
        self._sae = sae
        self._scale = scale
        self._limit = limit
        self._basis = basis
        self._rows = 0
        self._fidelity = Fidelity(mean, sae.d_sae, scale)
        self._device = mean.device

    @property
    def wants_more(self) -> bool:
        return self._limit is None or self._rows < self._limit

    def add(self, batch: Tensor) -> None:
        """Count (n, d) raw rows, on any device."""
        rows = batch.to(self._device).float() * self._scale
        x = rows if self._basis is None else rows @ self._basis
        kept = self._sae.encode(x)
        self._fidelity.add(rows, x - self._sae.decode(kept), kept)
        self._rows += len(rows)

    def figures(self) -> dict[str, float]:
        """How many rows there were, and their figures."""
        return {"rows": self._rows, **self._fidelity.figures()}


def evaluate(evaluations: Sequence[Evaluation], rows: Iterable[Tensor]) -> None:
    """Show the same batches (n, d) of raw rows to all evaluations, until none wants more."""
    for batch in rows:
        wanting = [evaluation for evaluation in evaluations if evaluation.wants_more]
        if not wanting:
            break
        for evaluation in wanting:
            evaluation.add(batch)
