"""Random latents are others than the chosen ones, and fire as often."""

from __future__ import annotations

import numpy as np
import pytest

from residual_saes.analyze.latents.matched import random_latents
from residual_saes.data.errors import SettingError


def test_they_fire_as_often_and_are_others() -> None:
    rng = np.random.default_rng(0)
    density = 10 ** rng.uniform(-5, 0, 2000)
    density[::10] = 0
    chosen = [1, 2, 3, 4, 5, 6]
    ratios = []
    for seed in range(50):
        drawn = random_latents(density, chosen, np.random.default_rng(seed), never=[7, 8])
        assert len(set(drawn.tolist())) == len(chosen)
        assert not set(drawn.tolist()) & {*chosen, 7, 8}
        assert (density[drawn] > 0).all()
        ratios.append(np.log(density[drawn] / density[chosen]))
    assert np.abs(ratios).max() < 0.7  # 50 of 1,800 over 11.5 nats are 0.32
    assert abs(np.mean(ratios)) < 0.05
    again = random_latents(density, chosen, np.random.default_rng(49), never=[7, 8])
    assert (again == drawn).all()


def test_too_few_firing_latents_are_refused() -> None:
    with pytest.raises(SettingError, match="latents fire"):
        random_latents(np.array([0.1, 0.2, 0.3, 0.0]), [0, 1], np.random.default_rng(0))
