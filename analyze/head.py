"""The language model's head on many positions, in blocks that fit into memory.

Shapes: n positions, d d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from analyze.causal import unembedded
from data.errors import PipelineError
from harvest.lm import LanguageModel, tap

# Of float32 logits at a time: 256 positions of Gemma 4's 262,144 ids. What is computed from them takes five times that.
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
    """How far `unembedded` of the last layer is from the model's own logits, relative to the largest of these.

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
