"""A decoder's directions beside other directions, and what they say to the language model's head.

Shapes: F latents, G other directions, d d_model, V vocabulary, K kept of each.

Each part is kept on the host as it is made, so it waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from residual_saes.analyze.latents.nearest import BLOCK_BYTES, largest, products, unit, way
from residual_saes.analyze.parts import Arrays, Parts
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress
from residual_saes.harvest.model import LanguageModel
from residual_saes.train.sae import SAE

_DRAWN_ROWS = 4096  # random directions that are float64 at a time
VOCABULARY_BLOCK = 16_384  # ids whose unembeddings are float32 at a time: 168 MB at d = 2560
VERSION = 2  # of the kept logits: raise it when the same weights give other ones


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


def to_head(lm: LanguageModel, W_dec: Tensor) -> Tensor:
    """(F, d) float32 directions as the unembedding meets them: behind the final norm's weight."""
    norm = lm.final_norm
    directions = W_dec.to(lm.causal.get_output_embeddings().weight.device).float()
    if isinstance(norm, nn.LayerNorm):
        directions = directions - directions.mean(1, keepdim=True)
    return directions * gain(norm, directions.shape[1], directions.device)


@torch.inference_mode()
def logits(
    lm: LanguageModel,
    W_dec: Tensor,
    count: int,
    stop: StopRequest,
    parts: Parts,
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
        parts: where the best of each block of token ids are kept.
        block_bytes: of logits held at a time.
        vocabulary_block: token ids at a time.

    Returns:
        (logits, ids) of the largest in descending order, and of the smallest in ascending order;
            (F, count) each.
    """
    head = lm.causal.get_output_embeddings()
    directions = to_head(lm, W_dec)
    vocabulary = len(head.weight)
    progress = Progress()
    found: list[Arrays] = []
    for number, first in enumerate(range(0, vocabulary, vocabulary_block)):
        last = min(first + vocabulary_block, vocabulary)

        def make(first: int = first, last: int = last) -> Arrays:
            unembedding = head.weight[first:last].float()
            norm = float(torch.linalg.vector_norm(unembedding, dim=1).amax())  # Device sync.
            blocks = []
            for part, product in products(
                directions, unembedding, block_bytes, by=way(unembedding)
            ):
                stop.check()
                progress.show(
                    f"logits of token ids {first:,} to {last:,} of {vocabulary:,}, "
                    f"{part.start:,} of {len(directions):,} latents"
                )
                best = min(count, len(unembedding))
                rows = directions[part]
                raised = largest(rows, unembedding, product, best, among_norm=norm)
                lowered = largest(-rows, unembedding, product.neg_(), best, among_norm=norm)
                blocks.append(_kept(raised, lowered, first))
            return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

        found.append(parts.of(number, make))
    progress.show(f"logits of {vocabulary:,} token ids", last=True)
    raised = _best(found, "raised", count, largest=True)
    return raised, _best(found, "lowered", count, largest=False)


def _kept(
    raised: tuple[Tensor, Tensor], lowered: tuple[Tensor, Tensor], first: int
) -> dict[str, NDArray[Any]]:
    """The largest logits and the largest of their negatives, and their token ids, from `first`."""
    extremes = {}
    for name, (values, ids), sign in (("raised", raised, 1), ("lowered", lowered, -1)):
        extremes[name] = sign * values.cpu().numpy()
        extremes[f"{name}_ids"] = ids.cpu().numpy() + first
    return extremes


def _best(
    found: Sequence[Arrays], name: str, count: int, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """The `count` largest or smallest logits of all blocks, and their token ids; (F, count)."""
    values = torch.from_numpy(np.concatenate([part[name] for part in found], axis=1))
    ids = torch.from_numpy(np.concatenate([part[f"{name}_ids"] for part in found], axis=1))
    chosen = values.topk(min(count, values.shape[1]), dim=1, largest=largest)
    return chosen.values, ids.gather(1, chosen.indices)


# -- directions by chance --------------------------------------------------------------------------


def random_dictionary(sae: SAE, seed: int) -> SAE:
    """Random directions of norm 1 with the second moments of another decoder's, about 0.

    The encoder is the decoder transposed, without bias; of a transcoder, directions with the second
    moments of its encoder's.
    """
    W_dec = _drawn_as(sae.W_dec, seed)
    encoder = W_dec if sae.b_in is None else _drawn_as(sae.encoder, seed)
    b_enc = torch.zeros_like(sae.b_enc)
    return SAE(encoder, W_dec, b_enc, sae.b_dec, sae.k, b_in=sae.b_in)


def _drawn_as(like: Tensor, seed: int) -> Tensor:
    """Random directions (F, d) of norm 1 with the second moments of others."""
    W = like.cpu().double()
    values, vectors = torch.linalg.eigh(W.T @ W / len(W))
    del W
    root = values.clamp_min(0).sqrt()
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    # In blocks: float64 of all would be three times the dictionary.
    for rows in torch.split(drawn, _DRAWN_ROWS):
        rows.copy_(unit(rows.double() * root @ vectors.T))
    return drawn.to(like.device)
