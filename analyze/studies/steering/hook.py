"""Steering: a vector added to a layer's output, in generation and on given texts.

A position is `generated` if the model samples the next token there: at the prompt's last token, and
at every token that it wrote. `prompt` are the prompt's tokens before the last one, `all`
are both.

An edit of `prompt` therefore reaches the completion through keys and values alone. Where no later
layer computes any from its own input, it changes nothing, to the last bit (`prompt_inert_from`).

Shapes: b sequences, t positions, n positions of one sequence, d d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from analyze.language_model import BATCH_TOKENS, Prediction, batches, blocks, edited
from analyze.stats import Floats
from harvest.model import LanguageModel

POSITIONS = ("prompt", "generated", "all")
# Bytes of either model's float32 logits at a time: 128 positions of Gemma 4's 262,144 ids.
BLOCK_BYTES = 1 << 27


class Steer(NamedTuple):
    """What is added to a layer's output, and where."""

    kind: str  # `v`, or which control
    vector: Floats  # (d,), unit norm
    scale: float
    positions: str  # one of POSITIONS


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
def steered(
    lm: LanguageModel, layer: int, steer: Steer, prompt_lengths: Sequence[int]
) -> Iterator[None]:
    """While open, generation adds scale * vector to the output of `layer`.

    A call that shows one position is either a decoded token, or the prompt's last one: a layer with
    shared keys and values sees no more of a prompt. Both are `generated`, so the calls need not be
    counted. The padding stays as it is.

    Args:
        prompt_lengths: tokens of each prompt of the batch, which is padded on the left.
    """
    step = _step(lm, steer)
    width = max(prompt_lengths)
    first = torch.tensor([width - length for length in prompt_lengths], device=step.device)
    boundary = torch.full_like(first, width - 1)

    def edit(states: Tensor) -> Tensor:
        length = states.shape[1]
        if length == 1:
            return states if steer.positions == "prompt" else states + step
        is_prompt = len(states) == len(prompt_lengths) and length >= width
        assert is_prompt, "not a generation from these prompts"
        end = torch.full_like(first, length)
        chosen = _chosen(steer.positions, first, boundary, end, length)
        return torch.where(chosen[..., None], states + step, states)

    with edited(lm.blocks[layer], edit):
        yield


def _step(lm: LanguageModel, steer: Steer) -> Tensor:
    """(d,) scale * vector in the model's own dtype: rounded once."""
    step = steer.scale * torch.from_numpy(steer.vector).double()
    return step.to(lm.config.device, getattr(torch, lm.config.dtype))


def _chosen(positions: str, first: Tensor, boundary: Tensor, end: Tensor, length: int) -> Tensor:
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
    """What steering does while the model reads one given completion."""

    # KL(steered || unsteered) of the next token in nats, summed over the completion's tokens.
    kl: float
    norm: float  # mean |h| at the layer over the generated positions, unsteered
    # Mean |delta| / |h| over the steered positions. delta is what was really added: bfloat16
    # rounds small steps.
    relative: float


@torch.inference_mode()
def effects(
    lm: LanguageModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    layer: int,
    steer: Steer,
    tokens: int = BATCH_TOKENS,
    block_bytes: int = BLOCK_BYTES,
) -> list[Effect]:
    """The effect on each text, by a forward pass with steering and one without.

    Args:
        texts: prompt and completion, as ids.
        tokens: of a batch of texts, at most.
        block_bytes: of logits at a time.
    """
    step = _step(lm, steer)
    sequences = [[*prompt, *completion] for prompt, completion in texts]
    effect_of: dict[int, Effect] = {}
    for numbers, padded in batches(sequences, tokens):
        # Which positions are steered, and which are generated. Padding is on the right here.
        ids = padded.to(lm.config.device)
        ends = [len(sequences[number]) for number in numbers]
        boundaries = [len(texts[number][0]) - 1 for number in numbers]
        end = torch.tensor(ends, device=ids.device)
        boundary = torch.tensor(boundaries, device=ids.device)
        chosen = _chosen(steer.positions, torch.zeros_like(end), boundary, end, ids.shape[1])
        generated = _chosen("generated", boundary, boundary, end, ids.shape[1])

        # Both passes: final states behind the norm, and what was added beside what was there.
        norms: list[Tensor] = []
        clean = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
        with edited(lm.blocks[layer], _measuring(step, chosen, norms)):
            moved = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
        norm = _mean(norms[0], generated)
        relative = _mean(norms[1], chosen)

        for row, number in enumerate(numbers):
            predicting = slice(boundaries[row], ends[row] - 1)
            kl = _kl(lm, moved[row, predicting], clean[row, predicting], block_bytes)
            effect_of[number] = Effect(kl, float(norm[row]), float(relative[row]))
    return [effect_of[number] for number in range(len(texts))]


def _measuring(step: Tensor, chosen: Tensor, norms: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit of `chosen` (b, t), which appends |h| and |delta| / |h|, (b, t) each, to `norms`."""

    def edit(states: Tensor) -> Tensor:
        moved = torch.where(chosen[..., None], states + step, states)
        norm = states.float().norm(dim=-1)
        delta = (moved.float() - states.float()).norm(dim=-1)
        norms.extend((norm, delta / norm))
        return moved

    return edit


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """(b,) means of the chosen values (b, t)."""
    return torch.where(chosen, values, 0.0).double().sum(1) / chosen.sum(1)


def _kl(lm: LanguageModel, moved: Tensor, clean: Tensor, block_bytes: int) -> float:
    """Sum of KL(moved || clean) of the next token, from final states (n, d) behind the norm."""
    total = 0.0
    for part in blocks(lm, len(clean), block_bytes):
        steered_prediction = Prediction.of_states(lm, moved[part], normed=True)
        prediction = Prediction.of_states(lm, clean[part], normed=True)
        total += float(steered_prediction.kl(prediction).double().sum())
    return total
