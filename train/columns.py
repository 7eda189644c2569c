"""The columns of a batch: which a dictionary reads, which it writes, and what they are scaled by.

Each hook point is scaled by itself to E||x|| = sqrt(its width), as Gao et al. do (arXiv 2406.04093,
appendix A). So a crosscoder's loss weighs its targets alike, whatever their norms are, and a
transcoder's latents are as large as what it writes.

Shapes: n rows, c columns of a batch, d of them read, d_out written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from residual_saes.data.rows.reader import Reader
from residual_saes.train.ports import Port, Ports
from residual_saes.train.sae import Scales


def widths_of(ports: Ports, reader: Reader) -> tuple[int, int]:
    """d and d_out: columns that are read, and columns that are written."""
    widths = dict(zip(ports.every, reader.widths, strict=True))
    return sum(widths[port] for port in ports.reads), sum(widths[port] for port in ports.writes)


@dataclass(frozen=True)
class Columns:
    """The columns of a run's batches."""

    ports: Ports
    widths: Mapping[Port, int]
    scales: Mapping[Port, float]  # what rows are multiplied by in training
    mean: Tensor  # (c,) float64, of the training rows, scaled

    @classmethod
    def of(cls, ports: Ports, reader: Reader, scaled: bool, device: torch.device) -> Columns:
        """Those of a reader's batches, as they are scaled in training.

        Args:
            scaled: to E||x|| = sqrt(width); False: as they are.
        """
        widths = dict(zip(ports.every, reader.widths, strict=True))
        scales = {}
        for port, norm in zip(ports.every, reader.mean_norms, strict=True):
            scales[port] = math.sqrt(widths[port]) / float(norm) if scaled else 1.0
        raw = cls(ports, widths, scales, torch.from_numpy(reader.mean).to(device))
        return cls(ports, widths, scales, raw.mean * raw.scale(ports.every))

    def scaled(self, batch: Tensor) -> Tensor:
        """(n, c) float32, of a raw batch on any device."""
        return batch.to(self.mean.device).float() * self._factor

    @cached_property
    def _factor(self) -> float | Tensor:
        """Made once: its copy to a GPU waits for it."""
        scale = self.scale(self.ports.every)
        return scale.float() if isinstance(scale, Tensor) else scale

    def scale(self, ports: Sequence[Port]) -> float | Tensor:
        """The scale of these ports' columns, (columns,) float64; a number if all have the same."""
        scales = [self.scales[port] for port in ports]
        if len(set(scales)) == 1:
            return scales[0]
        columns = torch.tensor([self.widths[port] for port in ports])
        by_port = torch.tensor(scales, dtype=torch.float64)
        return by_port.repeat_interleave(columns).to(self.mean.device)

    def folding(self) -> Scales:
        """How a trained SAE comes to work on raw rows."""
        return Scales(self.scale(self.ports.reads), self.scale(self.ports.writes))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., d) and y (..., d_out) of rows (..., c); one tensor twice in an autoencoder."""
        if self.ports.is_autoencoder:
            return rows, rows
        read = sum(self.widths[port] for port in self.ports.reads)
        return rows[..., :read], rows[..., read:]

    @property
    def targets(self) -> dict[Port, slice]:
        """Where in y the columns of each port that is written are."""
        found, start = {}, 0
        for port in self.ports.writes:
            found[port] = slice(start, start + self.widths[port])
            start += self.widths[port]
        return found

    def mean_variance(self, reader: Reader) -> float:
        """Of the scaled rows that are written, averaged over their columns."""
        targets = self.targets
        written = self.split(torch.from_numpy(reader.variance))[1].numpy()
        width = sum(self.widths[port] for port in targets)
        return sum(
            self.widths[port] / width * float(written[own].mean()) * self.scales[port] ** 2
            for port, own in targets.items()
        )
