"""Advantages of GRPO: how much better a rollout, or a token of it, is than the question's others.

    trajectory   A_i = (R_i - mean R) / (sd R + 1e-4),  R_i = o_i + w z_i
    token        A_it = (o_i - mean o) / (sd o + 1e-4) + w (z_it - mean z)

o is the outcome, w the weight. Means and standard deviations (n - 1) are of the rollouts of one
question; the mean of z_it is of all their tokens. The first is TRL's `scale_rewards="group"`, and
that of Shao et al. (DeepSeekMath, arXiv 2402.03300, section 4.1.2). The second is the reference's
third gate but for the units of z: the reference divides by the spread within the question. R4 has
no o, and w = 1.

Where all rollouts of a question have the same outcome, the first is as large as anywhere, whatever
w is: dividing by sd R undoes it. The second stays of the size of w there.

Shapes: n rollouts of a question, t tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-4  # TRL's


def of_trajectories(rewards: Tensor) -> Tensor:
    """(n,) of the rewards (n,) of a question's rollouts."""
    return (rewards - rewards.mean()) / (rewards.std() + EPSILON)


def of_tokens(outcomes: Tensor | None, z: Sequence[Sequence[float]], weight: float) -> list[Tensor]:
    """Of each of n rollouts (t,) float32, one for each of its tokens.

    Args:
        outcomes: (n,); None: there is none.
        z: of each rollout (t,); NaN: of a token that only the outcome rewards.
    """
    base = torch.zeros(len(z)) if outcomes is None else of_trajectories(outcomes)
    values = [torch.tensor(own, dtype=torch.float32) for own in z]
    mean = torch.cat(values).nanmean().nan_to_num()
    pairs = zip(base, values, strict=True)
    return [advantage + weight * (own - mean).nan_to_num() for advantage, own in pairs]
