"""A decoder's layers in float32, for comparisons that rounding must not decide.

In bfloat16, random deep networks amplify the rounding of other matrix shapes to 14 % of a row. So
whether two ways of running a piece agree is judged in float32. One layer at a time has float32
weights: a whole model in float32 might not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(blocks: nn.ModuleList) -> Iterator[None]:
    """While open, each block computes in float32, on float32 states. No weight changes.

    Blocks without weights, and blocks in float32, stay as they are. Quantised weights stay too.
    """
    handles: list[Any] = []
    for block in blocks:
        parameters = [*block.parameters(), *block.buffers()]
        if any(tensor.dtype in HALVES for tensor in parameters):
            widened = _Widened(block)
            handles.append(block.register_forward_pre_hook(widened.widen, with_kwargs=True))
            # `always_call`: also where the forward pass ends inside the block.
            handles.append(block.register_forward_hook(widened.restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Widened:
    """One block's weights, in float32 during its forward."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._narrow: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(self, _module: nn.Module, inputs: Any, options: Any) -> tuple[Any, Any]:
        with torch.inference_mode(False), torch.no_grad():
            for tensor in [*self._block.parameters(), *self._block.buffers()]:
                if tensor.dtype in HALVES:
                    self._narrow.append((tensor, tensor.data))
                    tensor.data = tensor.data.float()
        return _float32(inputs), _float32(options)

    def restore(self, *_: object) -> None:
        for tensor, narrow in self._narrow:
            tensor.data = narrow
        self._narrow = []


def _float32(tree: Any) -> Any:
    """A nested structure with float32 in the place of half precision."""
    if isinstance(tree, torch.Tensor):
        return tree.float() if tree.dtype in HALVES else tree
    if type(tree) in (tuple, list):
        return type(tree)(map(_float32, tree))
    if type(tree) is dict:
        for name, value in tree.items():  # in place: blocks may share what they put into it
            tree[name] = _float32(value)
    return tree
