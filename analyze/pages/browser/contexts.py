"""The contexts in the catalogue's table, read as arrays: as Python objects they took most time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

CONTEXT = ("document", "position", "peak", "tokens", "activations")


def fields(column: str, *names: str) -> list[str]:
    """The fields of a column of lists, as Parquet names them."""
    return [f"{column}.list.element.{name}" for name in names]


class Contexts(NamedTuple):
    """A column of contexts: c of them, of l latents, with t tokens in all."""

    begins: NDArray[np.int64]  # (l + 1,) the first context of each latent
    columns: dict[str, NDArray[np.int64]]  # (c,) document, position, peak; of samples quantile too
    tokens_begin: NDArray[np.int64]  # (c + 1,) the first token of each context
    tokens: NDArray[np.int64]  # (t,)
    activations: NDArray[np.float32]  # (t,)

    def of(self, number: int) -> range:
        """The contexts of the latent that is in row `number` of the block."""
        return range(*self.begins[number : number + 2])

    def span(self, context: int) -> slice:
        """Where a context's tokens are."""
        return slice(*self.tokens_begin[context : context + 2])

    def numbers(self, context: int, *names: str) -> list[int]:
        """A context's document, position and so on, by name."""
        return [int(self.columns[name][context]) for name in names]

    def peak_value(self, context: int) -> float:
        """The activation at a context's peak."""
        return float(self.activations[self.tokens_begin[context] + self.columns["peak"][context]])

    def peak_tokens(self) -> NDArray[np.int64]:
        """(c,) the token at each peak."""
        tokens: NDArray[np.int64] = self.tokens[self.tokens_begin[:-1] + self.columns["peak"]]
        return tokens


def contexts_of(block: pa.Table, name: str) -> Contexts:
    """The contexts in column `name` of a block, whose columns are one chunk each."""
    lists = block.column(name).chunk(0)
    contexts = lists.values
    columns = {}
    for field in ("document", "position", "peak", "quantile"):
        if contexts.type.get_field_index(field) >= 0:
            columns[field] = _integers(contexts.field(field))
    tokens = contexts.field("tokens")
    return Contexts(
        begins=_integers(lists.offsets),
        columns=columns,
        tokens_begin=_integers(tokens.offsets),
        tokens=_integers(tokens.values),
        activations=contexts.field("activations").values.to_numpy(zero_copy_only=False),
    )


def _integers(array: Any) -> NDArray[np.int64]:
    return np.asarray(array.to_numpy(zero_copy_only=False), np.int64)
