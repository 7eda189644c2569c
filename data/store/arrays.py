"""Which arrays a store has, with the name, type and shape of each.

Names are made here, and taken apart here, and nowhere else. `layer_L` holds the rows
of the site resid_post after decoder layer L. A store holds one site; its manifest names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data.store.codec import Codec, exact
from data.store.shard import UnitArray, native, object_key

KINDS = 3  # BOS, OUTLIER, ORDINARY: the kinds of rows that have statistics


_ROWS = "layer"


def _name(kind: str, layer: int) -> str:
    """The name of one of a layer's arrays."""
    return f"{kind}_{layer}"


def rows_name(layer: int) -> str:
    """The name of the array that holds a layer's rows."""
    return _name(_ROWS, layer)


def is_rows_name(name: str) -> bool:
    """Whether an array of this name holds some layer's rows."""
    return name.startswith(f"{_ROWS}_")


def layers_of(names: Iterable[str]) -> set[int]:
    """The layers whose rows are among the arrays of these names."""
    numbers = (name.removeprefix(f"{_ROWS}_") for name in names if is_rows_name(name))
    return {int(number) for number in numbers if number.isascii() and number.isdigit()}


def rows_key(layer: int, unit: int) -> str:
    """The object that holds a unit's rows of a layer."""
    return object_key(rows_name(layer), unit, dimensions=2)


@dataclass(frozen=True)
class Arrays:
    """The arrays of one store, at the shapes that it has now.

    Shapes: as in data/store/store.py.
    """

    manifest: Mapping[str, Any]
    spine_rows: int  # S
    rows_codec: Callable[[int], Codec]  # of a layer's rows

    # -- the spine ---------------------------------------------------------------------------------

    def tokens(self) -> UnitArray:
        """(S, T) uint32 token ids of the packed rows."""
        return self._packed("tokens")

    def document(self) -> UnitArray:
        """(S, T) uint32 number of the document that each token comes from."""
        return self._packed("document")

    def token_index(self) -> UnitArray:
        """(N,) flat spine index of each stored row."""
        # Decided by the tokens asked for: unlike the rows reached, they are known from the start.
        wide = self.manifest["tokens"] + self._context > 2**32
        return self._per_token("token_index", "uint64" if wide else "uint32")

    def of_spine(self) -> list[UnitArray]:
        """Every array of the spine."""
        return [self.tokens(), self.document(), self.token_index()]

    # -- one layer ---------------------------------------------------------------------------------

    def rows(self, layer: int) -> UnitArray:
        """(N, d) bfloat16 rows of the residual stream, permuted inside their unit."""
        return UnitArray(
            name=rows_name(layer),
            data_type="bfloat16",
            length=self._tokens,
            inner=(self._d_model,),
            unit=self.manifest["unit"],
            codec=self.rows_codec(layer),
            chunk=self.manifest["chunk"],
        )

    def norms(self, layer: int) -> UnitArray:
        """(N,) float32 Euclidean norms of the rows."""
        return self._per_token(_name("norm", layer), "float32")

    def kinds(self, layer: int) -> UnitArray:
        """(N,) uint8 what each row is: see data/store/kinds.py."""
        return self._per_token(_name("kind", layer), "uint8")

    def moments(self, layer: int) -> UnitArray:
        """(units, 3, 2, d) float64 moments of each unit's rows, by kind."""
        units = -(-self._tokens // self.manifest["unit"])
        return self._moments(_name("moments", layer), units, 1)

    def summary(self, layer: int) -> UnitArray:
        """(2, 3, 2, d) float64 moments of all [training, held-out] rows, by kind."""
        return self._moments(_name("summary", layer), 2, 2)

    def of_layer(self, layer: int) -> list[UnitArray]:
        """Every array of a layer."""
        return [
            self.rows(layer),
            self.norms(layer),
            self.kinds(layer),
            self.moments(layer),
            self.summary(layer),
        ]

    # -- shapes ------------------------------------------------------------------------------------

    @property
    def _context(self) -> int:
        return int(self.manifest["context"])

    @property
    def _d_model(self) -> int:
        return int(self.manifest["model"]["d_model"])

    @property
    def _tokens(self) -> int:
        return self.spine_rows * self._context

    def _packed(self, name: str) -> UnitArray:
        unit = self.manifest["unit"] // self._context
        return self._exact(name, "uint32", self.spine_rows, (self._context,), unit)

    def _per_token(self, name: str, data_type: str) -> UnitArray:
        return self._exact(name, data_type, self._tokens, (), self.manifest["unit"])

    def _moments(self, name: str, length: int, unit: int) -> UnitArray:
        return self._exact(name, "float64", length, (KINDS, 2, self._d_model), unit)

    def _exact(
        self, name: str, data_type: str, length: int, inner: tuple[int, ...], unit: int
    ) -> UnitArray:
        """An array that keeps every bit, whatever the codec of the rows."""
        codec = exact(self.manifest["codec"], native(data_type).itemsize)
        return UnitArray(name, data_type, length, inner, unit, codec)
