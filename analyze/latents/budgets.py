"""What a TopK SAE explains where it keeps fewer latents of a row than it was trained with.

Sparsity may be chosen after training: `replace(sae, k=k')` is the same SAE at k' <= k. TopK loses
much there, HierarchicalTopK little (train/objectives/hierarchical.py).

Figures of rows are made on the host, so each batch waits for the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from residual_saes.analyze import stats
from residual_saes.analyze.latents.encoding import Unit
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.subject import Subject
from residual_saes.train.kernels import Kept


class Budgets:
    """Squared errors at k / 2, k / 4, ..., 1 latents a row, on the rows as trained."""

    def __init__(self, subject: Subject) -> None:
        """No row is counted yet; an SAE with thresholds has no k to lower."""
        self._subject = subject
        self._squares: dict[int, list[Floats]] = {}
        k = subject.sae.k // 2 if subject.sae.threshold is None else 0
        while k:
            self._squares[k] = []
            k //= 2

    def add(self, batch: Unit, kept: Kept) -> None:
        """Count a batch, of which `kept` are the k latents of each row."""
        if not self._squares:
            return
        trained = torch.from_numpy(batch.of_kinds(self._subject.policy.kinds))
        values = kept.values.view(len(batch.rows), -1)
        indices = kept.indices.view(len(batch.rows), -1)
        values, order = values.topk(max(self._squares))  # from the largest to the smallest
        indices = indices.gather(1, order)
        for k, squares in self._squares.items():
            fewer = Kept.even(values[:, :k], indices[:, :k])
            x_hat = self._subject.sae.reconstruct(batch.rows, fewer)
            squares.append(self._squared_error(batch, x_hat)[trained].numpy())

    def _squared_error(self, batch: Unit, x_hat: Tensor) -> Tensor:
        """(n,) |e|^2, each target scaled as in training."""
        error = self._subject.scaled(batch.targets.double() - x_hat.double())
        return error.square().sum(1).cpu()

    def figures(self, document: ArrayLike, about_mean: Floats) -> list[dict[str, Any]]:
        """By k: the variance `explained`, with its interval over documents.

        Args:
            document: (n,) of the rows as trained.
            about_mean: (n,) |x - mu|^2.
        """
        found = []
        for k, squares in self._squares.items():
            explained = stats.variance_explained(document, np.concatenate(squares), about_mean)
            found.append({"k": k, "explained": stats.figure(*explained)})
        return found
