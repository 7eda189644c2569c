"""What a model writes while latents of a layer are pushed, beside what it writes untouched.

At scale s every position's residual, BOS included, gets

    s * sum over the latents i of m_i * W_dec[i]

m_i is the mean activation of latent i where it fires. So at scale 1 a latent that is silent gets
the value that it has as a rule where it fires, and a feature's scales mean the same in any SAE.

Shapes: d d_model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from analyze.intervention import Steer, effects, intervened
from analyze.language_model import Generation, end_tokens, generate
from analyze.stats import Floats
from data.errors import SettingError
from data.settings import number, whole
from harvest.model import LanguageModel
from train.sae import SAE

SCALES = (0.0, 2.0, 5.0, -5.0)
_MOST_SCALES = 50


@dataclass(frozen=True)
class Push:
    """What is added at scale 1."""

    features: tuple[int, ...]
    activations: tuple[float, ...]  # of each, that are added
    vector: Floats  # (d,)

    @classmethod
    def of(cls, sae: SAE, features: Sequence[int], activations: Sequence[float]) -> Push:
        """The decoder directions of some latents, each times an activation."""
        directions = sae.W_dec[list(features)].double().cpu().numpy()
        vector = np.asarray(activations, np.float64) @ directions
        return cls(tuple(features), tuple(activations), vector)

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.vector))

    def as_long_as(self, other: Push) -> Push:
        """The same direction with the norm of another push."""
        factor = other.norm / (self.norm or 1.0)
        activations = tuple(factor * activation for activation in self.activations)
        return Push(self.features, activations, factor * self.vector)

    def steer(self, scale: float) -> Steer:
        name = "+".join(map(str, self.features))
        return Steer(name, self.vector / (self.norm or 1.0), scale * self.norm, "all")


@dataclass(frozen=True)
class Dose:
    """What one scale does."""

    scale: float
    generation: Generation
    text: str
    kl: float  # KL(steered || untouched) of the next token on the untouched text, nats a token
    relative: float  # mean |delta| / |h| there
    norm: float  # mean |h| there, untouched


def written(
    lm: LanguageModel,
    layer: int,
    prompt: Sequence[int],
    steer: Steer | None,
    new_tokens: int,
    *,
    in_turns: bool = False,
) -> Generation:
    """A greedy continuation; None: untouched.

    Args:
        in_turns: the prompt ends with the beginning of the model's turn.
    """
    opened = intervened(lm, layer, steer, [len(prompt)]) if steer else nullcontext()
    with opened:
        return generate(lm, [prompt], new_tokens, in_turns=in_turns)[0]


def dose(
    lm: LanguageModel,
    layer: int,
    prompt: Sequence[int],
    untouched: Generation,
    push: Push,
    scale: float,
    new_tokens: int,
    *,
    in_turns: bool = False,
) -> Dose:
    """What the model writes at a scale, and how far its predictions move on the untouched text.

    Raises:
        SettingError: the model's outputs are no numbers any more.
    """
    steer = push.steer(scale)
    # A text that ended at once is the token that ended it.
    read = untouched.ids or [min(end_tokens(lm, in_turns=in_turns))]
    (effect,) = effects(lm, [(prompt, read)], layer, steer)
    if not math.isfinite(effect.kl):
        raise SettingError(
            f"scale={scale:g} is too large: the model's outputs are no numbers any more; take a "
            "smaller one"
        )
    generation = written(lm, layer, prompt, steer, new_tokens, in_turns=in_turns)
    return Dose(
        scale=scale,
        generation=generation,
        text=text_of(lm, generation),
        kl=effect.kl / len(read),
        relative=effect.relative,
        norm=effect.norm,
    )


def text_of(lm: LanguageModel, generation: Generation) -> str:
    return str(lm.tokenizer.inner.decode(generation.ids))


# -- settings --------------------------------------------------------------------------------------


def features_of(value: Any, d_sae: int) -> list[int]:
    """The latents that feature= names.

    Raises:
        SettingError: it names none, or one that is not there.
    """
    if value is None:
        raise SettingError("feature= is missing; give a latent's number, or several in a list")
    items = value if isinstance(value, list) else [value]
    features = [whole("feature", item) for item in items]
    if not features or len(set(features)) < len(features):
        raise SettingError(f"feature={value} must be one latent, or several different ones")
    for feature in features:
        if not 0 <= feature < d_sae:
            raise SettingError(
                f"feature={feature} is none of the {d_sae:,} latents; give 0 to {d_sae - 1}"
            )
    return features


def scales_of(value: Any) -> list[float]:
    """The numbers that scale= names, each once.

    Raises:
        SettingError: one is no number, or there are none, or too many.
    """
    items = value if isinstance(value, list) else SCALES if value is None else [value]
    scales = list(dict.fromkeys(number("scale", item) for item in items))
    wrong = next((scale for scale in scales if not math.isfinite(scale)), None)
    if wrong is not None:
        raise SettingError(f"scale={wrong} must be a finite number, such as 5 or -2.5")
    if not 0 < len(scales) <= _MOST_SCALES:
        raise SettingError(
            f"scale= has {len(scales)} numbers; give 1 to {_MOST_SCALES}, such as scale=[0,2,5,-5]"
        )
    return scales
