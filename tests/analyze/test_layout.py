"""The map of directions: groups that were planted are groups on it, and chance makes none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from residual_saes.analyze.latents import layout
from residual_saes.analyze.parts import Parts

GROUPS, EACH, D = 6, 30, 48


def directions(spread: float) -> torch.Tensor:
    """GROUPS groups of EACH directions about centres; infinite spread: no groups."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(GROUPS * EACH, D, generator=generator)
    centres = torch.randn(GROUPS, D, generator=generator).repeat_interleave(EACH, 0)
    return noise if spread == np.inf else centres + spread * noise


def gap(points: np.ndarray) -> float:
    """Between the groups that k-means finds, over the distances inside them (Dunn's index)."""
    _, label = kmeans2(points.astype(float), GROUPS, rng=0, minit="++")
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    same = label[:, None] == label[None]
    nearest = [distance[label == own][:, label != own].min() for own in np.unique(label)]
    return float(np.mean(nearest) / distance[same].mean())


def test_groups_come_out_and_chance_makes_none(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    planted = layout.of(directions(0.3), parts)
    random = layout.of(directions(np.inf), Parts())
    label = np.repeat(np.arange(GROUPS), EACH)
    _, near = cKDTree(planted.points).query(planted.points, 11)
    assert (label[near[:, 1:]] == label[:, None]).mean() > 0.99
    assert gap(planted.points) > 1 > 0.3 > gap(random.points)
    assert planted.kept > 5 * planted.by_chance and planted.by_chance == pytest.approx(
        10 / (GROUPS * EACH - 1)
    )
    for made in (planted, random):
        assert made.points.min() == 0 and made.points.max() == 1
    assert (layout.of(directions(0.3), parts).points == planted.points).all()  # kept
    # Made again: directions have no length.
    scaled = directions(0.3) * 2.0 ** torch.randint(-3, 4, (GROUPS * EACH, 1))
    assert (layout.of(scaled, Parts()).points == planted.points).all()
    scaled[0] = 0
    assert np.isfinite(layout.of(scaled[: layout.FEWEST], Parts()).points).all()
