"""A decoder's directions beside other directions, and what they say to the language model's head.

Shapes: F latents, G other directions, d d_model, V vocabulary, K kept of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from residual_saes.analyze.parts import Arrays, Parts
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress
from residual_saes.harvest.model import LanguageModel
from residual_saes.train.sae import SAE

BLOCK_BYTES = 1 << 28  # of products held at a time
# Operations of a product at a time on a CPU: under a second of one core. A GPU does as many in a
# millisecond, and is bounded by BLOCK_BYTES.
BLOCK_OPERATIONS = 1 << 35
NEIGHBOURS = 10  # of each latent
_DRAWN_ROWS = 4096  # random directions that are float64 at a time
_PART = 8192  # latents whose neighbours are kept together: half a minute of a core
VOCABULARY_BLOCK = 16_384  # ids whose unembeddings are float32 at a time: 168 MB at d = 2560
VERSION = 1  # of the kept logits and neighbours: raise it when the same weights give other ones


def products(rows: Tensor, others: Tensor, block_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows @ others.T, each with its slice of `rows`; the next overwrites the one before.

    New blocks of 27 MB leave holes between what is kept of each: 4 GB in 160 of them.
    """
    step = block_bytes // (4 * len(others))
    if not others.is_cuda:
        step = min(step, BLOCK_OPERATIONS // (2 * others.numel()))
    step = max(1, min(step, len(rows)))
    buffer = rows.new_empty(step, len(others))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, torch.mm(rows[part], others.T, out=buffer[: part.stop - start])


def unit(directions: Tensor) -> Tensor:
    """(F, d) directions scaled to norm 1; zero ones stay."""
    norms: Tensor = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return directions / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def nearest(
    of: Tensor,
    among: Tensor,
    count: int,
    *,
    but: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The `count` rows of `among` (G, d) with the largest cosines to each row of `of` (F, d).

    Args:
        count: at most G, or G - 1 with `but`.
        but: row `but + i` of `among` is row i of `of`, and is not chosen for it.
        block_bytes: of cosines held at a time.

    Returns:
        cosines (F, count) in descending order, and the rows' numbers.
    """
    is_same = among is of
    of = unit(of)
    among = of if is_same else unit(among)  # one copy: 0.3 GB at 32,768 x 2,560
    values = []
    numbers = []
    progress = Progress(quiet_s=2.0)
    for part, cosines in products(of, among, block_bytes):
        done = part.start + (but or 0)
        total = len(of) if but is None else len(among)
        progress.show(f"cosines of {done:,} of {total:,} directions with {len(among):,}")
        if but is not None:
            rows = torch.arange(len(cosines), device=cosines.device)
            cosines[rows, rows + part.start + but] = -2.0
        largest = cosines.topk(count, dim=1)
        values.append(largest.values)
        numbers.append(largest.indices)
    progress.close()
    return torch.cat(values), torch.cat(numbers)


def neighbours(subject: Subject, *, by_encoder: bool = False) -> tuple[Tensor, Tensor]:
    """The latents with the largest cosines of decoder directions to each latent's own, kept.

    Args:
        by_encoder: of the directions that latents read along instead.

    Returns:
        cosines (F, NEIGHBOURS) in descending order, and the latents' numbers; fewer columns where
        there are fewer other latents.
    """
    W_dec = subject.sae.encoder if by_encoder else subject.scaled(subject.sae.W_dec)

    def make(first: int) -> Arrays:
        count = min(NEIGHBOURS, len(W_dec) - 1)
        cosines, ids = nearest(W_dec[first : first + _PART], W_dec, count, but=first)
        return {"cosines": cosines.cpu().numpy(), "ids": ids.cpu().numpy()}

    follows = {"version": VERSION, "device": W_dec.device.type}
    follows["W_dec"] = durable.digest(W_dec.cpu().contiguous().numpy().data)
    parts = subject.parts("neighbours", follows)
    found = [parts.of(first, partial(make, first)) for first in range(0, len(W_dec), _PART)]
    cosines = np.concatenate([part["cosines"] for part in found])
    ids = np.concatenate([part["ids"] for part in found])
    return torch.from_numpy(cosines), torch.from_numpy(ids)


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
            blocks = []
            for part, product in products(directions, unembedding, block_bytes):
                stop.check()
                progress.show(
                    f"logits of token ids {first:,} to {last:,} of {vocabulary:,}, "
                    f"{part.start:,} of {len(directions):,} latents"
                )
                blocks.append(_extremes(product, count, first))
            return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

        found.append(parts.of(number, make))
    progress.show(f"logits of {vocabulary:,} token ids", last=True)
    raised = _best(found, "raised", count, largest=True)
    return raised, _best(found, "lowered", count, largest=False)


def _extremes(product: Tensor, count: int, first: int) -> dict[str, NDArray[Any]]:
    """The `count` largest and smallest logits of (n, v), and their token ids, from `first` on."""
    extremes = {}
    for name, largest in (("raised", True), ("lowered", False)):
        chosen = product.topk(min(count, product.shape[1]), dim=1, largest=largest)
        extremes[name] = chosen.values.cpu().numpy()
        extremes[f"{name}_ids"] = chosen.indices.cpu().numpy() + first
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
