"""A stream whose truth is known: rows are sparse sums of planted directions, around a large
mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from data.store.moments import Moments
from train.stream import Stream


class Planted:
    """The surface of data.rows.reader.Reader over rows that are drawn on the fly."""

    def __init__(
        self,
        *,
        d: int = 16,
        latents: int = 32,
        active: int = 3,
        rows: int = 4096,
        batch: int = 64,
        seed: int = 0,
        noise: float = 0.01,
        spoil: Callable[[int, Tensor], None] = lambda number, rows: None,
    ) -> None:
        """Args:
        active: directions per row.
        spoil: may change batch `number` in place.
        """
        self.rows = rows
        self.d_model = d
        self.widths = [d]
        self.spoil = spoil
        self._batch = batch
        self._seed = seed
        self._active = active
        self._noise = noise
        generator = torch.Generator().manual_seed(
            seed + 1000
        )  # not that of an SAE's start, which would be the answer
        self.directions = torch.nn.functional.normalize(
            torch.randn(latents, d, generator=generator), dim=1
        )
        self._offset = 2 * torch.randn(d, generator=generator)
        sample = self.draw(10**6, 4096).double()
        self.mean_norms = [float(sample.norm(dim=1).mean())]
        moments = Moments.of(sample.numpy())
        self.mean, self.variance = moments.mean, moments.variance

    def draw(self, number: int, n: int) -> Tensor:
        """(n, d) bfloat16 rows, a pure function of (seed, number, n)."""
        generator = torch.Generator().manual_seed(hash((self._seed, number)) % 2**31)
        scores = torch.rand(n, len(self.directions), generator=generator)
        chosen = scores.topk(self._active, dim=1).indices
        strengths = 1 + torch.rand(n, self._active, generator=generator)
        rows = (self.directions[chosen] * strengths.unsqueeze(2)).sum(1) + self._offset
        return (rows + self._noise * torch.randn(n, self.d_model, generator=generator)).bfloat16()

    def batches(self, start: int) -> Iterator[Tensor]:
        number = start
        while True:
            rows = self.draw(number, self._batch)
            self.spoil(number, rows)
            yield rows
            number += 1


def planted_stream(reader: Planted, held_out_batches: int = 4) -> Stream:
    """A stream over `reader`, with held-out rows that it never serves."""
    identity = f"planted-{reader.d_model}-{np.round(reader.mean.sum(), 6)}"
    return Stream(
        identity, reader, lambda: (reader.draw(-1 - i, 256) for i in range(held_out_batches))
    )
