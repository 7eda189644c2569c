"""Streams whose truth is known: planted directions, a planted MLP, directions of two layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from residual_saes.data.store.moments import Moments
from residual_saes.train.stream import Stream

Spoil = Callable[[int, Tensor], None]


def leave(number: int, rows: Tensor) -> None:
    """Change nothing of a batch."""


class Drawn:
    """The surface of data.rows.reader.Reader over rows that are drawn on the fly."""

    def __init__(self, widths: list[int], rows: int, batch: int, spoil: Spoil) -> None:
        """Args:
        widths: of the sources, whose rows stand side by side.
        spoil: may change batch `number` in place.
        """
        self.rows = rows
        self.widths = widths
        self.spoil = spoil
        self._batch = batch
        sample = self.draw(10**6, 4096).double()
        self.mean_norms = [float(own.norm(dim=1).mean()) for own in sample.split(widths, 1)]
        moments = Moments.of(sample.numpy())
        self.mean, self.variance = moments.mean, moments.variance

    def draw(self, number: int, n: int) -> Tensor:
        """(n, sum of widths) bfloat16 rows, a pure function of (the reader, number, n)."""
        raise NotImplementedError

    def batches(self, start: int) -> Iterator[Tensor]:
        number = start
        while True:
            rows = self.draw(number, self._batch)
            self.spoil(number, rows)
            yield rows
            number += 1


class Planted(Drawn):
    """Sparse sums of planted directions, around a large mean."""

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
        spoil: Spoil = leave,
    ) -> None:
        """Args:
        active: directions per row.
        """
        self.d_model = d
        self._seed = seed
        self._active = active
        self._noise = noise
        generator = torch.Generator().manual_seed(
            seed + 1000
        )  # not that of an SAE's start, which would be the answer
        self.directions = normalize(torch.randn(latents, d, generator=generator), dim=1)
        self._offset = 2 * torch.randn(d, generator=generator)
        super().__init__([d], rows, batch, spoil)

    def draw(self, number: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self._seed, number)) % 2**31)
        rows = sparse_sums(self.directions, self._active, n, generator) + self._offset
        return (rows + self._noise * torch.randn(n, self.d_model, generator=generator)).bfloat16()


def sparse_sums(directions: Tensor, active: int, n: int, generator: torch.Generator) -> Tensor:
    """(n, d) sums of `active` of the directions each, with strengths from 1 to 2."""
    scores = torch.rand(n, len(directions), generator=generator)
    chosen = scores.topk(active, dim=1).indices
    strengths = 1 + torch.rand(n, active, generator=generator)
    return (directions[chosen] * strengths.unsqueeze(2)).sum(1)


class PlantedMLP(Drawn):
    """What an MLP reads and what it writes, side by side, with u of norm 1 and x normal:

    y = ReLU((x - mean) U^T - bias) V + (x - mean) A + offset
    """

    def __init__(
        self,
        *,
        d: int = 24,
        d_out: int = 20,
        neurons: int = 24,
        bias: float = 1.5,
        linear: float = 0.0,
        rows: int = 4096,
        batch: int = 64,
        apart: bool = False,
        spoil: Spoil = leave,
    ) -> None:
        """Args:
        linear: norm of the rows of A.
        apart: give each y beside the x of another token.
        """
        generator = torch.Generator().manual_seed(1000)
        self.reads = normalize(torch.randn(neurons, d, generator=generator), dim=1)
        self.writes = normalize(torch.randn(neurons, d_out, generator=generator), dim=1)
        self._affine = linear * normalize(torch.randn(d, d_out, generator=generator), dim=1)
        self._means = [torch.randn(width, generator=generator) for width in (d, d_out)]
        self._bias = bias
        self._apart = apart
        super().__init__([d, d_out], rows, batch, spoil)

    def draw(self, number: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((17, number)) % 2**31)
        x = torch.randn(n, self.reads.shape[1], generator=generator)
        y = (x @ self.reads.T - self._bias).relu() @ self.writes + x @ self._affine
        if self._apart:
            x = torch.randn(x.shape, generator=generator)
        x_mean, y_mean = self._means
        return torch.cat([x + x_mean, y + y_mean], 1).bfloat16()


class PlantedLayers(Drawn):
    """The rows of two layers, side by side: sparse sums of directions that are in both layers, in
    the first alone, or in the second alone, in turn. The second layer's are `louder`.
    """

    def __init__(
        self,
        *,
        d: int = 24,
        latents: int = 24,
        active: int = 3,
        louder: float = 5.0,
        rows: int = 4096,
        batch: int = 64,
        apart: bool = False,
        spoil: Spoil = leave,
    ) -> None:
        """Args:
        apart: give each row beside another token's of the other layer.
        """
        generator = torch.Generator().manual_seed(1000)
        every = torch.randn(latents, 2, d, generator=generator)
        self.kinds = torch.arange(latents) % 3  # 0: in both, 1: in the first, 2: in the second
        every[self.kinds == 1, 1] = 0
        every[self.kinds == 2, 0] = 0
        lengths = torch.tensor([1.0, louder]).unsqueeze(1)
        self.directions = (normalize(every, dim=2) * lengths).flatten(1)  # (latents, 2 d)
        self._offset = (0.3 * torch.randn(2, d, generator=generator) * lengths).flatten()
        self._active = active
        self._apart = apart
        super().__init__([d, d], rows, batch, spoil)

    def draw(self, number: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((29, number)) % 2**31)
        rows = sparse_sums(self.directions, self._active, n, generator)
        if self._apart:
            others = sparse_sums(self.directions, self._active, n, generator)
            rows = torch.cat([rows.chunk(2, 1)[0], others.chunk(2, 1)[1]], 1)
        rows = rows + self._offset
        noise = 0.01 * torch.randn(rows.shape, generator=generator)
        return (rows + noise).bfloat16()


def planted_stream(reader: Drawn, held_out_batches: int = 4) -> Stream:
    """A stream over `reader`, with held-out rows that it never serves."""
    identity = f"planted-{sum(reader.widths)}-{np.round(reader.mean.sum(), 6)}"
    return Stream(
        identity, reader, lambda: (reader.draw(-1 - i, 256) for i in range(held_out_batches))
    )
