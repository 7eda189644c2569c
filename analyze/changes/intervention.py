"""Interventions: a vector added to a layer's output, or latents changed there, in generation and on
given texts.

A position is `generated` if the model samples the next token there: at the prompt's last token, and
at every token that it wrote. `prompt` are the prompt's tokens before the last one, `all`
are both.

An edit of `prompt` therefore reaches the completion through keys and values alone. Where no later
layer computes any from its own input, it changes nothing, to the last bit (`prompt_inert_from`).

Shapes: b sequences, t positions, n positions of one sequence, d d_model, F latents, m changed
latents, V vocabulary.

Figures of a text are kept on the host, so it waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from residual_saes.analyze.language_model import BATCH_TOKENS, Prediction, batches, blocks, edited
from residual_saes.analyze.stats import Floats
from residual_saes.data import durable
from residual_saes.data.errors import SettingError
from residual_saes.harvest.model import LanguageModel
from residual_saes.train.sae import SAE

POSITIONS = ("prompt", "generated", "all")
CHANGES = ("ablate", "clamp", "add")  # what is done to latents
# Bytes of either model's float32 logits at a time: 128 positions of Gemma 4's 262,144 ids.
BLOCK_BYTES = 1 << 27

# Of states (..., d) in the model's dtype what is added to them, (..., d) or (d,) in that dtype.
Delta = Callable[[Tensor], Tensor]


class Intervention(Protocol):
    """What is done to a layer's output, and where."""

    @property
    def positions(self) -> str:
        """One of POSITIONS."""

    def delta(self, lm: LanguageModel) -> Delta:
        """What is added to the layer's output."""


def require_positions(positions: str) -> None:
    """Raise SettingError unless study.positions is one of POSITIONS."""
    if positions not in POSITIONS:
        raise SettingError(f"study.positions={positions} must be one of {', '.join(POSITIONS)}")


class Steer(NamedTuple):
    """A vector that is added."""

    kind: str  # `v`, or which control
    vector: Floats  # (d,), unit norm
    scale: float
    positions: str

    def delta(self, lm: LanguageModel) -> Delta:
        """scale * vector, rounded once to the model's own dtype."""
        step = self.scale * torch.from_numpy(self.vector).double()
        step = step.to(lm.config.device, getattr(torch, lm.config.dtype))
        return lambda _: step

    @property
    def key(self) -> list[Any]:
        """What it follows from, for the key of kept replies."""
        return [durable.digest(self.vector.tobytes()), self.scale, self.positions]


@dataclass(frozen=True)
class LatentChange:
    """Latents of an SAE that get other values; its error, and all other latents, stay.

        h + sum over i in features of (g_i - f_i(h)) * W_dec[i]

    f_i(h) is what the SAE gives latent i. g_i is 0 (`ablate`), `value` (`clamp`), or f_i(h) + value
    (`add`). What does not change is added as exact 0: ablated latents that are silent leave every
    bit.
    """

    sae: SAE  # of resid_post
    change: str  # one of CHANGES
    features: tuple[int, ...]
    # In units of activation, of all features or of each; of `ablate` not used.
    value: float | tuple[float, ...]
    positions: str

    def __post_init__(self) -> None:
        """
        Raises:
            SettingError: a feature is none of the SAE's, or is named twice.
        """
        assert self.change in CHANGES and self.positions in POSITIONS
        require_features(self.features, self.sae.d_sae)

    def delta(self, lm: LanguageModel) -> Delta:
        return self.delta_in(torch.device(lm.config.device), getattr(torch, lm.config.dtype))

    def delta_in(self, device: torch.device, dtype: torch.dtype) -> Delta:
        """The same for states there; what is added to latents is rounded to their dtype once."""
        directions = self.sae.W_dec[list(self.features)]
        if self.change == "add":
            step = self._values(directions.double()) @ directions.double()
            step = step.to(device, dtype)
            return lambda _: step
        exact = self.exact

        def changed(states: Tensor) -> Tensor:
            return exact(states).to(states)

        return changed

    def exact(self, states: Tensor) -> Tensor:
        """What is added to states (..., d), before it is rounded to their dtype."""
        features = torch.tensor(self.features, device=self.sae.W_dec.device)
        directions = self.sae.W_dec[features]
        rows = states.flatten(0, -2).to(directions.device).float()
        values = self._values(directions)
        if self.change == "add":
            moved = values.expand(len(rows), -1)
        else:
            moved = values - activations(self.sae, rows, features)
        added: Tensor = (moved @ directions).reshape(states.shape)
        return added

    def _values(self, like: Tensor) -> Tensor:
        """(m,) values that the features get, or that are added to theirs."""
        value = 0.0 if self.change == "ablate" else self.value
        values: Tensor = torch.tensor(value, dtype=torch.float64).to(like)
        return values.expand(len(self.features))


@dataclass(frozen=True)
class EqualNorm:
    """Another direction that is as long, at each position, as what a change of latents adds there.

    h + |delta(h)| * direction
    """

    change: LatentChange
    direction: Floats  # (d,), unit norm

    @property
    def positions(self) -> str:
        return self.change.positions

    def delta(self, lm: LanguageModel) -> Delta:
        direction = torch.from_numpy(self.direction).float().to(lm.config.device)

        def changed(states: Tensor) -> Tensor:
            norm: Tensor = self.change.exact(states).norm(dim=-1, keepdim=True)
            return (norm.to(direction.device) * direction).to(states)

        return changed


def require_features(features: Sequence[int], d_sae: int) -> None:
    """Raise SettingError unless `features` are different latents of an SAE that has `d_sae`."""
    fits = all(0 <= feature < d_sae for feature in features)
    if not features or not fits or len(set(features)) < len(features):
        raise SettingError(
            f"features {list(features)} must be different latents of the SAE, 0 to {d_sae - 1}"
        )


def activations(sae: SAE, rows: Tensor, features: Tensor) -> Tensor:
    """(n, m) values of some latents (m,) in rows (n, d); 0 where the SAE does not keep them."""
    kept = sae.encode(rows)
    column = torch.full((sae.d_sae,), -1, device=rows.device)
    column[features] = torch.arange(len(features), device=rows.device)
    column = column[kept.indices]
    asked = column >= 0
    dense = rows.new_zeros(len(rows), len(features))
    dense[kept.rows[asked], column[asked]] = kept.values[asked].to(dense)
    return dense


def prompt_inert_from(lm: LanguageModel) -> int:
    """The first layer at which steering `prompt` has exactly no effect.

    No layer above it computes keys or values. In most models it is the last layer. Where the last
    layers take the keys and values of earlier ones (Gemma 4's `num_kv_shared_layers`), it is the
    layer below the first of these: layer 23 of E4B's 42.
    """
    sharing = getattr(lm.decoder.config, "num_kv_shared_layers", None) or 0
    return lm.n_layers - sharing - 1


# -- generation ------------------------------------------------------------------------------------


@contextmanager
def intervened(
    lm: LanguageModel, layer: int, intervention: Intervention, prompt_lengths: Sequence[int]
) -> Iterator[None]:
    """While open, generation goes on from the output of `layer` as the intervention changes it.

    A call that shows one position is either a decoded token, or the prompt's last one: a layer with
    shared keys and values sees no more of a prompt. Both are `generated`, so the calls need not be
    counted. The padding stays as it is.

    Args:
        prompt_lengths: tokens of each prompt of the batch, which is padded on the left.
    """
    delta = intervention.delta(lm)
    positions = intervention.positions
    width = max(prompt_lengths)
    first = torch.tensor([width - length for length in prompt_lengths], device=lm.config.device)
    boundary = torch.full_like(first, width - 1)

    def edit(states: Tensor) -> Tensor:
        length = states.shape[1]
        if length == 1:
            return states if positions == "prompt" else states + delta(states)
        is_prompt = len(states) == len(prompt_lengths) and length >= width
        assert is_prompt, "not a generation from these prompts"
        end = torch.full_like(first, length)
        chosen = _columns(positions, first, boundary, end, length)
        return torch.where(chosen[..., None], states + delta(states), states)

    with edited(lm.blocks[layer], edit):
        yield


def _columns(positions: str, first: Tensor, boundary: Tensor, end: Tensor, length: int) -> Tensor:
    """(b, length) bool: the columns of each row that `positions` takes.

    Args:
        first: (b,) column of each row's first token.
        boundary: (b,) the first column that is `generated`.
        end: (b,) the column behind each row's last token.
    """
    column = torch.arange(length, device=first.device)
    low = boundary if positions == "generated" else first
    high = boundary if positions == "prompt" else end
    return (column >= low[:, None]) & (column < high[:, None])


# -- on given texts --------------------------------------------------------------------------------


class Effect(NamedTuple):
    """What an intervention does while the model reads one given completion."""

    # KL(changed || unchanged) of the next token in nats, summed over the completion's tokens.
    kl: float
    norm: float  # mean |h| at the layer over the generated positions, unchanged
    # Mean |delta| / |h| over the changed positions. delta is what was really added: bfloat16
    # rounds small steps.
    relative: float


@torch.inference_mode()
def effects(
    lm: LanguageModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    layer: int,
    intervention: Intervention,
    tokens: int = BATCH_TOKENS,
    block_bytes: int = BLOCK_BYTES,
) -> list[Effect]:
    """The effect on each text, by a forward pass with the intervention and one without.

    Args:
        texts: prompt and completion, as ids.
        tokens: of a batch of texts, at most.
        block_bytes: of logits at a time.
    """
    delta = intervention.delta(lm)
    sequences = [[*prompt, *completion] for prompt, completion in texts]
    effect_of: dict[int, Effect] = {}
    for numbers, padded in batches(sequences, tokens):
        # Which positions are changed, and which are generated. Padding is on the right here.
        ids = padded.to(lm.config.device)
        batch = [texts[number] for number in numbers]
        chosen = columns_of(intervention.positions, batch, ids)
        generated = columns_of("generated", batch, ids)

        # Both passes: final states behind the norm, and what was added beside what was there.
        norms: list[Tensor] = []
        clean = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
        with edited(lm.blocks[layer], _measuring(delta, chosen, norms)):
            moved = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
        norm = _mean(norms[0], generated)
        relative = _mean(norms[1], chosen)

        for row, number in enumerate(numbers):
            prompt, completion = texts[number]
            predicting = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            kl = _kl(lm, moved[row, predicting], clean[row, predicting], block_bytes)
            effect_of[number] = Effect(kl, float(norm[row]), float(relative[row]))
    return [effect_of[number] for number in range(len(texts))]


def columns_of(
    positions: str, texts: Sequence[tuple[Sequence[int], Sequence[int]]], ids: Tensor
) -> Tensor:
    """(b, t) bool: the columns that `positions` takes of texts that are padded on the right.

    Args:
        texts: prompt and completion of each row of `ids` (b, t).
    """
    end = torch.tensor([len(prompt) + len(own) for prompt, own in texts], device=ids.device)
    boundary = torch.tensor([len(prompt) - 1 for prompt, _ in texts], device=ids.device)
    return _columns(positions, torch.zeros_like(end), boundary, end, ids.shape[1])


def _measuring(delta: Delta, chosen: Tensor, norms: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit of `chosen` (b, t), which appends |h| and |delta| / |h|, (b, t) each, to `norms`."""

    def edit(states: Tensor) -> Tensor:
        moved = torch.where(chosen[..., None], states + delta(states), states)
        norm = states.float().norm(dim=-1)
        added = (moved.float() - states.float()).norm(dim=-1)
        norms.extend((norm, added / norm))
        return moved

    return edit


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """(b,) means of the chosen values (b, t)."""
    return torch.where(chosen, values, 0.0).double().sum(1) / chosen.sum(1)


def _kl(lm: LanguageModel, moved: Tensor, clean: Tensor, block_bytes: int) -> float:
    """Sum of KL(moved || clean) of the next token, from final states (n, d) behind the norm."""
    total = 0.0
    for part in blocks(lm, len(clean), block_bytes):
        changed = Prediction.of_states(lm, moved[part], normed=True)
        unchanged = Prediction.of_states(lm, clean[part], normed=True)
        total += float(changed.kl(unchanged).double().sum())
    return total
