"""How what a latent writes is spread over the vocabulary: a histogram of its logits, for its page.

Of a large vocabulary SAMPLE ids are taken, evenly spaced, so the pass over 32,768 latents of width
2,560 is 2.7e12 multiplications. Logits are those of directions.logits. On a page a histogram is
about 200 bytes.

Shapes: F latents, v ids, B bins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze.latents import directions, nearest
from residual_saes.analyze.pages.script import short
from residual_saes.analyze.parts import NOWHERE, Arrays, Parts
from residual_saes.data.errors import StopRequest
from residual_saes.harvest.model import LanguageModel

VERSION = 1  # of the kept histograms: raise it when the same weights give other ones
BINS = 40  # B, of equal width from the smallest logit to the largest
SAMPLE = 16_384  # ids
_PART = 4096  # latents that are kept together
_BLOCK_BYTES = 1 << 26  # of logits held at a time; sorting them into bins takes four times as much


class Spread(NamedTuple):
    """The logits of every latent over the ids of a sample."""

    low: NDArray[np.float32]  # (F,) the smallest
    high: NDArray[np.float32]  # (F,) the largest
    mean: NDArray[np.float32]  # (F,)
    std: NDArray[np.float32]  # (F,)
    counts: NDArray[np.int32]  # (F, B) ids in each bin
    vocabulary: int  # ids in all

    def of(self, latent: int) -> list[float | None]:
        """[low, high, mean, std, counts...] of a latent, for its page."""
        figures = [float(column[latent]) for column in self[:4]]
        return [*short(figures), *self.counts[latent].tolist()]


_KEPT = Spread._fields[:-1]


def ids_of(vocabulary: int) -> slice:
    """Which token ids are taken."""
    return slice(None, None, -(-vocabulary // SAMPLE))


@torch.inference_mode()
def measure(lm: LanguageModel, W_dec: Tensor, stop: StopRequest, parts: Parts = NOWHERE) -> Spread:
    """The spread of every latent.

    Args:
        W_dec: (F, d).
        parts: where the histograms are kept, so a stop costs little.
    """
    weight = lm.causal.get_output_embeddings().weight
    head = weight[ids_of(len(weight))].float()
    rows = directions.to_head(lm, W_dec)
    found: list[Arrays] = []
    for number, first in enumerate(range(0, len(rows), _PART)):

        def make(first: int = first) -> Arrays:
            blocks = []
            for _, logits in nearest.products(rows[first : first + _PART], head, _BLOCK_BYTES):
                stop.check()
                blocks.append(_histograms(logits))
            return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

        found.append(parts.of(number, make))
    columns: list[Any] = [np.concatenate([part[name] for part in found]) for name in _KEPT]
    return Spread._make([*columns, len(weight)])


def _histograms(logits: Tensor) -> dict[str, NDArray[np.generic]]:
    """The fields of a spread, of some latents; (n, v)."""
    low, high = logits.aminmax(dim=1)
    width = (high - low).clamp_min(torch.finfo(low.dtype).tiny) / BINS
    bins = ((logits - low[:, None]) / width[:, None]).long().clamp_(0, BINS - 1)
    counts = torch.zeros(len(logits), BINS, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))
    columns = (low, high, logits.mean(1), logits.std(1, correction=0), counts)
    return {name: column.cpu().numpy() for name, column in zip(_KEPT, columns, strict=True)}
