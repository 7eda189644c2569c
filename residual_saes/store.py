"""A store of activations as people read it from Python.

    store = Store.open("activations/demo.zarr")
    store.rows(layer=5)[:100]       (100, d) bfloat16
    store.tokens[:100]              the token that each of these rows is of
    store.text(17, before=20)       the text up to row 17's token
    for batch in store.batches(layer=5, part="held_out"): ...

Row i of every layer, of `tokens`, `documents` and `held_out` is of the same token. Neighbouring
rows are of different documents: rows are shuffled within units (docs/store.md), and `positions` has
the order of the text. To train, `python -m train` reads them in a new random order.

Shapes: N tokens of the store, d their width, n rows of a batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.data.errors import SettingError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.rows import split
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.settings import whole
from residual_saes.data.site import RESID_POST, HookPoint, require_site
from residual_saes.data.store import model_folder
from residual_saes.data.store import store as stores
from residual_saes.harvest.hub_model import described
from residual_saes.harvest.tokens import Tokenizer

Part = Literal["training", "held_out", "all"]
_CACHED = 4  # units whose tokens stay in memory: 1.3 MB each


class Batch(NamedTuple):
    """Rows of one layer, with what they are of."""

    rows: Tensor  # (n, d) bfloat16
    tokens: Tensor  # (n,) int64 token ids
    documents: Tensor  # (n,) int64 document numbers
    numbers: Tensor  # (n,) int64 rows of the store: store.tokens[number], store.text(number)


@dataclass(frozen=True)
class Column:
    """A table of N rows that is read from the store where it is sliced."""

    name: str
    shape: tuple[int, ...]
    _unit: int  # rows of a unit; the last one may have fewer
    _read: Callable[[int, int, int], Any]  # of a unit, its rows from ... to ...

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Tensor: ...
    def __getitem__(self, index: int | slice) -> Tensor:
        """Row `index`, or the rows of a slice, as a tensor of its own."""
        if not isinstance(index, slice):
            try:
                number = operator.index(index)
            except TypeError:
                raise SettingError(f"{self} is read by a number or a slice") from None
            if not -len(self) <= number < len(self):
                raise IndexError(f"row {number} of {self}")
            return self[slice(number % len(self), number % len(self) + 1)][0]
        start, stop, step = index.indices(len(self))
        if step < 1:
            raise SettingError(f"a step of {step}: slices go forward")
        parts = [self._read(0, 0, 0)]  # of the right type where a slice is empty
        for unit in range(start // self._unit, -(-stop // self._unit) if stop > start else 0):
            first = unit * self._unit
            parts.append(self._read(unit, max(start - first, 0), min(stop - first, self._unit)))
        return torch.cat(parts)[::step]

    def __repr__(self) -> str:
        return f"{self.name}: {' x '.join(f'{size:,}' for size in self.shape)}"


class Store:
    """Activations of a model's layers over a text, with its tokens."""

    def __init__(self, inner: stores.Store, model: str | None = None) -> None:
        """Use `open`."""
        self._inner = inner
        self._model = model
        self._spine = lru_cache(_CACHED)(self._read_spine)

    @classmethod
    def open(cls, where: str | Path, *, model: str | None = None) -> Store:
        """The store at a place.

        >>> Store.open("activations/demo.zarr")
        Store(activations/demo.zarr: 16,384 tokens of tiny, layer 5, d_model 64, context 128)

        Args:
            where: a folder, or the URL of an object store.
            model: folder or hub id of the language model, where the recorded one is not it; its
                tokenizer gives the tokens' texts.

        Raises:
            StoreError: there is no store, it has another format, or a file is missing or cut.
        """
        return cls(stores.Store.open(where), model)

    @property
    def name(self) -> str:
        """Its folder or URL, as it was given."""
        return self._inner.name

    @property
    def points(self) -> list[str]:
        """What it has rows of: `layer 21`, or `mlp_in of layer 21`."""
        return [str(point) for point in self._inner.points]

    @property
    def layers(self) -> list[int]:
        """Layers whose outputs it has."""
        return self._inner.layers

    @property
    def manifest(self) -> dict[str, Any]:
        """What it was made from: model, text, seed, context, codec."""
        return self._inner.manifest

    def __len__(self) -> int:
        """N, its tokens."""
        return self._inner.rows

    def __repr__(self) -> str:
        inner, points = self._inner, ", ".join(self.points) or "no rows yet"
        return (
            f"Store({self.name}: {len(self):,} tokens of {self.manifest['model']['id']}, {points}, "
            f"d_model {inner.d_model}, context {inner.context:,})"
        )

    # -- rows --------------------------------------------------------------------------------------

    def rows(self, layer: int | None = None, site: str = RESID_POST) -> Column:
        """(N, d) bfloat16 rows of a layer, as `rows[3]` and `rows[100:200]` read them.

        >>> rows = Store.open("activations/demo.zarr").rows(layer=5)
        >>> rows.shape, rows[100:200].shape, rows[-1].dtype
        ((16384, 64), torch.Size([100, 64]), torch.bfloat16)

        Args:
            layer: None: the only one that the store has at this site.
            site: resid_post, the layer's output, or another one that was harvested.

        Raises:
            SettingError: the store has several layers.
            StoreError: it lacks this one, or some of its units.
        """
        source = self._source(layer, site)

        def read(unit: int, start: int, stop: int) -> Tensor:
            bits = source.store.residuals(source.point, unit, start, stop)
            return torch.from_numpy(bits).view(torch.bfloat16)

        return self._column(str(source), read, source.width)

    def kept(self, layer: int | None = None, site: str = RESID_POST) -> Column:
        """(N,) bool: which rows training reads: neither BOS nor longer than ten median norms.

        >>> int(Store.open("activations/demo.zarr").kept(layer=5)[:2048].sum())
        2001

        Raises:
            SettingError, StoreError: as `rows`.
        """
        source = self._source(layer, site)

        def read(unit: int, start: int, stop: int) -> Tensor:
            return torch.from_numpy(Policy().keeps([source], unit)[start:stop])

        return self._column(f"kept of {source}", read)

    @cached_property
    def tokens(self) -> Column:
        """(N,) int64 token ids."""
        return self._of_spine("tokens", 0)

    @cached_property
    def documents(self) -> Column:
        """(N,) int64 numbers of the documents that the tokens are in."""
        return self._of_spine("documents", 1)

    @cached_property
    def positions(self) -> Column:
        """(N,) int64 place of each token in the text: `positions[:].argsort()` is its order."""
        return self._of_spine("positions", 2)

    @cached_property
    def held_out(self) -> Column:
        """(N,) bool: rows that are never trained on. Whole units are held out."""
        units = frozenset(split.parts(self._inner)[split.HELD_OUT])

        def read(unit: int, start: int, stop: int) -> Tensor:
            return torch.full(
                (max(min(stop, self._inner.rows_of(unit)) - start, 0),), unit in units
            )

        return self._column("held out", read)

    def batches(
        self,
        layer: int | None = None,
        size: int = 4096,
        *,
        part: Part = "all",
        every: bool = False,
        site: str = RESID_POST,
    ) -> Iterator[Batch]:
        """All rows of a layer once, in the stored order.

        >>> store = Store.open("activations/demo.zarr")
        >>> batch = next(store.batches(layer=5, size=100, part="held_out"))
        >>> batch.rows.shape, bool((batch.tokens == store.tokens[int(batch.numbers[0])]).any())
        (torch.Size([100, 64]), True)

        Args:
            size: rows of a batch at most; the last one of a unit may have fewer.
            part: rows to train on, held-out ones, or all.
            every: also BOS and rows longer than ten median norms, which training leaves out.

        Raises:
            SettingError, StoreError: as `rows`.
        """
        rows, kept = self.rows(layer, site), self.kept(layer, site)
        if part not in ("training", "held_out", "all"):
            raise SettingError(f"part={part} must be training, held_out or all")
        if size < 1:
            raise SettingError(f"size={size} must be at least 1 (rows)")
        parts = split.parts(self._inner)
        units = range(self._inner.units) if part == "all" else parts[part == "held_out"]
        for unit in units:
            first = unit * self._inner.unit_tokens
            own = slice(first, first + self._inner.rows_of(unit))
            chosen = torch.arange(own.start, own.stop)
            chosen = chosen if every else chosen[kept[own]]
            for start in range(0, len(chosen), size):
                numbers = chosen[start : start + size]
                low, high = int(numbers[0]), int(numbers[-1])
                spine = self._spine(unit)[:, numbers - first]
                yield Batch(rows[low : high + 1][numbers - low], spine[0], spine[1], numbers)

    def text(self, row: int, before: int = 0, after: int = 0) -> str:
        r"""The text of a row's token, with its neighbours in the same document.

        >>> store = Store.open("activations/demo.zarr")
        >>> store.text(17), store.text(17, before=4, after=2)
        ('4', '\nThere are 42 - ')

        Args:
            row: its number.
            before: tokens ahead of it.
            after: and behind it.

        Raises:
            SettingError: the model that made the store is not at hand; give `open` its place.
        """
        position, context = int(self.positions[row]), self._inner.context
        unit, place = divmod(position, self._inner.unit_tokens)
        line, column = divmod(place, context)
        tokens, documents = self._inner.tokens(unit)[line], self._inner.document(unit)[line]
        around = np.arange(max(column - before, 0), min(column + after + 1, context))
        own = around[documents[around] == documents[column]]
        return str(self._tokenizer.inner.decode(tokens[own].tolist()))

    # -- how they are read -------------------------------------------------------------------------

    def _source(self, layer: int | None, site: str) -> Source:
        known = [point for point in self._inner.points if point.site == require_site(site)]
        if layer is None and len(known) != 1:
            raise SettingError(f"layer= is missing; {self.name} has {', '.join(self.points)}")
        source = Source(
            self._inner, known[0] if layer is None else HookPoint(whole("layer", layer), site)
        )
        source.require_complete()
        return source

    def _column(self, name: str, read: Callable[[int, int, int], Tensor], *inner: int) -> Column:
        return Column(name, (len(self), *inner), self._inner.unit_tokens, read)

    def _of_spine(self, name: str, number: int) -> Column:
        return self._column(name, lambda unit, *span: self._spine(unit)[number, slice(*span)])

    def _read_spine(self, unit: int) -> Tensor:
        """(3, n) int64 token, document and position of each of a unit's rows."""
        order = self._inner.permutation(unit)
        tokens, documents = self._inner.tokens(unit).ravel(), self._inner.document(unit).ravel()
        columns: list[NDArray[Any]] = [tokens[order], documents[order]]
        columns.append(order + unit * self._inner.unit_tokens)
        return torch.from_numpy(np.stack(columns).astype(np.int64))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        recorded = self.manifest["model"]
        known = model_folder.recalled(self._inner.place, self._inner.manifest)
        model = self._model or (EMBEDDED if known == "tiny" else known)
        return Tokenizer.load(described(model, "main" if self._model else recorded["revision"]))
