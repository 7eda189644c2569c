"""What a model writes while latents of a layer are pushed, beside what it writes untouched.

At scale s every position's residual, BOS included, gets

    s * sum over the latents i of m_i * W_dec[i]

m_i is the mean activation of latent i where it fires. So at scale 1 a latent that is silent gets
the value that it has as a rule where it fires, and a feature's scales mean the same in any SAE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from residual_saes.analyze.changes.intervention import LatentChange, effects, intervened
from residual_saes.analyze.language_model import Generation, end_tokens, generate
from residual_saes.analyze.latents.rates import Rates
from residual_saes.data.errors import SettingError
from residual_saes.data.settings import number, whole
from residual_saes.harvest.model import LanguageModel
from residual_saes.train.sae import SAE

SCALES = (0.0, 2.0, 5.0, -5.0)
_MOST_SCALES = 50


class Push(NamedTuple):
    """What is added at scale 1."""

    sae: SAE
    features: tuple[int, ...]
    activations: tuple[float, ...]  # of each, that are added

    @classmethod
    def usual(cls, sae: SAE, features: Sequence[int], known: Rates) -> Push:
        """Each latent by its mean activation where it fires.

        Raises:
            SettingError: one never fires.
        """
        means = tuple(map(known.mean_of, features))
        return cls(sae, tuple(features), means)

    @property
    def norm(self) -> float:
        """Length of what is added."""
        directions = self.sae.W_dec[list(self.features)].double()
        return float((directions.new_tensor(self.activations) @ directions).norm())

    def scaled(self, factor: float) -> Push:
        """The same direction, another length."""
        return self._replace(activations=tuple(factor * value for value in self.activations))

    def change(self) -> LatentChange:
        """As an intervention at all positions."""
        return LatentChange(self.sae, "add", self.features, self.activations, "all")


@dataclass(frozen=True)
class Dose:
    """What one scale does."""

    scale: float
    generation: Generation
    text: str
    kl: float  # KL(steered || untouched) of the next token on the untouched text, nats a token
    relative: float  # mean |delta| / |h| there
    norm: float  # mean |h| there, untouched


class Writer(NamedTuple):
    """Writes greedy continuations of one prompt."""

    lm: LanguageModel
    layer: int  # whose output is pushed
    prompt: Sequence[int]
    new_tokens: int  # at most
    in_turns: bool  # the prompt ends with the beginning of the model's turn

    def written(self, push: Push | None) -> Generation:
        """A continuation; None: untouched."""
        lengths = [len(self.prompt)]
        opened = intervened(self.lm, self.layer, push.change(), lengths) if push else nullcontext()
        with opened:
            return generate(self.lm, [self.prompt], self.new_tokens, in_turns=self.in_turns)[0]

    def dose(self, untouched: Generation, push: Push, scale: float) -> Dose:
        """What the model writes at a scale, and how far its predictions move on a text.

        Args:
            untouched: the text.

        Raises:
            SettingError: the model's outputs are no numbers any more.
        """
        scaled = push.scaled(scale)
        # A text that ended at once is the token that ended it.
        read = untouched.ids or [min(end_tokens(self.lm, in_turns=self.in_turns))]
        (effect,) = effects(self.lm, [(self.prompt, read)], self.layer, scaled.change())
        if not math.isfinite(effect.kl):
            raise SettingError(
                f"scale={scale:g} is too large: the model's outputs are no numbers any more; take "
                "a smaller one"
            )
        generation = self.written(scaled)
        text = text_of(self.lm, generation)
        return Dose(scale, generation, text, effect.kl / len(read), effect.relative, effect.norm)


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
    features = list(map(partial(whole, "feature"), items))
    fits = all(0 <= feature < d_sae for feature in features)
    if not features or not fits or len(set(features)) < len(features):
        raise SettingError(
            f"feature={value} must be one of the {d_sae:,} latents, 0 to {d_sae - 1}, or several "
            "different ones in a list"
        )
    return features


def scales_of(value: Any) -> list[float]:
    """The numbers that scale= names, each once.

    Raises:
        SettingError: one is no number, or there are none, or too many.
    """
    items = value if isinstance(value, list) else SCALES if value is None else [value]
    scales = list(dict.fromkeys(map(partial(number, "scale"), items)))
    if not all(map(math.isfinite, scales)) or not 0 < len(scales) <= _MOST_SCALES:
        raise SettingError(
            f"scale={value} must be 1 to {_MOST_SCALES} finite numbers, such as 5 or [0,2,5,-5]"
        )
    return scales


def require_room(setting: str, new_tokens: int, prompt: Sequence[int], context: int) -> None:
    """Raise SettingError unless so many tokens fit into the context behind a prompt."""
    if not 0 < new_tokens <= context - len(prompt):
        raise SettingError(
            f"{setting}={new_tokens} behind a prompt of {len(prompt):,} tokens must be at least 1 "
            f"and fit into the model's context of {context:,}"
        )
