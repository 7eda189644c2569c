"""What a dictionary found of features that are known.

Choices (which latent stands for which feature) are made on some rows, and judged on others.

- F1, precision, recall: of a feature's latent as a sign of where the feature is active. Features
  and latents are matched one to one, so that the sum of F1 is largest (Kuhn, 1955). A feature
  without a latent has 0. Figures are means over the features.
- f1_by_decoder: the same F1 of the latents that are matched by |cosine| of decoder and feature.
- mcc: mean |cosine| of those pairs, "mean correlation coefficient" (O'Neill et al., arXiv
  2411.13117; SAELens and SynthSAEBench, arXiv 2602.14687, have the same).
- absorption: share of a parent's occurrences that a child takes, after Chanin et al. (arXiv
  2409.14507, section 4) with the planted direction in the probe's place. The parent's latent is
  silent, and of all active latents the one that writes most along the parent's direction is a
  descendant's, and writes at least .4 of what the parent has there. Mean over the parents.
- absorption_by_chance: what other features' latents take in that way, for as many latents as the
  descendants have.
- split: share of the features whose F1 a second latent raises by more than .03, active where
  either is (there, appendix: their threshold for feature splitting).
- dead: share of the latents that are active on no row.

Shapes: n rows, N features, F latents, d = d_model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from residual_saes.analyze.studies.synth.planted import NO_PARENT, Batch, World
from residual_saes.data.errors import SettingError

TAKES = 0.4  # of a parent's own part along its direction (Chanin et al., appendix)
SPLITS = 0.03  # of F1, likewise
LEAST = 10  # rows of each part on which a feature is active, to be judged
NONE = -1  # no latent

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Code(NamedTuple):
    """What a dictionary makes of rows."""

    f: Tensor  # (n, F) activations
    W_dec: Tensor  # (F, d)
    b_dec: Tensor  # (d,)

    @property
    def active(self) -> Tensor:
        """(n, F) float: 1 where a latent is active."""
        return (self.f > 0).float()


class Detection(NamedTuple):
    """How well each latent tells each feature, (N, F) each."""

    f1: Floats
    precision: Floats
    recall: Floats

    @classmethod
    def of(cls, fires: Tensor, active: Tensor) -> Detection:
        both = (fires.T @ active).double().numpy()
        features = fires.sum(0).double().numpy()[:, None]
        latents = active.sum(0).double().numpy()
        return cls(
            2 * both / np.maximum(features + latents, 1),
            both / np.maximum(latents, 1),
            both / np.maximum(features, 1),
        )


def matched(similarity: Floats) -> Ints:
    """(N,) each feature's latent, one to one, of the largest sum; NONE if there are too few."""
    features, latents = linear_sum_assignment(similarity, maximize=True)
    partner = np.full(len(similarity), NONE)
    partner[features] = latents
    return partner


def judged(rows: list[Batch]) -> Ints:
    """The features that are active on enough rows of each part.

    Raises:
        SettingError: none is.
    """
    counts = np.stack([batch.fires.sum(0).numpy() for batch in rows])
    features = np.flatnonzero((counts >= LEAST).all(0))
    if not len(features):
        raise SettingError(
            f"study.rows={len(rows[0].x)} must be more: no feature is active on {LEAST} of them"
        )
    return features


def scores(
    world: World, choice: Batch, held_out: Batch, chosen: Code, code: Code
) -> dict[str, float]:
    """The figures above, and variance explained and L0 on the held-out rows.

    Args:
        chosen: of the rows `choice`.
        code: of the rows `held_out`.
    """
    features = judged([choice, held_out])
    chosen_active, active = chosen.active, code.active
    on_choice = Detection.of(choice.fires.float(), chosen_active)
    found = Detection.of(held_out.fires.float(), active)
    by_activity = matched(on_choice.f1)
    cosine = (world.directions @ normalize(code.W_dec, dim=1).T).abs().double().numpy()
    by_decoder = matched(cosine)

    def mean(values: Floats, partner: Ints) -> float:
        of_pairs = np.where(partner == NONE, 0, values[np.arange(len(partner)), partner])
        return float(of_pairs[features].mean())

    # A second latent beside the best one.
    first = on_choice.f1.argmax(1)
    second = _either(choice.fires.float(), chosen_active, first).argmax(1)
    every = np.arange(world.features)
    together = _either(held_out.fires.float(), active, first)[every, second]
    gain = together - found.f1[every, first]

    pairs = np.flatnonzero(by_decoder != NONE)
    errors = held_out.x - code.b_dec - code.f @ code.W_dec
    about = held_out.x - held_out.x.mean(0)
    ever = (chosen_active.sum(0) + active.sum(0)) > 0
    return {
        "f1": mean(found.f1, by_activity),
        "precision": mean(found.precision, by_activity),
        "recall": mean(found.recall, by_activity),
        "f1_by_decoder": mean(found.f1, by_decoder),
        "mcc": float(cosine[pairs, by_decoder[pairs]].mean()),
        **absorption(world, held_out, code, by_activity),
        "split": float((gain > SPLITS)[features].mean()),
        "dead": float(1 - ever.float().mean()),
        "variance_explained": float(1 - errors.square().sum() / about.square().sum()),
        "l0": float(active.sum(1).mean()),
    }


def absorption(world: World, rows: Batch, code: Code, partner: Ints) -> dict[str, float]:
    """`absorption` and `absorption_by_chance`; NaN of a world without parents."""
    taken, by_others = [], []
    for parent in np.unique(world.parent[world.parent != NO_PARENT]):
        here = rows.fires[:, parent]
        if int(here.sum()) < LEAST:
            continue
        direction = world.directions[parent]
        f = code.f[here]
        part, latent = (f * (code.W_dec @ direction)).max(1)
        takes = part >= TAKES * rows.amounts[here, parent]
        own = partner[parent]
        if own != NONE:
            takes &= f[:, own] == 0
        below = partner[descendants(world, int(parent))]
        is_below = torch.from_numpy(np.isin(latent.numpy(), below[below != NONE]))
        taken.append(float((takes & is_below).float().mean()))
        others = code.f.shape[1] - len(below) - 1
        share = len(below) / max(others, 1)
        by_others.append(share * float((takes & ~is_below).float().mean()))
    return {
        "absorption": float(np.mean(taken)) if taken else float("nan"),
        "absorption_by_chance": float(np.mean(by_others)) if taken else float("nan"),
    }


def descendants(world: World, feature: int) -> Ints:
    """The features below one in its tree."""
    below = np.zeros(world.features, np.bool_)
    for other in range(feature + 1, world.features):
        parent = world.parent[other]
        below[other] = parent != NO_PARENT and (parent == feature or below[parent])
    return np.flatnonzero(below)


def _either(fires: Tensor, active: Tensor, first: Ints) -> Floats:
    """(N, F) F1 of "a feature's first latent or this one is active"."""
    of_first = active[:, first]  # (n, N)
    both = (fires * of_first).sum(0)[:, None] + (fires * (1 - of_first)).T @ active
    either = of_first.sum(0)[:, None] + active.sum(0) - of_first.T @ active
    return (2 * both / (fires.sum(0)[:, None] + either).clamp_min(1)).double().numpy()
