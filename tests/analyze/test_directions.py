"""Directions beside directions, and through the head, against the plain computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from residual_saes.analyze.latents import directions, nearest
from residual_saes.analyze.pages.browser.spread import BINS, measure
from residual_saes.analyze.parts import Parts
from residual_saes.data.errors import StopRequest
from residual_saes.harvest import model as language_model
from residual_saes.harvest.model import ModelConfig


@pytest.mark.parametrize("block", [1 << 28, 1])  # bytes: everything at once, and row by row
@pytest.mark.parametrize("small", [nearest._SMALL, 0])
def test_logits_of_the_embedded_model(
    block: int, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the model's own modules: its final norm and its head.

    The norm's common factor is taken out.
    """
    monkeypatch.setattr(nearest, "_SMALL", small)
    lm = language_model.load(ModelConfig("embedded", dtype="float32"), head=True)
    W_dec = torch.randn(6, lm.d_model, generator=torch.Generator().manual_seed(1))
    (raised, best), (lowered, worst) = directions.logits(
        lm, W_dec, 4, StopRequest(), Parts(tmp_path), block_bytes=block, vocabulary_block=100
    )
    with torch.inference_mode():
        size = W_dec.square().mean(1, keepdim=True).sqrt()
        expected = lm.causal.get_output_embeddings()(lm.final_norm(W_dec)) * size
    values, ids = expected.sort(dim=1, descending=True)
    assert best.tolist() == ids[:, :4].tolist()
    assert worst.tolist() == ids.flip(1)[:, :4].tolist()
    torch.testing.assert_close(raised, values[:, :4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lowered, values.flip(1)[:, :4], rtol=1e-3, atol=1e-4)
    spread = measure(lm, W_dec, StopRequest(), Parts(tmp_path / "spread"))
    assert spread.vocabulary == expected.shape[1]
    for latent, row in enumerate(expected):
        low, high, mean, std, *counts = spread.of(latent)
        figures = [row.min(), row.max(), row.mean(), row.std(correction=0)]
        assert [low, high, mean, std] == pytest.approx([float(at) for at in figures], rel=2e-3)
        assert sum(counts) == len(row) and min(counts[0], counts[-1]) >= 1
        # A logit at an edge of a bin may fall to either side.
        assert np.abs(np.histogram(row, BINS)[0] - counts).sum() <= 4
    kept = measure(lm, 0 * W_dec, StopRequest(), Parts(tmp_path / "spread"))  # of the parts
    assert np.array_equal(kept.counts, spread.counts)
    nothing = measure(lm, 0 * W_dec, StopRequest())
    assert (nothing.high == 0).all() and (nothing.counts.sum(1) == spread.vocabulary).all()


class _OnePlus(nn.Module):
    """RMS norm as Gemma 3 writes it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_gain_is_what_the_norm_multiplies_by() -> None:
    weight = torch.linspace(-0.5, 2, 8)
    torch.testing.assert_close(
        directions.gain(_OnePlus(weight), 8, "cpu"), 1 + weight, rtol=1e-5, atol=1e-6
    )
    layer = nn.LayerNorm(8)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.fill_(3.0)
    torch.testing.assert_close(directions.gain(layer, 8, "cpu"), weight)
