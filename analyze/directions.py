"""A decoder's directions beside other directions, and what they say to the language model's head.

Shapes: F latents, G other directions, d d_model, V vocabulary, K kept of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harvest.model import LanguageModel

BLOCK_BYTES = 1 << 28  # of products held at a time
VOCABULARY_BLOCK = 16_384  # ids whose unembeddings are float32 at a time: 168 MB at d = 2560


def unit(directions: Tensor) -> Tensor:
    """(F, d) directions scaled to norm 1; zero ones stay."""
    norms: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return directions / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def nearest(
    of: Tensor, among: Tensor, count: int, *, itself: bool = True, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor]:
    """The `count` rows of `among` (G, d) with the largest cosines to each row of `of` (F, d).

    Args:
        count: at most G, or G - 1 without itself.
        itself: whether row i of `among` may be chosen for row i of `of`.
        block_bytes: of cosines held at a time.

    Returns:
        cosines (F, count) in descending order, and the rows' numbers.
    """
    is_same = among is of
    of = unit(of)
    among = of if is_same else unit(among)  # one copy: 0.3 GB at 32,768 x 2,560
    step = max(1, block_bytes // (4 * len(among)))
    values = []
    numbers = []
    for start in range(0, len(of), step):
        cosines = of[start : start + step] @ among.T
        if not itself:
            rows = torch.arange(len(cosines), device=cosines.device)
            cosines[rows, rows + start] = -2.0
        largest = cosines.topk(count, dim=1)
        values.append(largest.values)
        numbers.append(largest.indices)
    return torch.cat(values), torch.cat(numbers)


def gain(norm: nn.Module, d_model: int, device: torch.device | str) -> Tensor:
    """(d,) what a norm multiplies each dimension by, however its family writes its weight.

    Gemma 3 multiplies by 1 + weight, others by weight. So the gain is measured: a vector of ones
    has root mean square 1, and an RMS norm returns just its factors (to its epsilon).
    """
    if isinstance(norm, nn.LayerNorm):
        assert isinstance(norm.weight, Tensor)
        return norm.weight.detach().float().to(device)
    with torch.inference_mode():
        factors: Tensor = norm(torch.ones(1, d_model, device=device))[0]
    return factors.float()


@torch.inference_mode()
def logits(
    lm: LanguageModel,
    W_dec: Tensor,
    count: int,
    progress: Callable[[int, int], None],
    *,
    block_bytes: int = BLOCK_BYTES,
    vocabulary_block: int = VOCABULARY_BLOCK,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The token ids whose logits each latent raises and lowers most.

    W_dec goes through the final norm's weight and the unembedding. Logits are per unit of
    activation, before the norm's division by the residual's size and before a softcap: both are
    common to all tokens, and neither changes the order. Norms that centre (LayerNorm) centre the
    direction, too.

    Args:
        W_dec: (F, d).
        count: of each sign.
        progress: called with token ids done and V.
        block_bytes: of logits held at a time.
        vocabulary_block: token ids at a time.

    Returns:
        (logits, ids) of the largest in descending order, and of the smallest in ascending order;
            (F, count) each.
    """
    head = lm.causal.get_output_embeddings()
    norm = lm.final_norm
    device = head.weight.device
    directions = W_dec.to(device).float()
    if isinstance(norm, nn.LayerNorm):
        directions = directions - directions.mean(1, keepdim=True)
    directions = directions * gain(norm, directions.shape[1], device)

    none = directions.new_empty(len(directions), 0)
    raised = (none, torch.empty(none.shape, dtype=torch.int64))
    lowered = raised  # of the negative logits, until the end
    vocabulary = len(head.weight)
    for first in range(0, vocabulary, vocabulary_block):
        unembedding = head.weight[first : first + vocabulary_block].float()
        raised = _best(raised, directions, unembedding, first, count, block_bytes)
        lowered = _best(lowered, directions, -unembedding, first, count, block_bytes)
        progress(min(first + vocabulary_block, vocabulary), vocabulary)
    return (raised[0].cpu(), raised[1]), (-lowered[0].cpu(), lowered[1])


def _best(
    so_far: tuple[Tensor, Tensor],
    directions: Tensor,
    unembedding: Tensor,
    first: int,
    count: int,
    block_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The `count` largest of those so far and of the logits of token ids from `first` on."""
    step = max(1, block_bytes // (4 * len(unembedding)))
    values = []
    ids = []
    for start in range(0, len(directions), step):
        rows = slice(start, start + step)
        product = directions[rows] @ unembedding.T
        fresh = product.topk(min(count, product.shape[1]), dim=1)
        both = torch.cat([so_far[0][rows], fresh.values], 1)
        both_ids = torch.cat([so_far[1][rows], fresh.indices.cpu() + first], 1)
        chosen = both.topk(min(count, both.shape[1]), dim=1)
        values.append(chosen.values)
        ids.append(both_ids.gather(1, chosen.indices.cpu()))
    return torch.cat(values), torch.cat(ids)
