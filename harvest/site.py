"""Sites: where in a decoder layer residuals are taken, and how.

A new site is one class here with the methods of `Site`, listed in `SITES`, and the names of its
arrays in data/store/arrays.py.

Shapes: b rows and t tokens of one forward pass, d d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from data.site import RESID_POST as RESID_POST_NAME

Keep = Callable[[torch.Tensor], None]  # takes the (b, t, d) states of one forward pass


class Site(Protocol):
    """A place in a decoder layer."""

    name: ClassVar[str]  # in settings and manifests

    def hook(self, blocks: nn.ModuleList, layer: int, keep: Keep) -> RemovableHandle:
        """Call `keep` with the site's states in every forward pass, until the handle is removed."""
        ...


class ResidPost:
    """The output of a decoder layer: the value that the next layer reads."""

    name: ClassVar[str] = RESID_POST_NAME

    def hook(self, blocks: nn.ModuleList, layer: int, keep: Keep) -> RemovableHandle:
        def on_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
            keep(output[0] if isinstance(output, tuple | list) else output)

        return blocks[layer].register_forward_hook(on_output)


RESID_POST = ResidPost()
SITES: dict[str, Site] = {site.name: site for site in (RESID_POST,)}  # by their names in settings


class DeepestReached(Exception):
    """A forward pass has left the deepest layer that is tapped; what lies above is not wanted."""


@contextmanager
def tap(
    blocks: nn.ModuleList, layers: Sequence[int], site: Site = RESID_POST, *, ends: bool = False
) -> Iterator[dict[int, torch.Tensor]]:
    """While open, each forward pass leaves its states of `layers`, (b, t, d) each, in the dict.

    Args:
        ends: end each pass after the deepest of `layers`, by `DeepestReached`.
    """
    taken: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Keep:
        return lambda states: taken.update({layer: states})

    def end(*_: object) -> None:
        raise DeepestReached

    handles = [site.hook(blocks, layer, keep(layer)) for layer in layers]
    if ends:  # behind the hooks that keep
        handles.append(blocks[max(layers)].register_forward_hook(end))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
