"""The forward pass from packed tokens to residuals.

Shapes: B rows, T context, d d_model; b rows and t positions of one pass; n rows of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data.errors import PipelineError, StopRequest
from data.store.store import Store
from data.store.unit import Prepared, prepare
from harvest.isolation import Inputs, Mask, attention_mask, forward_inputs
from harvest.model import LanguageModel
from harvest.site import tap


def run(
    lm: LanguageModel,
    passes: Sequence[Inputs],
    layers: Sequence[int],
    out: dict[int, torch.Tensor] | None = None,
) -> dict[int, torch.Tensor]:
    """Residuals of `layers` for a batch: (B*T, d) bfloat16 each, in the order of its tokens.

    Nothing here waits for the device, except transformers itself in families that `attention_mask`
    does not know, so on an accelerator the rows are there only after what the caller queues behind
    them, or a synchronisation.

    Args:
        out: where to write, (B*T, d) a layer on the model's device, e.g. slices of a unit; None:
            new ones.
    """
    total = sum(one.tokens for one in passes)
    if out is None:
        out = {
            layer: torch.empty(total, lm.d_model, dtype=torch.bfloat16, device=lm.config.device)
            for layer in layers
        }
    with tap(lm.blocks, layers) as taken:
        for one in passes:
            here = upload(one, lm.config.device)
            positions = here.positions
            forward(lm, here, attention_mask(lm.decoder.config, positions))
            for layer in layers:
                put(taken.pop(layer), here, out[layer])
    return out


def upload(one: Inputs, device: str) -> Inputs:
    """The pass's tensors on the device; from pinned memory, so that the copies are queued like
    kernels.
    """

    def moved(part: torch.Tensor | None) -> Any:
        if part is None or not device.startswith("cuda"):
            return part if part is None else part.to(device)
        return part.pin_memory().to(device, non_blocking=True)

    return Inputs(*map(moved, one))


def forward(lm: LanguageModel, one: Inputs, mask: Mask = None, **options: Any) -> Any:
    """The decoder on a pass that is on its device. Without `mask`, transformers finds pieces by
    their positions.
    """
    with torch.inference_mode():
        return lm.decoder(
            input_ids=one.ids,
            position_ids=one.positions,
            attention_mask=mask,
            use_cache=False,
            **options,
        )


def put(states: torch.Tensor, one: Inputs, out: torch.Tensor) -> None:
    """Put a pass's (b, t, d) states, rounded to the type of `out`, where their tokens belong in
    (B*T, d).
    """
    shape = (*one.ids.shape, out.shape[1])
    if tuple(states.shape) != shape:
        raise PipelineError(
            f"a layer gave states of shape {tuple(states.shape)} where {shape} was expected"
        )
    rows = states.reshape(-1, shape[-1])
    if one.inside is None or one.into is None:
        out.copy_(rows, non_blocking=True)
    else:
        out.index_copy_(0, one.into, rows.index_select(0, one.inside).to(out.dtype))


def compute_unit(
    store: Store,
    lm: LanguageModel,
    unit: int,
    layers: Sequence[int],
    batch: int,
    stop: StopRequest | None = None,
) -> dict[int, torch.Tensor]:
    """Residuals of one unit in spine order: (n, d) bfloat16 on the model's device. A pure function
    of the spine.

    Args:
        batch: packed rows per forward pass.
        stop: asked between batches.
    """
    tokens, starts = store.tokens(unit), store.piece_starts(unit)
    device = lm.config.device
    out = {
        layer: torch.empty(tokens.size, lm.d_model, dtype=torch.bfloat16, device=device)
        for layer in layers
    }
    for at in range(0, len(tokens), batch):
        if stop is not None:
            stop.check()
        part = slice(at, at + batch)
        passes = forward_inputs(tokens[part], starts[part], lm.isolation)
        rows = slice(at * store.context, (at + len(tokens[part])) * store.context)
        run(lm, passes, layers, {layer: out[layer][rows] for layer in layers})
    return out


def prepared(store: Store, unit: int, rows: Mapping[int, torch.Tensor]) -> dict[int, Prepared]:
    """Rows of one unit, in spine order, as they are committed."""
    permutation, starts = store.permutation(unit), store.piece_starts(unit).ravel()
    return {
        layer: prepare(one, permutation, starts, store.array(f"layer_{layer}"))
        for layer, one in rows.items()
    }
