"""The forward pass from packed tokens to residuals.

Shapes: B rows, T context, d d_model; b rows and t positions of one pass; n rows of a unit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from residual_saes.data.errors import PipelineError, StopRequest
from residual_saes.data.site import HookPoint
from residual_saes.data.store.store import Store
from residual_saes.data.store.unit import Prepared, prepare
from residual_saes.harvest.attention import SDPA, PackedRows
from residual_saes.harvest.isolation import Inputs, Mask, attention_mask, forward_inputs
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import DeepestReached, tap


def unit_residuals(
    store: Store,
    lm: LanguageModel,
    unit: int,
    points: Sequence[HookPoint],
    batch: int,
    stop: StopRequest | None = None,
) -> dict[HookPoint, torch.Tensor]:
    """Rows of one unit in spine order: (n, d) bfloat16 a point, on the model's device.

    A pure function of the spine.

    Args:
        batch: packed rows per forward pass.
        stop: checked between batches.
    """
    tokens = store.tokens(unit)
    starts = store.piece_starts(unit)
    residuals = empty_residuals(lm, tokens.size, points)
    for row in range(0, len(tokens), batch):
        if stop is not None:
            stop.check()
        part = slice(row, row + batch)
        passes = forward_inputs(tokens[part], starts[part], lm.isolation)
        end = row + len(tokens[part])
        rows = slice(row * store.context, end * store.context)
        batch_residuals(lm, passes, points, {point: residuals[point][rows] for point in points})
    return residuals


def batch_residuals(
    lm: LanguageModel,
    passes: Sequence[Inputs],
    points: Sequence[HookPoint],
    out: dict[HookPoint, torch.Tensor] | None = None,
) -> dict[HookPoint, torch.Tensor]:
    """Rows of a batch: (B*T, d) bfloat16 a point, in the order of its tokens.

    Nothing here waits for the device, except transformers' own mask code in families that
    `attention_mask` does not know. On an accelerator the rows are complete only after what the
    caller queues behind them, or a synchronisation.

    Args:
        out: where to write, (B*T, d) a point on the model's device, e.g. slices of a unit; None:
            new tensors.
    """
    if out is None:
        out = empty_residuals(lm, sum(inputs.tokens for inputs in passes), points)
    with tap(lm, points, ends=True) as taken:
        for inputs in passes:
            here = upload(inputs, lm.config.device)
            mask = None
            if lm.isolation != "alone":
                mask = attention_mask(lm.decoder.config, here.positions)
            forward(lm, here, mask)
            for point in points:
                scatter(taken.pop(point), here, out[point])
    return out


def empty_residuals(
    lm: LanguageModel, rows: int, points: Sequence[HookPoint]
) -> dict[HookPoint, torch.Tensor]:
    """Memory for (rows, d) bfloat16 a point, on the model's device."""
    shape = (rows, lm.d_model)
    device = lm.config.device
    return {point: torch.empty(shape, dtype=torch.bfloat16, device=device) for point in points}


def upload(inputs: Inputs, device: str) -> Inputs:
    """The pass's tensors on the device; from pinned memory, so that copies queue like kernels."""

    def moved(tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        if not device.startswith("cuda"):
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)

    return Inputs(*map(moved, inputs))


def forward(lm: LanguageModel, inputs: Inputs, mask: Mask = None) -> None:
    """Run a pass on its device; a tap may end it.

    Without `mask`, transformers finds pieces by their positions. A decoder is told only what its
    forward takes: some take no positions (Bloom, Mamba).
    """
    told = {"position_ids": inputs.positions, "attention_mask": mask}
    taken = inspect.signature(lm.decoder.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    for name, value in told.items():
        if name in taken and value is not None:
            options[name] = value
    if lm.attention != SDPA:
        assert inputs.ends is not None and inputs.positions is not None
        options["packed_rows"] = PackedRows(lm.attention, inputs.ends, inputs.positions)
    with torch.inference_mode(), suppress(DeepestReached):
        lm.decoder(input_ids=inputs.ids, **options)  # device sync without `mask`, in most families


def scatter(states: torch.Tensor, inputs: Inputs, out: torch.Tensor) -> None:
    """Write a pass's (b, t, d) states, rounded to the type of `out`, to their rows of (B*T, d).

    Raises:
        PipelineError: the states have another shape.
    """
    shape = (*inputs.ids.shape, out.shape[1])
    if tuple(states.shape) != shape:
        raise PipelineError(
            f"a layer gave states of shape {tuple(states.shape)} where {shape} was expected"
        )
    rows = states.reshape(-1, shape[-1])
    if inputs.inside is None or inputs.into is None:
        out.copy_(rows, non_blocking=True)
    else:
        out.index_copy_(0, inputs.into, rows.index_select(0, inputs.inside).to(out.dtype))


def prepared(
    store: Store, unit: int, residuals: Mapping[HookPoint, torch.Tensor]
) -> dict[HookPoint, Prepared]:
    """A unit's rows in spine order, permuted and described as they are committed."""
    permutation = store.permutation(unit)
    starts = store.piece_starts(unit).ravel()
    points: dict[HookPoint, Prepared] = {}
    for point, rows in residuals.items():
        points[point] = prepare(rows, permutation, starts, store.arrays.rows(point))
    return points
