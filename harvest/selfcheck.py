"""Checks at every start: documents stay apart, truncation changes nothing, stored bits recur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.errors import PipelineError, StoreError
from data.store import retention
from data.store.store import Store
from harvest.forward import (
    batch_residuals,
    empty_residuals,
    forward,
    prepared,
    scatter,
    unit_residuals,
    upload,
)
from harvest.isolation import Inputs, Isolation, attention_mask, forward_inputs
from harvest.model import LanguageModel, final_norm
from harvest.site import tap

# bf16 keeps 8 bits: one rounding is 2^-9 relative. Truncation changes no kernel, so 2^-7 is
# generous.
_ROUNDING = 2.0**-7
# A packed piece against the same piece alone. Random networks showed 3 % of bf16 noise; ignored
# masks give more than 30 %.
_SAME_PIECE = 0.15
# The same piece beside two different ones. Masked attention adds exactly 0; other kernels may
# round the last bits.
_SAME_NEIGHBOUR = 1e-4
# The reference keeps hidden states of all layers: 0.44 GB at 43 x 2 x 1,024 x 2,560 in bfloat16.
_CHECKED_ROWS = 2


def check(store: Store, lm: LanguageModel, layers: Sequence[int]) -> None:
    """Truncate the model, checked against the whole one, and recompute one committed unit if any.

    Raises:
        PipelineError: the truncated model gives other residuals than the whole one.
        StoreError: the recomputed unit has other bits than the stored one.
    """
    rows = slice(0, _CHECKED_ROWS)
    passes = forward_inputs(store.tokens(0)[rows], store.piece_starts(0)[rows], lm.isolation)
    truncate_checked_(lm, passes, layers)
    have = {layer: store.committed(layer) for layer in layers}
    some = np.flatnonzero(np.any(list(have.values()), axis=0)).tolist()
    kept = retention.read(store.place)  # others may be freed while this one is recomputed
    unit = next((unit for unit in some if kept.stays(unit)), None)
    if unit is not None:
        require_same(store, lm, unit, [layer for layer in layers if have[layer][unit]])


def choose_isolation(lm: LanguageModel) -> Isolation:
    """How documents in one packed row stay apart in this architecture, found by trying.

    Two pieces share a row. `packed` is right if changing the first leaves the second's last
    residuals as they were (masked attention adds exactly 0), and if the second equals itself run
    alone, where positions start at 0. Linear attention fails the first test and gets `padded`.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(24, lm.max_context // 2)
    first, other, second = torch.randint(lm.vocabulary, (3, 1, length), generator=generator)
    positions = torch.arange(length).repeat(2)[None]
    layer = len(lm.blocks) - 1

    def last_piece(ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        inputs = upload(Inputs(ids, positions, None, None), lm.config.device)
        with tap(lm.blocks, [layer]) as taken:
            forward(lm, inputs, attention_mask(lm.decoder.config, inputs.positions))
        return taken[layer][:, -length:].float()

    beside_first = last_piece(torch.cat([first, second], 1), positions)
    beside_other = last_piece(torch.cat([other, second], 1), positions)
    alone = last_piece(second, None)
    unmoved = _distance(beside_first, beside_other) <= _SAME_NEIGHBOUR
    same = _distance(beside_first, alone) <= _SAME_PIECE
    return "packed" if unmoved and same else "padded"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def truncate_checked_(lm: LanguageModel, passes: Sequence[Inputs], layers: Sequence[int]) -> None:
    """Truncate to the deepest of `layers`, and compare with the whole model's residuals.

    The reference is transformers' own `output_hidden_states` of the untruncated model on the same
    batch, with masks of its own making.

    Raises:
        PipelineError: a layer's rows differ from the reference by more than bf16 rounding.
    """
    reference = _reference(lm, passes, layers)
    lm.truncate_(max(layers))
    harvested = batch_residuals(lm, passes, layers)
    for layer in layers:
        rows = harvested[layer]
        if layer == lm.n_layers - 1:  # the reference has gone through the final norm
            rows = final_norm(lm.decoder)(rows.to(getattr(torch, lm.config.dtype)))
        # Row by row: in a common sum, one attention sink at 1000 times the norm hides all others.
        expected = reference[layer].float()
        errors = (rows.float() - expected).norm(dim=1) / expected.norm(dim=1)
        worst = float(errors.max())
        if not worst <= _ROUNDING:
            raise PipelineError(
                f"self-check failed: layer {layer} as harvested differs from the whole model's "
                f"hidden state by up to {worst:.2%} (allowed {_ROUNDING:.2%}); this version of "
                "transformers and this model do not agree"
            )


def _reference(
    lm: LanguageModel, passes: Sequence[Inputs], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """What transformers reports of `layers` in the whole model: (B*T, d) bfloat16 each."""
    reference = empty_residuals(lm, sum(inputs.tokens for inputs in passes), layers)
    for inputs in passes:
        here = upload(inputs, lm.config.device)
        states = forward(lm, here, output_hidden_states=True).hidden_states
        if len(states) != lm.n_layers + 1:
            raise PipelineError(
                f"the model gives {len(states)} hidden states for {lm.n_layers} layers: cannot "
                "check"
            )
        for layer in layers:
            scatter(lm.site.reported(states, layer), here, reference[layer])
        # 0.44 GB in E4B for 2 rows: must be free before the next pass and the truncation.
        del states
    return reference


def require_same(store: Store, lm: LanguageModel, unit: int, layers: Sequence[int]) -> None:
    """Recompute one committed unit.

    Raises:
        StoreError: the store holds other bits.
    """
    for layer in layers:
        residuals = unit_residuals(store, lm, unit, [layer], store.batch_of(layer, unit))
        again = prepared(store, unit, residuals)[layer]
        wrong = int((store.residuals(layer, unit) != again.stored).any(1).sum())
        if wrong:
            raise StoreError(
                f"unit {unit} of layer {layer} in {store.name} differs in {wrong} of "
                f"{len(again.stored)} rows when recomputed here; go on where the store was begun, "
                "or harvest into another store="
            )
