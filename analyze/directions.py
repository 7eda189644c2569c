"""A decoder's directions beside other directions, and what they say to the language model's head.

Shapes: F latents, d d_model, V vocabulary, K kept of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harvest.model import LanguageModel, final_norm

_BLOCK_BYTES = 1 << 28  # of products held at a time
_VOCABULARY_BLOCK = 16_384  # token ids whose unembeddings are float32 at a time: 168 MB at d = 2560


def unit(directions: Tensor) -> Tensor:
    """(F, d) directions scaled to norm 1; zero ones stay."""
    norms: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return directions / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def nearest(of: Tensor, among: Tensor, count: int, *, itself: bool = True) -> tuple[Tensor, Tensor]:
    """The `count` rows of `among` (G, d) with the largest cosines to each row of `of` (F, d).

    Args:
        count: at most G, or G - 1 without itself.
        itself: whether row i of `among` may be chosen for row i of `of`.

    Returns:
        cosines (F, count) in descending order, and the rows' numbers.
    """
    of, among = (
        (unit(of),) * 2 if among is of else (unit(of), unit(among))
    )  # one copy: 0.3 GB at 32,768 x 2,560
    step = max(1, _BLOCK_BYTES // (4 * len(among)))
    found = []
    for at in range(0, len(of), step):
        cosines = of[at : at + step] @ among.T
        if not itself:
            rows = torch.arange(len(cosines), device=cosines.device)
            cosines[rows, rows + at] = -2.0
        found.append(cosines.topk(count, dim=1))
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def gain(norm: nn.Module, d_model: int, device: torch.device | str) -> Tensor:
    """(d,) what a norm multiplies each dimension by, whichever way its family writes its weight.

    Gemma 3 multiplies by 1 + weight, others by weight. So it is read off: a vector of ones has root
    mean square 1, and an RMS norm returns just its factors (to its epsilon).
    """
    if isinstance(norm, nn.LayerNorm):
        assert isinstance(norm.weight, Tensor)
        return norm.weight.detach().float().to(device)
    with torch.inference_mode():
        found: Tensor = norm(torch.ones(1, d_model, device=device))[0]
    return found.float()


@torch.inference_mode()
def logits(
    lm: LanguageModel, W_dec: Tensor, count: int, progress: Callable[[int, int], None]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The token ids whose logits a latent raises and lowers most: W_dec through final norm weight
    and unembedding.

    Per unit of activation, before the norm's division by the residual's size and before a softcap:
    both are common to all tokens, and neither changes the order. Norms that centre (LayerNorm)
    centre the direction, too.

    Args:
        count: of each sign.
        progress: called with token ids done and V.

    Returns:
        (logits, ids) of the largest in descending order and of the smallest in ascending order; (F,
            count) each.
    """
    head, norm = lm.causal.get_output_embeddings(), final_norm(lm.decoder)
    device = head.weight.device
    directions = W_dec.to(device).float()
    if isinstance(norm, nn.LayerNorm):
        directions = directions - directions.mean(1, keepdim=True)
    directions = directions * gain(norm, directions.shape[1], device)
    best = [
        (
            directions.new_empty(len(directions), 0),
            torch.empty(len(directions), 0, dtype=torch.int64),
        )
        for _ in "+-"
    ]
    for at in range(0, len(head.weight), _VOCABULARY_BLOCK):
        unembedding = head.weight[at : at + _VOCABULARY_BLOCK].float()
        for which, sign in enumerate((1.0, -1.0)):
            best[which] = _best(best[which], directions, sign * unembedding, at, count)
        progress(min(at + _VOCABULARY_BLOCK, len(head.weight)), len(head.weight))
    (raised, these), (lowered, those) = best
    return (raised.cpu(), these), (-lowered.cpu(), those)


def _best(
    so_far: tuple[Tensor, Tensor], directions: Tensor, unembedding: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """The largest of those so far and of the products with token ids from `first` on."""
    step = max(1, _BLOCK_BYTES // (4 * len(unembedding)))
    values, ids = [], []
    for at in range(0, len(directions), step):
        product = directions[at : at + step] @ unembedding.T
        found = product.topk(min(count, product.shape[1]), dim=1)
        both = torch.cat([so_far[0][at : at + step], found.values], 1)
        which = torch.cat([so_far[1][at : at + step], found.indices.cpu() + first], 1)
        chosen = both.topk(min(count, both.shape[1]), dim=1)
        values.append(chosen.values)
        ids.append(which.gather(1, chosen.indices.cpu()))
    return torch.cat(values), torch.cat(ids)
