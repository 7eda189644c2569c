"""Where a decoder's layers read and write the residual stream: the places of their sites.

harvest/dissection.py finds an anatomy, harvest/site.py takes and edits rows by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from residual_saes.data.errors import SettingError
from residual_saes.data.site import (
    ATTN_OUT,
    MLP_IN,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    SITES,
    HookPoint,
)

INSIDE = (ATTN_OUT, RESID_MID, MLP_IN, MLP_OUT)  # sites inside a layer: they need an anatomy


class Reader(NamedTuple):
    """An argument of a module: what it reads is the site's value."""

    path: str  # of the module below its layer; "" for the layer
    key: int | str | None  # position or name of the argument; None: the first tensor
    copied: bool = False  # the family changes the tensor later, in place


class Term(NamedTuple):
    """An output of a module, times factors: the site's value is the sum of its terms."""

    path: str
    place: int = 0  # in a module's tuple
    factors: tuple[float | torch.Tensor, ...] = ()
    copied: bool = False


Place = tuple[Reader, ...] | tuple[Term, ...]  # readers all read the same value
_EDGES: dict[str, Place] = {RESID_PRE: (Reader("", None, copied=True),), RESID_POST: (Term(""),)}


@dataclass(frozen=True)
class LayerAnatomy:
    """The sites of one layer."""

    places: Mapping[str, Place] = field(default_factory=dict)  # of the sites inside it
    refused: Mapping[str, str] = field(default_factory=dict)  # of the others: why
    # What else the layer adds to the stream, and what it multiplies the stream by at its end.
    others: tuple[Term, ...] = ()
    scale: tuple[float | torch.Tensor, ...] = ()
    is_parallel: bool = False  # attention and MLP read the same stream


@dataclass(frozen=True)
class Anatomy:
    """The sites of a decoder."""

    family: str  # transformers' class of the decoder
    layers: tuple[LayerAnatomy, ...]  # up to the deepest that has its weights

    def place(self, point: HookPoint) -> Place:
        """Where a point's rows are.

        Raises:
            SettingError: the layer has no such site.
        """
        if point.site in _EDGES:
            return _EDGES[point.site]
        layer = self.layers[point.layer]
        if point.site not in layer.places:
            raise self.refusal(point, layer.refused[point.site])
        return layer.places[point.site]

    def require(self, points: Iterable[HookPoint]) -> None:
        """Raise SettingError for a point that is not there."""
        for point in points:
            self.place(point)

    def sites(self, layer: int) -> tuple[str, ...]:
        """The sites of a layer, in their order."""
        there = {*_EDGES, *self.layers[layer].places}
        return tuple(site for site in SITES if site in there)

    def refusal(self, point: HookPoint, reason: str, wrong: tuple[str, ...] = ()) -> SettingError:
        """The error for a site that a layer does not have.

        Args:
            wrong: other sites that it does not have either, whatever the anatomy says.
        """
        there = self.sites(point.layer)
        sites = ", ".join(site for site in there if site not in (point.site, *wrong))
        return SettingError(
            f"site={point.site} cannot be taken in layer {point.layer} of {self.family}: {reason}; "
            f"take site= one of {sites}"
        )


def edge(point: HookPoint) -> Place | None:
    """The place of a site that is a layer's input or output; None for one inside a layer."""
    return _EDGES.get(point.site)
