"""Random latents that fire as often as chosen ones, and random directions: what a choice is worth.

A latent that fires on every token moves, probes and rewards otherwise than one that fires on one in
a thousand. So the random latents beside chosen ones have nearly their density.

Shapes: F latents, m chosen ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.stats import Floats
from residual_saes.data.errors import SettingError

NEAREST = 50  # latents of nearly equal density among which one is drawn


def random_latents(
    density: Floats,
    chosen: Sequence[int],
    rng: np.random.Generator,
    *,
    never: Collection[int] = (),
    nearest: int = NEAREST,
) -> NDArray[np.int64]:
    """(m,) different latents, each drawn from those nearest in log density to the chosen one.

    Args:
        density: (F,) share of tokens on which each latent fires; silent ones are not drawn.
        never: further latents not to draw; the chosen ones never are.
        nearest: how many of the nearest are drawn from, for each chosen latent.

    Raises:
        SettingError: fewer latents fire than are to be drawn.
    """
    firing = np.flatnonzero(density > 0)
    left = np.setdiff1d(firing, [*chosen, *never])
    if len(left) < len(chosen):
        raise SettingError(
            f"{len(left)} latents fire beside the {len(chosen)} chosen ones, and as many random "
            "ones are needed; choose fewer features, or give more answers"
        )
    tiny = density[firing].min()
    drawn = np.empty(len(chosen), np.int64)
    # The chosen latents take turns in a random order, so that none always draws from what is left.
    for place in rng.permutation(len(chosen)):
        wanted = np.log(max(density[chosen[place]], tiny))
        distance = np.abs(np.log(density[left]) - wanted)
        near = np.argsort(distance, kind="stable")[:nearest]
        index = near[rng.integers(len(near))]
        drawn[place] = left[index]
        left = np.delete(left, index)
    return drawn


def random_directions(d: int, count: int, rng: np.random.Generator) -> list[Floats]:
    """Directions (d,) of norm 1, uniform on the sphere."""
    return [unit(rng.normal(size=d)) for _ in range(count)]


def unit(vector: Floats) -> Floats:
    """(d,) scaled to norm 1."""
    return np.asarray(vector / np.linalg.norm(vector), np.float64)
