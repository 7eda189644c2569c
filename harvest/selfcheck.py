"""Checks at every start: documents stay apart, the truncated model agrees with the whole, stored
bits recur.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.errors import PipelineError, StoreError
from data.store import freed
from data.store.store import Store
from harvest.forward import compute_unit, forward, prepared, put, run, upload
from harvest.isolation import Inputs, Isolation, attention_mask, forward_inputs
from harvest.model import LanguageModel, final_norm
from harvest.site import tap

# bf16 keeps 8 bits: one rounding is 2^-9 relative, and truncation changes no kernel, so this is
# generous.
_ROUNDING = 2.0**-7
# A packed piece against the same piece alone: 3 % of bf16 noise was seen on random networks,
# ignored masks give > 30 %.
_SAME_PIECE = 0.15


def choose_isolation(lm: LanguageModel) -> Isolation:
    """Whether documents packed into a row stay apart in this architecture, found out by trying.

    Two pieces share a row. Packing is right if changing the first leaves the second's last
    residuals as they were (attention masked away adds exactly nothing), and if the second equals
    itself run alone, where positions start at 0. Linear attention fails the first; it is run as
    padded pieces.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(24, lm.max_context // 2)
    vocabulary = lm.vocabulary
    first, other, second = torch.randint(vocabulary, (3, 1, length), generator=generator)
    positions = torch.arange(length).repeat(2)[None]
    layer = len(lm.blocks) - 1

    def last(ids: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
        here = upload(Inputs(ids, at, None, None), lm.config.device)
        forward(lm, here, attention_mask(lm.decoder.config, here.positions))
        return taken[layer][:, -length:].float()

    with tap(lm.blocks, [layer]) as taken:
        beside_first = last(torch.cat([first, second], 1), positions)
        beside_other = last(torch.cat([other, second], 1), positions)
        alone = last(second, None)
    apart = bool(
        _distance(beside_first, beside_other) <= 1e-4
        and _distance(beside_first, alone) <= _SAME_PIECE
    )
    return "packed" if apart else "padded"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def truncate_checked_(lm: LanguageModel, passes: Sequence[Inputs], layers: Sequence[int]) -> None:
    """Truncate to the deepest of `layers`; stop unless it still gives what the whole model calls
    their outputs.

    The reference is transformers' own `output_hidden_states` of the untruncated model on the same
    batch, with masks of its own making; entry L + 1 is layer L's output, except the last, which has
    gone through the final norm.

    Raises:
        PipelineError: a layer's rows differ from the reference by more than bf16 rounding.
    """
    tokens = sum(one.tokens for one in passes)
    device = lm.config.device
    reference = {
        layer: torch.empty(tokens, lm.d_model, dtype=torch.bfloat16, device=device)
        for layer in layers
    }
    for one in passes:
        here = upload(one, device)
        states = forward(lm, here, output_hidden_states=True).hidden_states
        if len(states) != lm.n_layers + 1:
            raise PipelineError(
                f"the model gives {len(states)} hidden states for {lm.n_layers} layers: cannot check"
            )
        for layer in layers:
            put(states[layer + 1], here, reference[layer])
        # of all layers: 0.44 GB in E4B for 2 rows, and they must go before the next pass and the
        # truncation
        del states
    lm.truncate_(max(layers))
    harvested = run(lm, passes, layers)
    for layer in layers:
        rows = harvested[layer]
        if layer == lm.n_layers - 1:
            rows = final_norm(lm.decoder)(rows.to(getattr(torch, lm.config.dtype)))
        # Row by row: one attention sink at 1000 times the norm would hide every other row in a
        # common sum.
        norms = reference[layer].float().norm(dim=1)
        wrong = float(((rows.float() - reference[layer].float()).norm(dim=1) / norms).max())
        if not wrong <= _ROUNDING:
            raise PipelineError(
                f"self-check failed: layer {layer} as harvested differs from the whole model's hidden state by up to "
                f"{wrong:.2%} (allowed {_ROUNDING:.2%}); this version of transformers and this model do not agree"
            )


# the reference keeps the hidden states of all layers: 0.44 GB at 43 x 2 x 1,024 x 2,560 in bfloat16
_CHECKED_ROWS = 2


def check(store: Store, lm: LanguageModel, layers: Sequence[int]) -> None:
    """The self-check of every start, and on a store that has units the recomputation of one of
    them.
    """
    batch = slice(0, _CHECKED_ROWS)
    passes = forward_inputs(store.tokens(0)[batch], store.piece_starts(0)[batch], lm.isolation)
    truncate_checked_(lm, passes, layers)
    have = {layer: store.committed(layer) for layer in layers}
    some = np.flatnonzero(np.any(list(have.values()), axis=0))
    if found := freed.read(store.place):
        some = np.intersect1d(
            some, found.held_out
        )  # others may be freed while this one is recomputed
    if len(some):
        unit = int(some[0])
        require_same(store, lm, unit, [layer for layer in layers if have[layer][unit]])


def require_same(store: Store, lm: LanguageModel, unit: int, layers: Sequence[int]) -> None:
    """Recompute one committed unit; raise StoreError unless the store holds the very same bits."""
    for layer in layers:
        batch = store.batch_of(layer, unit)
        again = prepared(store, unit, compute_unit(store, lm, unit, [layer], batch))[layer]
        wrong = int((store.residuals(layer, unit) != again.stored).any(1).sum())
        if wrong:
            raise StoreError(
                f"unit {unit} of layer {layer} in {store.name} differs in {wrong} of {len(again.stored)} rows when "
                "recomputed here; go on where the store was begun, or harvest into another store="
            )
