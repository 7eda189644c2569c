"""Taking and editing the values of hook points in forward passes.

What enters and leaves a layer is found by its module. For sites inside a layer the decoder's
anatomy says where they are (harvest/anatomy.py).

Shapes: b rows and t tokens of one forward pass, d d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from residual_saes.data.errors import SettingError
from residual_saes.data.site import RESID_MID, HookPoint, Point
from residual_saes.harvest.anatomy import Anatomy, Place, Reader, Term, edge

Edit = Callable[[torch.Tensor], torch.Tensor]  # (b, t, d) -> (b, t, d)
Keep = Callable[[torch.Tensor], None]  # takes the (b, t, d) values of one forward pass


class Layers(Protocol):
    """A decoder's layers, as a `LanguageModel` has them."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The modules of all layers."""
        ...

    @property
    def anatomy(self) -> Anatomy:
        """Where sites inside a layer are. It is asked for such sites only."""
        ...


class DeepestReached(Exception):
    """A forward pass has left the deepest layer that is tapped; what lies above is not wanted."""


@contextmanager
def tap(
    lm: Layers, points: Sequence[Point], *, ends: bool = False
) -> Iterator[dict[HookPoint, torch.Tensor]]:
    """While open, each forward pass leaves its values of `points`, (b, t, d) each, in the dict.

    Args:
        ends: end each pass after the deepest layer of `points`, by `DeepestReached`.

    Raises:
        SettingError: a layer has no such site.
    """
    taken: dict[HookPoint, torch.Tensor] = {}
    handles: list[Any] = []

    def keep(point: HookPoint) -> Keep:
        return lambda values: taken.update({point: values})

    def end(*_: object) -> None:
        raise DeepestReached

    wanted = [HookPoint.of(point) for point in points]
    try:
        for point in wanted:
            handles += taking(lm.blocks[point.layer], place_of(lm, point), keep(point))
        if ends:  # behind the hooks that keep
            deepest = max(point.layer for point in wanted)
            handles.append(lm.blocks[deepest].register_forward_hook(end))
        yield taken
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edited_at(lm: Layers, point: Point, edit: Edit) -> Iterator[None]:
    """While open, each forward pass goes on with `edit(values)` in the place of a point's values.

    `edit` gets (b, t, d) in the model's type, as `tap` gives it, and returns the same shape. A
    `tap` that is opened inside sees the edited values.

    Raises:
        SettingError: the layer has no such site, or the site is resid_mid, which is read in
            several places: edit attn_out.
    """
    where = HookPoint.of(point)
    if where.site == RESID_MID:
        raise SettingError(f"{where} cannot be edited: edit attn_out, which makes it")
    handles = editing(lm.blocks[where.layer], place_of(lm, where), edit)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def place_of(lm: Layers, point: HookPoint) -> Place:
    """Where a point's values are.

    Raises:
        SettingError: the layer has no such site.
    """
    return edge(point) or lm.anatomy.place(point)


# -- hooks -----------------------------------------------------------------------------------------


def taking(block: nn.Module, place: Place, keep: Keep) -> list[Any]:
    """Hooks that call `keep` with the values of a place in every forward pass."""
    first = place[0]
    if isinstance(first, Term):
        return _Sum(block, place, keep).handles
    shape = _Shape(block, place)
    reader = first

    def on_input(_module: nn.Module, inputs: Any, options: Any) -> None:
        values = _read(reader, inputs, options)
        keep(shape.whole(values.clone() if reader.copied else values))

    module = block.get_submodule(reader.path)
    return [*shape.handles, module.register_forward_pre_hook(on_input, with_kwargs=True)]


def editing(block: nn.Module, place: Place, edit: Edit) -> list[Any]:
    """Hooks that put `edit(values)` in the place of a place's values."""
    if isinstance(place[0], Term):
        return _Sum(block, place, edit).handles
    shape = _Shape(block, place)
    edited: dict[Reader, torch.Tensor] = {}  # in the present pass: one value for all readers

    def on_input(reader: Reader) -> Callable[..., Any]:
        def replaced(_module: nn.Module, inputs: Any, options: Any) -> tuple[Any, Any]:
            values = _read(reader, inputs, options)
            if not edited or reader in edited:  # the first of a pass
                edited.clear()
                value = edit(shape.whole(values))
            else:
                value = next(iter(edited.values()))
            edited[reader] = value
            return _replaced(reader, inputs, options, value.reshape(values.shape))

        return replaced

    handles = list(shape.handles)
    for reader in place:
        assert isinstance(reader, Reader)
        module = block.get_submodule(reader.path)
        handles.append(module.register_forward_pre_hook(on_input(reader), with_kwargs=True))
    return handles


class _Shape:
    """The (b, t, d) of a layer's present pass: inside it a family may have rows of (b*t, d)."""

    def __init__(self, block: nn.Module, place: Place) -> None:
        self._shape: torch.Size | None = None
        self.handles: list[Any] = []
        if any(part.path for part in place):
            self.handles.append(block.register_forward_pre_hook(self._note, with_kwargs=True))

    def _note(self, _module: nn.Module, inputs: Any, options: Any) -> None:
        self._shape = first_tensor(inputs, options)[1].shape

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Values as (b, t, d)."""
        if self._shape is None:
            return values
        return values.reshape(*self._shape[:-1], values.shape[-1])


class _Sum:
    """Hooks on the modules whose outputs make a sum; the last one's output may be replaced."""

    def __init__(self, block: nn.Module, terms: Place, use: Keep | Edit) -> None:
        self._shape = _Shape(block, terms)
        self._use = use
        self._others: torch.Tensor | None = None  # the sum of all terms but the last
        self.handles = list(self._shape.handles)
        for term in terms:
            assert isinstance(term, Term)
            module = block.get_submodule(term.path)
            note = self._last if term is terms[-1] else self._note
            self.handles.append(module.register_forward_hook(_on_output(term, note)))

    def _note(self, term: Term, output: Any) -> None:
        self._others = _added(self._others, self._shape.whole(_value(term, output)))

    def _last(self, term: Term, output: Any) -> Any:
        others, self._others = self._others, None
        used = self._use(_added(others, self._shape.whole(_value(term, output))))
        if used is None:
            return None
        edited = used if others is None else used - others
        for factor in term.factors:
            edited = edited / factor
        own = _output(term, output)
        return _with_output(term, output, edited.to(own.dtype).reshape(own.shape))


def _added(former: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    return values if former is None else former + values


def _on_output(term: Term, note: Callable[[Term, Any], Any]) -> Callable[..., Any]:
    return lambda _module, _inputs, output: note(term, output)


def _output(term: Term, output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[term.place] if isinstance(output, tuple | list) else output
    return tensor


def _with_output(term: Term, output: Any, value: torch.Tensor) -> Any:
    """A module's output with another tensor in a term's place."""
    if not isinstance(output, tuple | list):
        return value
    return (*output[: term.place], value, *output[term.place + 1 :])


def _value(term: Term, output: Any) -> torch.Tensor:
    """A term, from its module's output."""
    value = _output(term, output)
    for factor in term.factors:
        value = value * factor
    return value.clone() if term.copied and not term.factors else value


def first_tensor(inputs: Sequence[Any], options: dict[str, Any]) -> tuple[int | str, torch.Tensor]:
    """The first tensor that a module is told, and its position or name: a layer's stream."""
    told: Iterable[tuple[int | str, Any]] = [*enumerate(inputs), *options.items()]
    return next((key, value) for key, value in told if isinstance(value, torch.Tensor))


def _read(reader: Reader, inputs: Any, options: Any) -> torch.Tensor:
    """What a reader reads."""
    if reader.key is None:
        return first_tensor(inputs, options)[1]
    value: torch.Tensor = inputs[reader.key] if isinstance(reader.key, int) else options[reader.key]
    return value


def _replaced(reader: Reader, inputs: Any, options: Any, value: torch.Tensor) -> tuple[Any, Any]:
    """A module's arguments with another tensor in a reader's place."""
    key = first_tensor(inputs, options)[0] if reader.key is None else reader.key
    if isinstance(key, int):
        return (*inputs[:key], value, *inputs[key + 1 :]), options
    return inputs, {**options, key: value}
