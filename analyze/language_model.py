"""The language model as the studies use it: residuals of given texts, logits, edits of a layer,
greedy generation.

Shapes: b sequences, t positions, d d_model, V vocabulary. Sequences are token ids with their BOS.
Batches are padded on the right with no mask, which a causal model cannot see, so a sequence's
values do not depend on what it is batched with, but for the rounding of other matrix shapes (about
1e-6 in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.errors import PipelineError
from harvest.model import LanguageModel, final_norm
from harvest.site import tap

# of a batch of texts, padding included: 0.9 GB of residuals of all 42 layers of E4B in bfloat16
BATCH_TOKENS = 4096


def batches(
    sequences: Sequence[Sequence[int]], tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], Tensor]]:
    """Sequences of like length together: their numbers, and ids (b, t) padded with 0, at most
    `tokens` of them.
    """
    group: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if group and (len(group) + 1) * len(sequences[group[0]]) > tokens:
            yield group, _padded([sequences[i] for i in group])
            group = []
        group.append(number)
    if group:
        yield group, _padded([sequences[i] for i in group])


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, one in zip(ids, rows, strict=True):
        row[: len(one)] = torch.tensor(one)
    return ids


@torch.inference_mode()
def residuals(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """One forward pass per sequence: its number, and by layer its resid_post (t, d) in the model's
    own dtype.

    In the order of length, not of `sequences`. Rows are views that the next pass does not
    overwrite.
    """
    for numbers, ids in batches(sequences, tokens):
        with tap(lm.blocks, layers) as taken:
            lm.decoder(input_ids=ids.to(lm.config.device), use_cache=False)
        for row, number in enumerate(numbers):
            yield number, {layer: taken[layer][row, : len(sequences[number])] for layer in layers}


@torch.inference_mode()
def logits(
    lm: LanguageModel, sequences: Sequence[Sequence[int]], tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, Tensor]]:
    """Of each sequence its number and the logits (t, V) that the model gives behind each of its
    tokens.

    In the order of length. Edits that are open take effect (see `edited`).
    """
    for numbers, ids in batches(sequences, tokens):
        found = lm.causal(input_ids=ids.to(lm.config.device), use_cache=False).logits
        for row, number in enumerate(numbers):
            yield number, found[row, : len(sequences[number])]


@torch.inference_mode()
def unembedded(lm: LanguageModel, states: Tensor, *, normed: bool = False) -> Tensor:
    """Logits (..., V) float32 of states (..., d): softcap(unembed(final_norm(states))), the head as
    the model has it.

    Args:
        normed: the states have gone through the final norm already.
    """
    head = lm.causal.get_output_embeddings()
    states = states.to(head.weight.dtype)
    found: Tensor = head(states if normed else final_norm(lm.decoder)(states)).float()
    cap = getattr(lm.causal.config.get_text_config(), "final_logit_softcapping", None)
    return found if cap is None else cap * torch.tanh(found / cap)


@contextmanager
def edited(block: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `block`'s output (b, t, d) is what `edit` makes of it; the layers above see that.

    With a cache, t is 1 after the prompt. In generation of models that share keys and values
    between layers (Gemma 4), the prompt's pass gives the sharing layers its last position alone.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Generation(NamedTuple):
    """What the model wrote behind one prompt."""

    ids: list[int]  # without the token that ended it
    finished: bool  # ended by itself or at a stop string, not by the limit


@torch.inference_mode()
def generate(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int, stops: Sequence[str] = ()
) -> list[Generation]:
    """Greedy continuations of prompts, all in one batch padded on the left and masked.

    Args:
        new_tokens: at most so many.
        stops: strings that end a text; its ids then go up to the token that completed one.
    """
    ends = _ends(lm)
    ids = torch.zeros(len(prompts), width := max(map(len, prompts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(prompts):
        ids[row, width - len(one) :] = torch.tensor(one)
        mask[row, width - len(one) :] = 1
    stopping = _Stops(lm, width, stops)
    output = lm.causal.generate(
        input_ids=ids.to(lm.config.device),
        attention_mask=mask.to(lm.config.device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        stopping_criteria=[stopping],
    )[:, width:].tolist()
    return [_cut(row, ends, stopping.at[number]) for number, row in enumerate(output)]


def _ends(lm: LanguageModel) -> set[int]:
    """Tokens that end a text, by the model's generation settings and its tokenizer."""
    said = lm.causal.generation_config.eos_token_id
    ends = set(said) if isinstance(said, list) else {said}
    return {end for end in (*ends, lm.tokenizer.inner.eos_token_id) if end is not None}


def _cut(row: list[int], ends: set[int], stopped: int | None) -> Generation:
    end = next((at for at, token in enumerate(row) if token in ends), None)
    if end is not None and (stopped is None or end < stopped):
        return Generation(row[:end], True)
    return Generation(row[:stopped], stopped is not None)


class _Stops:
    """Ends a row when its new text holds a stop string. One of transformers' stopping criteria, by
    its call.
    """

    def __init__(self, lm: LanguageModel, width: int, stops: Sequence[str]) -> None:
        self._decode, self._width, self._stops = lm.tokenizer.inner.decode, width, stops
        self._back = max(
            (len(stop.encode()) for stop in stops), default=0
        )  # tokens that can hold one: a byte each
        self.at: dict[int, int | None] = {}

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        for row in range(len(ids)):
            if self.at.get(row) is None:
                tail = self._decode(ids[row, max(self._width, ids.shape[1] - self._back) :])
                found = any(stop in tail for stop in self._stops)
                self.at[row] = ids.shape[1] - self._width if found else None
        return torch.tensor(
            [self.at[row] is not None for row in range(len(ids))], device=ids.device
        )


# -- the head on many positions -----

# Of float32 logits at a time: 256 positions of Gemma 4's 262,144 ids. What is computed from them
# takes five times that.
_BLOCK_BYTES = 1 << 28
# bf16 keeps 8 bits, and a softcap rounds four times; a scale that is left out is wrong by a factor.
_ROUNDING = 2.0**-6
_CHECKED = 32  # tokens


def width(lm: LanguageModel) -> int:
    """V: ids that the head gives logits for."""
    return int(lm.causal.get_output_embeddings().weight.shape[0])


def blocks(lm: LanguageModel, positions: int) -> Iterator[slice]:
    """The positions, as many at a time as have 268 MB of logits."""
    step = max(1, _BLOCK_BYTES // (4 * width(lm)))
    for at in range(0, positions, step):
        yield slice(at, min(at + step, positions))


@torch.inference_mode()
def check(lm: LanguageModel, ids: Sequence[int]) -> float:
    """How far `unembedded` of the last layer is from the model's own logits, relative to the
    largest of these.

    Looked at behind the first tokens of `ids`.

    Raises:
        PipelineError: by more than rounding: the head has a step that `unembedded` does not know.
    """
    last = len(lm.blocks) - 1
    with tap(lm.blocks, [last]) as taken:
        first = torch.tensor([ids[:_CHECKED]], device=lm.config.device)
        own = lm.causal(input_ids=first, use_cache=False).logits.float()
    difference = float((unembedded(lm, taken[last]) - own).abs().max() / own.abs().max())
    if not difference <= _ROUNDING:
        raise PipelineError(
            f"{type(lm.causal).__name__} makes logits of its last layer otherwise than by final norm, unembedding and "
            f"softcap: they differ by {difference:.2%} (allowed {_ROUNDING:.2%}), so its layers cannot be read this way"
        )
    return difference
