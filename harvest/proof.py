"""Proof of the sites inside a layer, at every start: by what they must add up to.

In float32 (harvest/precise.py), on a few rows of random tokens, with s what the layer multiplies
its stream by at the end and `others` what it adds beside attention and the MLP, by its own modules:

    resid_pre + attn_out = resid_mid
    (resid_mid + mlp_out + others) s = resid_post
    (resid_pre + attn_out + mlp_out + others) s = resid_post      where both read the same stream

mlp_in is read by a matrix of weights, is the stream behind a norm channel by channel, and makes
mlp_out: rows put in its place, in another order, give their mlp_out. That resid_pre is what the
layer below gives is in harvest/selfcheck.py. What is wrong in an anatomy, whatever made it, fails
here; a site that fails is refused for its layer.
It waits for the device at every comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from residual_saes.data.site import (
    ATTN_OUT,
    MLP_IN,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    HookPoint,
)
from residual_saes.harvest.anatomy import INSIDE, LayerAnatomy
from residual_saes.harvest.dissection import is_reversed, reversed_first
from residual_saes.harvest.flow import matrices
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import DeepestReached, edited_at, taking, tap

_TOKENS = 64  # of each of the two rows that are run
# Largest error of a sum, relative to the norm of what is added. In every second family of
# docs/families.md right ones were below 2^-23 of the stream's norm.
_SAME_SUM = 2.0**-10
_ROUNDINGS = 8  # of the stream's own type, on top of that
# Least correlation of a channel of mlp_in with the stream's normed channel: right ones are 1 but
# for rounding.
_CORRELATED = 1 - 2.0**-10


def prove(lm: LanguageModel, points: Sequence[HookPoint], ids: torch.Tensor) -> None:
    """Prove the sites of those layers of which a site inside is wanted.

    Args:
        ids: (2, T) tokens.

    Raises:
        SettingError: a layer has no such site, or it is not what it should be.
    """
    inside = [point for point in points if point.site in INSIDE]
    if not inside:
        return
    lm.anatomy.require(inside)
    layers = sorted({point.layer for point in inside})
    ids = ids[:, :_TOKENS].to(lm.config.device)
    found = _values(lm, layers, ids)
    unmade = _unmade(lm, layers, ids)
    for point in inside:
        wrong = _wrong(lm.anatomy.layers[point.layer], found[point.layer])
        if point.layer in unmade:
            reason = "rows put where its MLP reads do not give their mlp_out"
            wrong |= {MLP_IN: reason, MLP_OUT: reason}
        if point.site in wrong:
            raise lm.anatomy.refusal(point, wrong[point.site], tuple(wrong))


@dataclass
class _Layer:
    """What a layer gave in one pass."""

    sites: dict[str, torch.Tensor] = field(default_factory=dict)  # (b, t, d) each
    others: list[torch.Tensor] = field(default_factory=list)  # (b, t, d) what else it adds
    read: list[torch.Tensor] = field(default_factory=list)  # what modules with a matrix read


def _values(lm: LanguageModel, layers: Sequence[int], ids: torch.Tensor) -> dict[int, _Layer]:
    """All sites of the layers, what else they add, and what their matrices read."""
    found = {layer: _Layer() for layer in layers}
    points: list[HookPoint] = []
    handles: list[Any] = []
    for layer, its in found.items():
        points += [HookPoint(layer, site) for site in lm.anatomy.sites(layer)]
        if others := lm.anatomy.layers[layer].others:
            handles += taking(lm.blocks[layer], others, its.others.append)
        for module in lm.blocks[layer].modules():
            if matrices(module):
                handles.append(module.register_forward_pre_hook(_reading(its), with_kwargs=True))
    try:
        with tap(lm, points, ends=True) as taken:
            _run(lm, ids)
    finally:
        for handle in handles:
            handle.remove()
    for point, states in taken.items():
        found[point.layer].sites[point.site] = states
    return found


def _reading(layer: _Layer) -> Any:
    """A hook that keeps what a module reads."""

    def on_input(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        told = [*inputs, *options.values()]
        layer.read += [value for value in told if isinstance(value, torch.Tensor)]

    return on_input


def _run(lm: LanguageModel, ids: torch.Tensor) -> None:
    with torch.inference_mode(), suppress(DeepestReached):
        lm.decoder(input_ids=ids, use_cache=False)


def _unmade(lm: LanguageModel, layers: Sequence[int], ids: torch.Tensor) -> set[int]:
    """The layers whose mlp_out does not follow rows that are put in the place of mlp_in."""
    both = [layer for layer in layers if {MLP_IN, MLP_OUT} <= set(lm.anatomy.sites(layer))]
    written = [HookPoint(layer, MLP_OUT) for layer in both]
    if not written:
        return set()
    with ExitStack() as edits:
        for layer in both:
            edits.enter_context(edited_at(lm, HookPoint(layer, MLP_IN), reversed_first))
        with tap(lm, written, ends=True) as taken:
            _run(lm, ids)
    return {point.layer for point in written if not is_reversed(taken[point])}


def _wrong(anatomy: LayerAnatomy, layer: _Layer) -> dict[str, str]:
    """The sites that are not what they should be, with what failed."""
    sites = layer.sites
    before, after = sites[RESID_PRE], sites[RESID_POST]
    wrong: dict[str, str] = {}
    for site, states in sites.items():
        if states.shape != before.shape:
            wrong[site] = f"it is {states.shape[-1]} wide, and the stream {before.shape[-1]}"
    if wrong:
        return wrong

    # What attention and the MLP add, and what they make of the stream.
    middle = sites.get(RESID_MID)
    start = before if middle is None else middle
    summed = (ATTN_OUT, MLP_OUT) if middle is None else (MLP_OUT,)
    parts = [site for site in summed if site in sites]
    if middle is not None and not _is_sum(middle, before, [sites[ATTN_OUT]]):
        wrong |= dict.fromkeys((ATTN_OUT, RESID_MID), "resid_pre + attn_out is not resid_mid")
    added = [*(sites[site] for site in parts), *layer.others]
    if parts and not _is_sum(after, start, added, anatomy.scale):
        name = RESID_PRE if middle is None else RESID_MID
        wrong |= dict.fromkeys(parts, f"{' + '.join((name, *parts))} is not resid_post")

    # What the MLP reads.
    if MLP_IN in sites:
        if not _is_read(sites[MLP_IN], layer.read):
            wrong[MLP_IN] = "no matrix of weights reads what is taken for it"
        elif not _is_normed(sites[MLP_IN], start):
            wrong[MLP_IN] = "what its MLP reads is not the stream behind a norm"
    return wrong


def _is_sum(
    whole: torch.Tensor,
    stream: torch.Tensor,
    added: Sequence[torch.Tensor],
    scale: Sequence[float | torch.Tensor] = (),
) -> bool:
    """Whether (stream + added) scale = whole, (b, t, d) each, within rounding.

    The first of what is added decides how close that must be: it may be small beside the stream.
    """
    total = stream.float() + torch.stack([states.float() for states in added]).sum(0)
    size = added[0].float().norm(dim=-1)
    for factor in scale:
        total = total * factor
        size = size * torch.as_tensor(factor).abs().max()
    rounding = _ROUNDINGS * torch.finfo(whole.dtype).eps * stream.float().norm(dim=-1)
    error = (total - whole.float()).norm(dim=-1)
    return bool((error <= _SAME_SUM * size + rounding).all())


def _is_read(rows: torch.Tensor, read: Sequence[torch.Tensor]) -> bool:
    """Whether these rows are among what was read."""
    same = [value for value in read if value.numel() == rows.numel()]
    return any(torch.equal(value.reshape(rows.shape).to(rows.dtype), rows) for value in same)


def _is_normed(rows: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether each channel of the rows goes by the same channel of the stream, or of its norm."""
    y = rows.flatten(0, -2).double()
    x = stream.flatten(0, -2).double()
    centred = x - x.mean(1, keepdim=True)
    by_size = x / x.norm(dim=1, keepdim=True)
    by_deviation = centred / centred.norm(dim=1, keepdim=True)
    return any(_goes_by(y, z) for z in (x, by_size, by_deviation))


def _goes_by(y: torch.Tensor, z: torch.Tensor) -> bool:
    """Whether every channel of y, (n, d), is a line over the same channel of z."""
    y = y - y.mean(0)
    z = z - z.mean(0)
    squares = y.square().sum(0) * z.square().sum(0)
    moves = squares > 1e-12 * squares.max()
    correlation = (y * z).sum(0).abs() / squares.sqrt()
    return bool((correlation[moves] >= _CORRELATED).all())
