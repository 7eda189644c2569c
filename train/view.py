"""How an arm sees a batch: scaled, and in its basis. Arms that see it alike share the work.

The product with the basis costs d / F of the encoder product, for each arm that makes it by itself.
Arms of one stream that need as many first rows have the same basis to the bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from residual_saes.train import blocks, product
from residual_saes.train.columns import Columns

Shared = dict[Any, tuple[Tensor, Tensor]]  # what is made of one batch, by View.key


@dataclass(frozen=True)
class View:
    """What an arm makes of raw rows. Nothing in it changes: tensors are read at the first batch."""

    columns: Columns
    basis: Tensor | None = None  # (d, d) orthogonal; None: rows remain in their own axes
    d_sae: int = 0  # by which the product goes the encoder's way

    def of(self, batch: Tensor, shared: Shared | None = None) -> tuple[Tensor, Tensor]:
        """(n, c) scaled rows, and the same in the basis, of raw rows on any device.

        Both are for reading alone.

        Args:
            shared: what other arms made of this batch; None: there are no others.
        """
        shared = {} if shared is None else shared
        if self.key not in shared:
            rows = self.columns.scaled(batch)
            shared[self.key] = rows, self._turned(rows)
        return shared[self.key]

    @cached_property
    def key(self) -> Any:
        """The same where scale, basis and product are the same to the bit."""
        scales = tuple(self.columns.scales[port] for port in self.columns.ports.every)
        if self.basis is None:
            return scales
        # Device sync, once.
        digest = hashlib.blake2b(self.basis.cpu().numpy().tobytes()).digest()
        return scales, digest, self._by_openblas

    @cached_property
    def _by_openblas(self) -> bool:
        assert self.basis is not None
        return product.way(len(self.basis), self.d_sae, self.basis.device) == "openblas"

    def _turned(self, rows: Tensor) -> Tensor:
        if self.basis is None:
            return rows
        if self._by_openblas:
            out = rows.new_empty(rows.shape)
            return blocks.openblas_product_(out, rows, self.basis.T)
        return rows @ self.basis
