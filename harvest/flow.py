"""What one forward pass computes from what: a decoder's layers as a graph of tensors and calls.

Families differ in their modules' names, in what these return and in where their sums are made. The
graph tells where a layer adds to the residual stream, whatever the family. It is made by one small
pass, also of a decoder without memory, and no value is looked at. Where the decoder's own code
looks at one, it waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

SUMS = frozenset(("add", "__add__", "__radd__", "__iadd__", "add_"))
PRODUCTS = frozenset(("mul", "__mul__", "__rmul__", "__imul__", "mul_"))
# The same numbers in another shape or type; dropout is so outside training.
SAME = frozenset(
    (
        *("dropout", "to", "type", "type_as", "float", "bfloat16", "half", "clone", "contiguous"),
        *("detach", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"),
        *("squeeze", "unsqueeze"),
    )
)


class Operation(NamedTuple):
    """What made a value: a number in the list of a `Flow`."""

    name: str  # of the function; "" for what comes from outside
    inputs: tuple[int, ...]  # the values that it read
    value: torch.Tensor  # what it made: kept, so that no other tensor gets its identity
    number: float | None = None  # that is multiplied by, where it is a product with a number


@dataclass
class Call:
    """A call of a module inside a layer."""

    layer: int
    path: str  # of the module below its layer; "" for the layer
    module: nn.Module
    parent: Call | None
    begin: int  # values that there were when it began
    inputs: list[tuple[int | str, int]]  # position or name of an argument, and its value
    end: int = 0  # values that there were when it ended
    outputs: list[tuple[int | None, int]] = field(default_factory=list)  # place in a tuple; value


class Flow(TorchFunctionMode):
    """The values and calls of one forward pass. A context manager: it follows while open."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Operation] = []
        self.calls: list[Call] = []  # in the order in which they began
        self.changed: set[int] = set()  # values whose tensor was written to later
        self._number: dict[int, int] = {}  # of a tensor's present value, by the tensor's identity
        self._open: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, and note what it read and made."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        read = tuple(self.value_of(tensor) for tensor in _tensors((args, kwargs)))
        result = func(*args, **kwargs)
        target = args[0] if args else None
        if isinstance(target, torch.Tensor) and (name == "__setitem__" or result is target):
            if _writes(name):
                self.changed.add(self.value_of(target))
                self._note(name, read, target, _number(name, args))
            return result
        for tensor in _tensors(result):
            if id(tensor) not in self._number:
                self._note(name, read, tensor, _number(name, args))
        return result

    def value_of(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's present value."""
        number = self._number.get(id(tensor))
        return self._note("", (), tensor) if number is None else number

    def begin(self, layer: int, path: str, module: nn.Module, inputs: Any, options: Any) -> None:
        """Note that a module is called."""
        told: list[tuple[int | str, int]] = []
        for key, value in [*enumerate(inputs), *options.items()]:
            if isinstance(value, torch.Tensor):
                told.append((key, self.value_of(value)))
        parent = self._open[-1] if self._open else None
        call = Call(layer, path, module, parent, len(self.made), told)
        self.calls.append(call)
        self._open.append(call)

    def end(self, output: Any) -> None:
        """Note what the module that was called last gives."""
        call = self._open.pop()
        places = enumerate(output) if isinstance(output, tuple | list) else [(None, output)]
        for place, tensor in places:
            if isinstance(tensor, torch.Tensor):
                if id(tensor) not in self._number:  # made by a kernel that torch does not know
                    self._note("call", tuple(value for _, value in call.inputs), tensor)
                call.outputs.append((place, self.value_of(tensor)))
        call.end = len(self.made)

    def _note(
        self, name: str, inputs: tuple[int, ...], tensor: torch.Tensor, number: float | None = None
    ) -> int:
        self.made.append(Operation(name, inputs, tensor, number))
        self._number[id(tensor)] = len(self.made) - 1
        return len(self.made) - 1


def matrices(module: nn.Module) -> int:
    """Numbers in a module's own matrices of weights; quantised ones may be buffers."""
    own = [*module._parameters.values(), *module._buffers.values()]
    return sum(tensor.numel() for tensor in own if tensor is not None and tensor.ndim >= 2)


class _Over(Exception):
    """The last layer that is followed has ended."""


def follow(
    decoder: nn.Module, blocks: nn.ModuleList, deepest: int, ids: torch.Tensor, **options: Any
) -> Flow:
    """Run one pass of `ids` (b, t) up to layer `deepest`, and follow it.

    Args:
        options: what else the decoder is told.

    Raises:
        Exception: whatever the family's own code raises.
    """
    flow = Flow()
    handles: list[Any] = []
    for layer, block in enumerate(blocks[: deepest + 1]):
        for path, module in block.named_modules():
            handles += _followed(flow, layer, path, module)
    handles.append(blocks[deepest].register_forward_hook(_over))
    try:
        with torch.inference_mode(), suppress(_Over), flow:
            decoder(input_ids=ids, **options)
    finally:
        for handle in handles:
            handle.remove()
    return flow


def _followed(flow: Flow, layer: int, path: str, module: nn.Module) -> Iterator[Any]:
    """Hooks that note each call of a module."""

    def begin(_module: nn.Module, inputs: Any, options: Any) -> None:
        flow.begin(layer, path, module, inputs, options)

    def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
        flow.end(output)

    yield module.register_forward_pre_hook(begin, with_kwargs=True)
    yield module.register_forward_hook(end)


def _over(*_: object) -> None:
    raise _Over


def _writes(name: str) -> bool:
    """Whether a function that returns its first argument has changed it."""
    return name.endswith("_")


def _number(name: str, args: tuple[Any, ...]) -> float | None:
    """The number that a tensor is multiplied by, where it is one."""
    if name in PRODUCTS:
        for arg in args:
            if isinstance(arg, int | float):
                return float(arg)
    return None


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
