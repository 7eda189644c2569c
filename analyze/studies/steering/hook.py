"""Steering: a vector added to a layer's output, in generation and on given texts, and what that
does to the model.

A position is `generated` if what the model predicts there is a token of its own: the prompt's last
token and every token that it wrote. `prompt` are the prompt's tokens before the last one, `all` are
both.

So an edit of `prompt` reaches the completion through keys and values alone. Where no later layer
computes any from its own input, it changes nothing, to the last bit (see `prompt_inert_from`).

Shapes: b sequences, t positions, d d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from analyze.language_model import BATCH_TOKENS, Prediction, batches, blocks, edited
from harvest.model import LanguageModel

POSITIONS = ("prompt", "generated", "all")
# Bytes of either model's float32 logits at a time: 128 positions of Gemma 4's 262,144 ids.
BLOCK_BYTES = 1 << 27


def prompt_inert_from(lm: LanguageModel) -> int:
    """The first layer at which steering `prompt` is exactly without effect: nobody above computes
    keys or values.

    The last layer, in most models; in those whose last layers take the keys and values of earlier
    ones (Gemma 4's `num_kv_shared_layers`), the one below the first of these: layer 23 of E4B's 42.
    """
    return lm.n_layers - (getattr(lm.decoder.config, "num_kv_shared_layers", None) or 0) - 1


# -- generation ------------------------------------------------------------------------------------


@contextmanager
def steered(
    lm: LanguageModel,
    layer: int,
    vector: Tensor,
    scale: float,
    positions: str,
    widths: Sequence[int],
) -> Iterator[None]:
    """While open, `causal.generate` of prompts that have `widths` tokens adds scale * vector (d,)
    behind `layer`.

    A call that shows one position is either a decoded token, or the prompt's last one: all that a
    layer with shared keys and values gets to see of a prompt. Both are `generated`, so the calls
    need not be counted. The prompts' padding stays as it is.
    """
    step, width = _step(lm, vector, scale), max(widths)
    first = torch.tensor(
        [width - one for one in widths], device=step.device
    )  # prompts are padded on the left
    boundary = torch.full_like(first, width - 1)

    def edit(states: Tensor) -> Tensor:
        length = states.shape[1]
        if length == 1:
            return states if positions == "prompt" else states + step
        assert len(states) == len(widths) and length >= width, "not a generation from these prompts"
        chosen = _chosen(positions, first, boundary, torch.full_like(first, length), length)
        return torch.where(chosen[..., None], states + step, states)

    with edited(lm.blocks[layer], edit):
        yield


def _step(lm: LanguageModel, vector: Tensor, scale: float) -> Tensor:
    """scale * vector as the model computes: rounded once."""
    return (scale * vector.double()).to(lm.config.device, getattr(torch, lm.config.dtype))


def _chosen(positions: str, first: Tensor, boundary: Tensor, end: Tensor, length: int) -> Tensor:
    """(b, t) bool: what `positions` takes of rows that span [first, end) and are `generated` from
    `boundary` on.
    """
    column = torch.arange(length, device=first.device)
    low = boundary if positions == "generated" else first
    high = boundary if positions == "prompt" else end
    return (column >= low[:, None]) & (column < high[:, None])


# -- on given texts --------------------------------------------------------------------------------


class Effect(NamedTuple):
    """What steering does while the model reads one given completion."""

    # nats, KL(steered || unsteered) of the next token, summed over the completion's tokens
    kl: float
    norm: float  # mean |h| at the layer over the generated positions, unsteered
    # mean |delta| / |h| over the steered ones; of what was really added: bfloat16 rounds small
    # steps
    relative: float


@torch.inference_mode()
def effects(
    lm: LanguageModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    layer: int,
    vector: Tensor,
    scale: float,
    positions: str,
    tokens: int = BATCH_TOKENS,
    block_bytes: int = BLOCK_BYTES,
) -> list[Effect]:
    """Of each prompt and completion its effect, by two forward passes."""
    step, sequences = _step(lm, vector, scale), [[*prompt, *written] for prompt, written in texts]
    found: dict[int, Effect] = {}
    for numbers, padded in batches(sequences, tokens):
        ids = padded.to(lm.config.device)
        boundary = torch.tensor(
            [len(texts[number][0]) - 1 for number in numbers], device=ids.device
        )
        end = torch.tensor([len(sequences[number]) for number in numbers], device=ids.device)
        chosen = _chosen(positions, torch.zeros_like(end), boundary, end, ids.shape[1])
        generated = _chosen("generated", boundary, boundary, end, ids.shape[1])
        norms: list[Tensor] = []
        clean = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
        with edited(lm.blocks[layer], _measuring(step, chosen, norms)):
            steered_ = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
        norm, relative = _mean(norms[0], generated), _mean(norms[1], chosen)
        for row, number in enumerate(numbers):
            predicting = slice(int(boundary[row]), int(end[row]) - 1)
            kl = _kl(lm, steered_[row, predicting], clean[row, predicting], block_bytes)
            found[number] = Effect(kl, float(norm[row]), float(relative[row]))
    return [found[number] for number in range(len(texts))]


def _measuring(step: Tensor, chosen: Tensor, norms: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit of `chosen` (b, t), which leaves |h| and |delta| / |h|, (b, t) each, in `norms`."""

    def edit(states: Tensor) -> Tensor:
        moved = torch.where(chosen[..., None], states + step, states)
        norm = states.float().norm(dim=-1)
        norms.extend((norm, (moved.float() - states.float()).norm(dim=-1) / norm))
        return moved

    return edit


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """(b,) means of the chosen values."""
    return torch.where(chosen, values, 0.0).double().sum(1) / chosen.sum(1)


def _kl(lm: LanguageModel, moved: Tensor, clean: Tensor, block_bytes: int) -> float:
    """Sum of KL(moved || clean) of the next token, from final states (n, d) behind the norm."""
    total = 0.0
    for part in blocks(lm, len(clean), block_bytes):
        steered_ = Prediction.of_states(lm, moved[part], normed=True)
        unsteered = Prediction.of_states(lm, clean[part], normed=True)
        total += float(steered_.kl(unsteered).double().sum())
    return total
