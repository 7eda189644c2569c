"""How well an SAE reconstructs rows: one accumulator for training batches and for held-out rows.

Sums are float64. With e = y - y_hat on raw rows y (n, d), which are x in an autoencoder, and mu
(d,) the store's mean of the training rows:

    mse                         mean of e^2 over all n d elements
    variance_explained          1 - sum(e^2) / sum((y - mu)^2): centred per dimension; quote this
    variance_explained_scalar   1 - mse / y.var(): one variance over all elements, as the reference
                                has it; nearly uncentred, so higher
    l0                          kept latents per row with a value above 0
    coverage                    share of latents that fired on these rows

A crosscoder has the first three for each hook point that it writes, as `targets`. Its own are of
the scaled rows of all of them, side by side: on raw rows the hook point with the longest rows would
decide them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from residual_saes.train import dead
from residual_saes.train.columns import Columns
from residual_saes.train.kernels import Kept
from residual_saes.train.parallel import Group
from residual_saes.train.sae import SAE
from residual_saes.train.view import Shared, View


class Fidelity:
    """Sums over rows, from which every figure above follows."""

    def __init__(self, columns: Columns, d_sae: int, basis: Tensor | None = None) -> None:
        """Start empty.

        Args:
            columns: of the rows that `add` sees, which are scaled; a hook point's own figures are
                of its raw rows.
            basis: (d, d) orthogonal, if errors are in that.
        """
        self._mean = columns.split(columns.mean)[1]
        self._basis = basis
        targets = columns.targets
        several = len(targets) > 1
        # What figures are of: all columns, and of a crosscoder each hook point's.
        self._parts = [slice(None), *(targets.values() if several else ())]
        scales = [columns.scales[port] for port in targets]
        self._scales = [1.0, *scales] if several else scales
        self._names = [port.name for port in targets] if several else []
        self._rows = 0
        # Of each part: squared error, squares about mu, elements, squared elements, active latents.
        shape = (len(self._parts), 5)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=self._mean.device)
        self._fired = torch.zeros(d_sae, dtype=torch.bool, device=self._mean.device)

    def add(self, y: Tensor, error: Tensor, kept: Kept) -> None:
        """Count rows.

        Args:
            y: (n, d) scaled rows.
            error: (n, d) their errors, in the basis.
            kept: their latents.
        """
        rows = y.double()
        errors = error.double()
        if self._names and self._basis is not None:
            errors = errors @ self._basis.T.double()
        active = kept.values > 0
        self._rows += len(y)
        for sums, part in zip(self._sums, self._parts, strict=True):
            own = rows[:, part]
            sums += torch.stack(
                [
                    errors[:, part].square().sum(),
                    (own - self._mean[part]).square().sum(),
                    own.sum(),
                    own.square().sum(),
                    active.sum(),
                ]
            )
        self._fired |= dead.firings(kept, len(self._fired)) > 0

    def over_(self, group: Group) -> None:
        """Count what the other processes saw too."""
        self._rows *= group.world  # shares of a batch are equal
        self._fired = group.sum_(self._fired.to(self._sums.dtype)) > 0
        group.sum_(self._sums)

    def figures(self) -> dict[str, Any]:
        """The figures, by name; `targets` holds those of a crosscoder's hook points by theirs."""
        # Device sync: a few numbers.
        found = []
        for sums, part, scale in zip(self._sums.tolist(), self._parts, self._scales, strict=True):
            elements = self._rows * len(self._mean[part])
            found.append(_explained(sums, elements, scale))
        whole: dict[str, Any] = {
            **found[0],
            "l0": float(self._sums[0, 4]) / self._rows,
            "coverage": int(self._fired.sum()) / len(self._fired),
        }
        if self._names:
            whole["targets"] = dict(zip(self._names, found[1:], strict=True))
        return whole


def _explained(sums: Sequence[float], elements: int, scale: float) -> dict[str, float]:
    """The figures of one part, from its sums."""
    squared_error, about_mean, total, squares, _ = sums
    variance = (squares - total**2 / elements) / (elements - 1)
    return {
        "mse": squared_error / elements / scale**2,
        # Rows that are all the same have no variance to explain.
        "variance_explained": 1 - squared_error / about_mean if about_mean else math.nan,
        "variance_explained_scalar": 1 - squared_error / elements / variance
        if variance
        else math.nan,
    }


class Evaluation:
    """Figures of an SAE in training, which works on scaled rows, over raw rows."""

    def __init__(self, sae: SAE, view: View, limit: int | None) -> None:
        """Start empty.

        Args:
            view: what the SAE works on.
            limit: rows, to the end of the batch that reaches it; None: all.
        """
        self._sae = sae
        self._view = view
        self._limit = limit
        self._rows = 0
        self._fidelity = Fidelity(view.columns, sae.d_sae, view.basis)

    @property
    def wants_more(self) -> bool:
        return self._limit is None or self._rows < self._limit

    def add(self, batch: Tensor, shared: Shared | None = None) -> None:
        """Count (n, c) raw rows, on any device.

        Args:
            shared: what other evaluations made of these rows, for them to share.
        """
        rows, turned = self._view.of(batch, shared)
        x, y = self._view.columns.split(turned)
        kept = self._sae.encode(x)
        _, written = self._view.columns.split(rows)
        self._fidelity.add(written, y - self._sae.reconstruct(x, kept), kept)
        self._rows += len(rows)

    def figures(self) -> dict[str, Any]:
        """How many rows there were, and their figures."""
        return {"rows": self._rows, **self._fidelity.figures()}


def evaluate(evaluations: Sequence[Evaluation], rows: Iterable[Tensor]) -> None:
    """Show the same batches (n, c) of raw rows to all evaluations, until none wants more."""
    for batch in rows:
        wanting = [evaluation for evaluation in evaluations if evaluation.wants_more]
        if not wanting:
            break
        shared: Shared = {}
        for evaluation in wanting:
            evaluation.add(batch, shared)
