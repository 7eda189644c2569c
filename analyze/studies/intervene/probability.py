"""How much latents change the log-probability of answers that are given: first order, and measured.

Shapes: b texts of a batch, t positions, d d_model, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from residual_saes.analyze.changes.intervention import Intervention, columns_of
from residual_saes.analyze.language_model import (
    Prediction,
    batch_tokens,
    batches,
    edited,
    read_by_head,
    residuals,
)
from residual_saes.analyze.questions.problems import flexible, strict
from residual_saes.analyze.stats import Floats
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import note
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.tokens import Tokenizer
from residual_saes.train.kernels import latent_sums
from residual_saes.train.sae import SAE


class Text(NamedTuple):
    """An answer behind its prompt, as ids, and which of its tokens are asked about."""

    prompt: list[int]
    ids: list[int]
    first: int
    last: int  # exclusive

    @property
    def sequence(self) -> list[int]:
        return self.prompt + self.ids

    @property
    def predicting(self) -> slice:
        """The positions of the sequence that predict the tokens that are asked about."""
        start = len(self.prompt) - 1
        return slice(start + self.first, start + self.last)


def whole(prompt: list[int], ids: list[int]) -> Text:
    """A text of which all tokens of the answer are asked about."""
    return Text(prompt, ids, 0, len(ids))


def of_number(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> Text | None:
    """A text of which the number that graders find is asked about, where it is first written.

    Behind `####` it is as a rule a copy, whose probability nothing moves. The number is the one
    behind `####`, or else the last one; None: there is none.
    """
    texts = [tokenizer.inner.decode(ids[:end]) for end in range(len(ids) + 1)]
    number = strict(texts[-1]) or flexible(texts[-1])
    if not number:
        return None
    # The last number of each beginning of the answer: `6` may go on as `62`.
    latest = [flexible(text) or "" for text in texts] + [number]
    last = next(end for end in range(len(texts)) if latest[end : end + 2] == [number] * 2)
    first = last - 1
    while first and latest[first] and number.startswith(latest[first]):
        first -= 1
    return Text(prompt, ids, first, last)


def log_probabilities(
    lm: LanguageModel,
    texts: Sequence[Text],
    layer: int,
    change: Intervention | None,
    stop: StopRequest,
) -> Floats:
    """(texts,) ln p of the tokens that are asked about, summed, in nats.

    Args:
        change: None: nothing is changed.
    """
    found = np.empty(len(texts))
    for numbers, padded in batches([text.sequence for text in texts], batch_tokens(lm)):
        stop.check()
        ids = padded.to(lm.config.device)
        batch = [texts[number] for number in numbers]
        hook = edited(lm.blocks[layer], _edit(lm, change, batch, ids)) if change else nullcontext()
        with torch.inference_mode(), hook:
            final = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
            found[numbers] = _log_p(lm, final, batch, ids).cpu().numpy()  # device sync
    return found


class FirstOrder(NamedTuple):
    """Derivatives of the texts' log-probabilities, summed over texts and changed positions.

        ablating   (F,) - sum f_i(h) (dL/dh . W_dec_i), what ablating each latent would add
        adding     (F,) sum (dL/dh . W_dec_i), of one unit of activation

    L is ln p of the tokens that are asked about, h the layer's output. The product of gradient and
    activation estimates an ablation's effect to first order (attribution patching: Nanda, 2023;
    of SAE latents: Marks et al., arXiv 2403.19647, section 3.1).
    """

    ablating: Floats
    adding: Floats


def first_order(
    lm: LanguageModel,
    sae: SAE,
    layer: int,
    texts: Sequence[Text],
    positions: str,
    stop: StopRequest,
) -> FirstOrder:
    """By one forward and one backward pass over the texts."""
    ablating = torch.zeros(sae.d_sae, dtype=torch.float64)
    adding = torch.zeros(sae.d_sae, dtype=torch.float64)
    leaves: list[Tensor] = []

    def leaf(states: Tensor) -> Tensor:
        leaves.append(states.detach().requires_grad_())
        return leaves[-1]

    for numbers, padded in batches([text.sequence for text in texts], batch_tokens(lm)):
        stop.check()
        ids = padded.to(lm.config.device)
        batch = [texts[number] for number in numbers]
        with torch.enable_grad(), edited(lm.blocks[layer], leaf):
            final = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
            total = _log_p(lm, final, batch, ids).sum()
            states = leaves.pop()
            (gradient,) = torch.autograd.grad(total, states)
        chosen = _columns(positions, batch, ids)[..., 0]
        slopes = gradient[chosen].to(sae.W_dec) @ sae.W_dec.T
        kept = sae.encode(states.detach()[chosen].to(sae.W_dec))
        products = kept.values * slopes[kept.rows, kept.indices]
        ablating -= latent_sums(products, kept.indices, sae.d_sae).double().cpu()
        adding += slopes.double().sum(0).cpu()
    return FirstOrder(ablating.numpy(), adding.numpy())


class Firing(NamedTuple):
    """How each latent fires in some texts, BOS left out."""

    density: Floats  # (F,) share of the tokens
    mean: Floats  # (F,) activation where it fires; 0 of a silent one


def firing(
    lm: LanguageModel, sae: SAE, layer: int, sequences: Sequence[list[int]], stop: StopRequest
) -> Firing:
    """By one forward pass over sequences of ids that begin with BOS."""
    counts = torch.zeros(sae.d_sae, dtype=torch.float64)
    sums = torch.zeros(sae.d_sae, dtype=torch.float64)
    tokens = 0
    for done, (_, states) in enumerate(residuals(lm, sequences, [layer])):
        stop.check()
        note(f"{done}/{len(sequences)} answers encoded")
        kept = sae.encode(states[layer][1:].to(sae.W_dec))
        fires = (kept.values > 0).to(kept.values)
        counts += latent_sums(fires, kept.indices, sae.d_sae).double().cpu()
        sums += latent_sums(kept.values, kept.indices, sae.d_sae).double().cpu()
        tokens += len(states[layer]) - 1
    return Firing((counts / tokens).numpy(), (sums / counts.clamp_min(1)).numpy())


def _edit(
    lm: LanguageModel, change: Intervention, batch: Sequence[Text], ids: Tensor
) -> Callable[[Tensor], Tensor]:
    delta = change.delta(lm)
    chosen = _columns(change.positions, batch, ids)
    return lambda states: torch.where(chosen, states + delta(states), states)


def _columns(positions: str, batch: Sequence[Text], ids: Tensor) -> Tensor:
    """(b, t, 1) bool, see `columns_of`."""
    return columns_of(positions, [(text.prompt, text.ids) for text in batch], ids)[..., None]


def _log_p(lm: LanguageModel, final: Tensor, batch: Sequence[Text], ids: Tensor) -> Tensor:
    """(b,) of final states (b, t, d) behind the norm."""
    sums = []
    for row, text in enumerate(batch):
        positions = text.predicting
        predicted = Prediction.of_logits(read_by_head(lm, final[row, positions], normed=True))
        targets = ids[row, positions.start + 1 : positions.stop + 1]
        sums.append(-predicted.cross_entropy(targets).double().sum())
    return torch.stack(sums)
