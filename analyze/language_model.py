"""The language model as the studies use it.

Residuals and logits of given texts, edits of a layer, the head on any states, generation.

Shapes: b sequences, t positions, n positions of any sequences, d d_model, V vocabulary. A sequence
is a list of token ids with its BOS. Batches are padded on the right without a mask. A causal model
does not see that padding, so a sequence's values depend on its batch by rounding alone (about 1e-6
in float32, from matrix products of other shapes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from residual_saes.data.errors import PipelineError
from residual_saes.data.journal import note
from residual_saes.data.site import HookPoint, Point
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import DeepestReached, tap

# Tokens of a batch of texts, padding included. With all 42 layers of Gemma 4 E4B kept in bfloat16
# they are 0.9 GB of residuals.
BATCH_TOKENS = 4096
# On a CPU: a layer of Gemma 4 E4B then takes one core about a second.
CPU_BATCH_TOKENS = 256
# Bytes of float32 logits at a time: 256 positions of Gemma 4's 262,144 ids. What is computed from
# them takes five times that.
BLOCK_BYTES = 1 << 28
# Operations of the head at a time on a CPU: about a second of a core, for 51 positions of Gemma 4.
BLOCK_OPERATIONS = 1 << 36
# Of the head check. bfloat16 keeps 8 bits, and a softcap rounds four times; a scale that
# `unembedded` left out would be wrong by a factor.
_ALLOWED_DEVIATION = 2.0**-6
_CHECKED_TOKENS = 32


Named = TypeVar("Named", bound=Point)

# -- texts through the whole model -----------------------------------------------------------------


def batch_tokens(lm: LanguageModel) -> int:
    """Tokens of a batch of texts, by the model's device."""
    return CPU_BATCH_TOKENS if torch.device(lm.config.device).type == "cpu" else BATCH_TOKENS


def batches(
    sequences: Sequence[Sequence[int]], tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of sequences of similar length, the longest first.

    Args:
        tokens: of a batch at most, padding included; a longer sequence is a batch by itself.

    Yields:
        the sequences' numbers, and their ids (b, t), padded with 0.
    """
    group: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if group and (len(group) + 1) * len(sequences[group[0]]) > tokens:
            yield group, _padded(sequences, group)
            group = []
        group.append(number)
    if group:
        yield group, _padded(sequences, group)


def _padded(sequences: Sequence[Sequence[int]], group: Sequence[int]) -> Tensor:
    """(b, t) ids of the sequences in `group`, of which the first is the longest."""
    ids = torch.zeros(len(group), len(sequences[group[0]]), dtype=torch.int64)
    for row, number in zip(ids, group, strict=True):
        sequence = sequences[number]
        row[: len(sequence)] = torch.tensor(sequence)
    return ids


@torch.inference_mode()
def residuals(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    points: Sequence[Named],
    tokens: int | None = None,
) -> Iterator[tuple[int, dict[Named, Tensor]]]:
    """Each sequence's states at some hook points, by one forward pass, in the order of `batches`.

    Args:
        tokens: of a batch; None: see `batch_tokens`.

    Yields:
        the sequence's number, and its states (t, d) in the model's own dtype by point, named as
            it was given; a number is a layer's resid_post. The rows are views that the next pass
            does not overwrite.
    """
    for numbers, ids in batches(sequences, tokens or batch_tokens(lm)):
        with tap(lm, points, ends=True) as taken, suppress(DeepestReached):
            # Device sync: the family's own masks.
            lm.decoder(input_ids=ids.to(lm.config.device), use_cache=False)
        for row, number in enumerate(numbers):
            length = len(sequences[number])
            yield number, {point: taken[HookPoint.of(point)][row, :length] for point in points}


@torch.inference_mode()
def logits(
    lm: LanguageModel, sequences: Sequence[Sequence[int]], tokens: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Each sequence's logits, in the order of `batches`. Edits that are open take effect.

    Args:
        tokens: of a batch; None: see `batch_tokens`.

    Yields:
        the sequence's number, and the model's logits (t, V) behind each of its tokens.
    """
    for numbers, ids in batches(sequences, tokens or batch_tokens(lm)):
        output = lm.causal(input_ids=ids.to(lm.config.device), use_cache=False).logits
        for row, number in enumerate(numbers):
            yield number, output[row, : len(sequences[number])]


@contextmanager
def edited(block: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `edit` replaces the block's output (b, t, d), and the layers above see that.

    With a cache, t is 1 after the prompt. In generation of models that share keys and values
    between layers (Gemma 4), layers that share them see only the prompt's last position.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([edit(output[0]), *output[1:]])
        return edit(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# -- the head on any states ------------------------------------------------------------------------


def vocabulary_size(lm: LanguageModel) -> int:
    """V: ids that the head gives logits for."""
    return int(lm.causal.get_output_embeddings().weight.shape[0])


@torch.inference_mode()
def unembedded(lm: LanguageModel, states: Tensor, *, normed: bool = False) -> Tensor:
    """`read_by_head` where no gradient is wanted."""
    return read_by_head(lm, states, normed=normed)


def read_by_head(lm: LanguageModel, states: Tensor, *, normed: bool = False) -> Tensor:
    """Logits (..., V) float32 of states (..., d): softcap(unembed(final_norm(states))).

    Args:
        normed: the states have gone through the final norm already.
    """
    head = lm.causal.get_output_embeddings()
    states = states.to(head.weight.dtype)
    output: Tensor = head(states if normed else lm.final_norm(states)).float()
    cap = getattr(lm.causal.config.get_text_config(), "final_logit_softcapping", None)
    return output if cap is None else cap * torch.tanh(output / cap)


def blocks(lm: LanguageModel, positions: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Consecutive slices of `positions`, each with `block_bytes` of float32 logits at most.

    On a CPU they also take no more than `BLOCK_OPERATIONS`.
    """
    step = block_bytes // (4 * vocabulary_size(lm))
    if torch.device(lm.config.device).type == "cpu":
        step = min(step, BLOCK_OPERATIONS // (2 * vocabulary_size(lm) * lm.d_model))
    step = max(1, step)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


@dataclass(frozen=True)
class Prediction:
    """The distribution of the next token behind each of n positions. Losses are in nats."""

    log_p: Tensor  # (n, V) float32

    @classmethod
    def of_logits(cls, logits: Tensor) -> Prediction:
        """Of logits (n, V) of any dtype."""
        return cls(logits.float().log_softmax(1))

    @classmethod
    def of_states(cls, lm: LanguageModel, states: Tensor, *, normed: bool = False) -> Prediction:
        """Of states (n, d), read by the head: see `unembedded`."""
        return cls.of_logits(unembedded(lm, states, normed=normed))

    @cached_property
    def p(self) -> Tensor:
        """(n, V) probabilities."""
        return self.log_p.exp()

    def cross_entropy(self, targets: Tensor) -> Tensor:
        """(n,) -ln p of the target ids (n,)."""
        return -self.log_p.gather(1, targets[:, None])[:, 0]

    def kl(self, other: Prediction) -> Tensor:
        """(n,) KL(self || other)."""
        return (self.p * (self.log_p - other.log_p)).sum(1)


@torch.inference_mode()
def head_deviation(lm: LanguageModel, ids: Sequence[int]) -> float:
    """How far `unembedded` of the last layer is from the model's own logits.

    Args:
        ids: a text; the positions behind its first 32 tokens are compared.

    Returns:
        the largest difference, relative to the largest of the model's logits.

    Raises:
        PipelineError: by more than rounding, or the head has another width: it has a step that
            `unembedded` does not know.
    """
    width = lm.causal.get_output_embeddings().weight.shape[1]
    if width != lm.d_model:
        raise PipelineError(
            f"{type(lm.causal).__name__} has a head for states of width {width}, and its layers "
            f"have {lm.d_model}, so they cannot be read this way"
        )
    last = len(lm.blocks) - 1
    # Device sync, at the start: the family's own masks, and the comparison.
    first = torch.tensor([ids[:_CHECKED_TOKENS]], device=lm.config.device)
    with tap(lm, [last]) as taken:
        own = lm.causal(input_ids=first, use_cache=False).logits.float()
    difference = float((unembedded(lm, taken[HookPoint(last)]) - own).abs().max() / own.abs().max())
    if not difference <= _ALLOWED_DEVIATION:
        raise PipelineError(
            f"{type(lm.causal).__name__} makes logits of its last layer otherwise than by final "
            f"norm, unembedding and softcap: they differ by {difference:.2%} (allowed "
            f"{_ALLOWED_DEVIATION:.2%}), so its layers cannot be read this way"
        )
    return difference


# -- generation ------------------------------------------------------------------------------------


class Generation(NamedTuple):
    """What the model wrote behind one prompt."""

    ids: list[int]  # without the token that ended it
    finished: bool  # ended by itself or at a stop string, not by the limit
    end: int | None = None  # the token that ended it; None: a stop string, or the limit


class Sampling(NamedTuple):
    """How tokens are drawn from softmax(logits / temperature)."""

    temperature: float  # above 0
    # (prompts, new_tokens) float64 in [0, 1). A token is where the cumulated probabilities pass its
    # number, so a row's draws are its own, whatever the batch.
    uniform: Tensor


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling | None = None,
    *,
    in_turns: bool = False,
) -> list[Generation]:
    """Continuations of prompts, all in one batch, padded on the left and masked.

    Args:
        new_tokens: at most so many.
        stops: strings that end a text; its ids then go up to the token that completed one.
        sampling: None: the most probable token each time (greedy).
        in_turns: the prompts end with the beginning of the model's turn, whose end ends a text.
    """
    ends = end_tokens(lm, in_turns=in_turns)
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids[row, start:] = torch.tensor(prompt)
        mask[row, start:] = 1
    stopping = _Stopping(lm, width, stops)
    drawing = [] if sampling is None else [_Drawing(sampling, width)]
    # Device sync, each token: transformers looks whether all rows have ended.
    output = lm.causal.generate(
        input_ids=ids.to(lm.config.device),
        attention_mask=mask.to(lm.config.device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        stopping_criteria=[stopping],
        logits_processor=drawing,
    )
    written = output[:, width:].tolist()  # device sync
    return [_cut(new, ends, stopping.length[row]) for row, new in enumerate(written)]


def end_tokens(lm: LanguageModel, *, in_turns: bool = False) -> set[int]:
    """Ids that end a text: the tokenizer's, the generation settings', and that of built-in turns.

    A model that was loaded without its head has no generation settings; its configuration's are
    taken then.
    """
    settings: Any = lm.decoder.config if lm.causal is None else lm.causal.generation_config
    configured = settings.eos_token_id
    ends = set(configured) if isinstance(configured, list | tuple) else {configured}
    ends.add(lm.tokenizer.inner.eos_token_id)
    if in_turns:
        ends.add(lm.tokenizer.turns.end)
    return ends - {None}


def _cut(new: list[int], ends: set[int], stopped: int | None) -> Generation:
    """The new tokens of a row up to its first end token or stop string.

    Args:
        stopped: new tokens with which the row held a stop string; None: it never did.
    """
    end = next((index for index, token in enumerate(new) if token in ends), None)
    if end is not None and (stopped is None or end < stopped):
        return Generation(new[:end], True, new[end])
    return Generation(new[:stopped], stopped is not None)


class _Drawing:
    """Leaves the drawn token alone, for the greedy search to take; a logits processor."""

    def __init__(self, sampling: Sampling, width: int) -> None:
        """
        Args:
            width: of the prompts with their padding, tokens.
        """
        self._sampling = sampling
        self._width = width

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        temperature, uniform = self._sampling
        step = ids.shape[1] - self._width
        # In float64: a sum of 262,144 float32 probabilities is off by more than some of them.
        cumulated = (scores.double() / temperature).softmax(1).cumsum(1)
        level = uniform[:, step, None].to(scores.device) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, level, right=True)
        token.clamp_(max=scores.shape[1] - 1)  # where rounding put the level at the sum
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class _Stopping:
    """Ends a row when its new text holds a stop string; one of transformers' stopping criteria."""

    def __init__(self, lm: LanguageModel, width: int, stops: Sequence[str]) -> None:
        """
        Args:
            width: of the prompts with their padding, tokens.
        """
        self._decode = lm.tokenizer.inner.decode
        self._width = width
        self._stops = stops
        # Tokens that can hold a stop string: a token has a byte at least.
        self._window = max((len(stop.encode()) for stop in stops), default=0)
        # By row, its new tokens when it first held a stop string; None before.
        self.length: dict[int, int | None] = {}

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        width = ids.shape[1]
        note(f"{len(ids)} answers: {width - self._width} tokens written")
        start = max(self._width, width - self._window)
        # Device sync, once a token: the text decides whether a row ends.
        for row, written in enumerate(ids[:, start:].tolist()):
            if self.length.get(row) is None:
                tail = self._decode(written)
                stopped = any(stop in tail for stop in self._stops)
                self.length[row] = width - self._width if stopped else None
        ended = [self.length[row] is not None for row in range(len(ids))]
        return torch.tensor(ended, device=ids.device)
