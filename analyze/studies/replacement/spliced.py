"""The forward pass with the MLPs of several layers replaced, each by what its transcoder writes.

Each transcoder reads the MLP's input in the pass that is replaced, so errors of one layer reach the
next, as in the replacement model of circuit-tracer (Ameisen et al., "Circuit Tracing: Revealing
Computational Graphs in Language Models", 2025). At BOS and at rows that training left out, the MLPs
stay: circuit-tracer's transcoders do not read BOS either.

Shapes: b sequences, t positions, n rows, d the width that is read, d_out that of the MLP's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from residual_saes.analyze import linear, losses
from residual_saes.analyze.linear import LinearMap
from residual_saes.analyze.losses import ALL, TRAINED, Batch, Edit, Losses, Taken
from residual_saes.analyze.parts import Parts
from residual_saes.analyze.pieces import Piece
from residual_saes.analyze.subject import Subject
from residual_saes.data.site import HookPoint
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import edited_at, tap

IDENTITY = "errors added back"
TRANSCODERS = "transcoders"
LINEAR = "linear maps"
MEAN = "mean ablation"
ZERO = "zero ablation"

# From rows that are read (n, d) and the MLP's own output (n, d_out), both of the pass that is
# replaced, to what replaces that output.
Written = Callable[[Tensor, Tensor], Tensor]


class Way(NamedTuple):
    """One way to replace the MLPs of some layers."""

    name: str
    where: str  # ALL or TRAINED
    layers: tuple[int, ...]


class Layer(NamedTuple):
    """A transcoder in its layer, and what it is compared with."""

    subject: Subject
    read: HookPoint
    target: HookPoint
    linear: LinearMap | None  # None in a ring

    @classmethod
    def of(cls, subject: Subject) -> Layer:
        """The layer of a transcoder; its linear map is fit."""
        read, target = subject.point, subject.target
        assert read and target
        return cls(subject, read, target, linear.fitted(subject))

    def written(self, name: str, taken: Taken) -> Written:
        """What replaces the MLP's output.

        Args:
            name: of a `Way`.
            taken: states of the clean model.
        """
        sae = self.subject.sae
        if name == TRANSCODERS:
            return lambda read, _: sae(read)
        if name == LINEAR:
            fit = self.linear
            assert fit
            return lambda read, _: fit(read)
        if name == MEAN:
            mean = self.subject.mean.float()
            return lambda _, own: mean.expand_as(own)
        if name == ZERO:
            return lambda _, own: torch.zeros_like(own)
        assert name == IDENTITY
        # In float64: y_hat + (y - y_hat) is y to the last bit of float32.
        clean = _rows(taken[self.target]).double()
        error = clean - sae(_rows(taken[self.read])).double()
        return lambda read, _: (sae(read).double() + error).float()


def ways(layers: Sequence[Layer]) -> list[Way]:
    """All that is measured: every layer at once, each alone, and all up to each."""
    numbers = tuple(layer.target.layer for layer in layers)
    names = [IDENTITY, TRANSCODERS, LINEAR, MEAN, ZERO]
    if not all(layer.linear for layer in layers):
        names.remove(LINEAR)
    every = [Way(name, TRAINED, numbers) for name in names]
    every.append(Way(TRANSCODERS, ALL, numbers))
    parts = [numbers[:count] for count in range(1, len(numbers))]
    parts += [(number,) for number in numbers[1:]]
    return every + [Way(TRANSCODERS, TRAINED, part) for part in parts]


def measure(
    lm: LanguageModel,
    layers: Sequence[Layer],
    read: Sequence[tuple[Piece, ...]],
    parts: Parts,
) -> Losses:
    """Losses of every token behind a BOS, clean and in every way of `ways`.

    Args:
        read: pieces, each once for every layer's subject.
        parts: where the losses of each batch are kept.
    """
    how = ways(layers)

    def edits(batch: Batch, taken: Taken) -> Iterator[Edit]:
        for way in how:
            said = f"{way.name}, {len(way.layers)} of {len(layers)} layers, {way.where}"
            yield Edit(said, replaced(lm, layers, way, batch, taken))

    points = [point for layer in layers for point in (layer.read, layer.target)]
    return losses.measure(lm, read, points, edits, parts)


@contextmanager
def replaced(
    lm: LanguageModel, layers: Sequence[Layer], way: Way, batch: Batch, taken: Taken
) -> Iterator[None]:
    """While open, the MLPs of a way's layers are replaced."""
    chosen = [(index, layer) for index, layer in enumerate(layers)]
    chosen = [(index, layer) for index, layer in chosen if layer.target.layer in way.layers]
    with ExitStack() as opened:
        live = opened.enter_context(tap(lm, [layer.read for _, layer in chosen]))
        for index, layer in chosen:
            mask = batch.mask(way.where, layer.subject.policy.kinds, index)
            written = layer.written(way.name, taken)
            edit = _edit(written, live, layer.read, mask.to(lm.config.device))
            opened.enter_context(edited_at(lm, layer.target, edit))
        yield


def _edit(
    written: Written, live: Taken, read: HookPoint, mask: Tensor
) -> Callable[[Tensor], Tensor]:
    """A function that replaces an MLP's output (b, t, d_out) where `mask` (b, t) is set."""

    def edit(own: Tensor) -> Tensor:
        assert own.shape[:2] == mask.shape, "the whole sequence goes through every layer"
        new = written(_rows(live[read]), _rows(own)).to(own.dtype).view_as(own)
        return torch.where(mask[..., None], new, own)

    return edit


def _rows(states: Tensor) -> Tensor:
    """(n, d) float32 rows of (b, t, d) states."""
    return states.reshape(-1, states.shape[-1]).float()
