"""Which arrays a store has, with the name, type and shape of each.

Names are made here, and taken apart here, and nowhere else. `layer_L` holds the rows of the site
resid_post of decoder layer L, and `SITE_L` those of another site, as in `mlp_in_21`. What belongs
to them is named `norm_L`, or `norm_SITE_L`, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from residual_saes.data.errors import SettingError
from residual_saes.data.site import RESID_POST, HookPoint, Point
from residual_saes.data.store.codec import Codec, exact
from residual_saes.data.store.shard import UnitArray, native, object_key

KINDS = 3  # BOS, OUTLIER, ORDINARY: the kinds of rows that have statistics


_LAYER = "layer_"  # begins the names of resid_post's rows


def _name(kind: str, point: Point) -> str:
    """The name of one of the arrays that belong to a point's rows."""
    return f"{kind}_{HookPoint.of(point).name}"


def rows_name(point: Point) -> str:
    """The name of the array that holds a point's rows."""
    point = HookPoint.of(point)
    return f"{_LAYER}{point.layer}" if point.site == RESID_POST else point.name


def rows_point(name: str) -> HookPoint | None:
    """The hook point whose rows an array of this name holds; None: it holds no rows."""
    try:
        point = HookPoint.of(name.removeprefix(_LAYER))
    except SettingError:
        return None
    return point if rows_name(point) == name else None


def points_of(names: Iterable[str]) -> set[HookPoint]:
    """The points whose rows are among the arrays of these names."""
    return {point for name in names if (point := rows_point(name)) is not None}


def rows_key(point: Point, unit: int) -> str:
    """The object that holds a unit's rows of a point."""
    return object_key(rows_name(point), unit, dimensions=2)


@dataclass(frozen=True)
class Arrays:
    """The arrays of one store, at the shapes that it has now.

    Shapes: as in data/store/store.py.
    """

    manifest: Mapping[str, Any]
    spine_rows: int  # S
    rows_codec: Callable[[HookPoint], Codec]  # of a point's rows

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

    # -- one point ---------------------------------------------------------------------------------

    def rows(self, point: Point) -> UnitArray:
        """(N, d) bfloat16 rows of a hook point, permuted inside their unit."""
        return UnitArray(
            name=rows_name(point),
            data_type="bfloat16",
            length=self._tokens,
            inner=(self._d_model,),
            unit=self.manifest["unit"],
            codec=self.rows_codec(HookPoint.of(point)),
            chunk=self.manifest["chunk"],
        )

    def norms(self, point: Point) -> UnitArray:
        """(N,) float32 Euclidean norms of the rows."""
        return self._per_token(_name("norm", point), "float32")

    def kinds(self, point: Point) -> UnitArray:
        """(N,) uint8 what each row is: see data/store/kinds.py."""
        return self._per_token(_name("kind", point), "uint8")

    def moments(self, point: Point) -> UnitArray:
        """(units, 3, 2, d) float64 moments of each unit's rows, by kind."""
        units = -(-self._tokens // self.manifest["unit"])
        return self._moments(_name("moments", point), units, 1)

    def summary(self, point: Point) -> UnitArray:
        """(2, 3, 2, d) float64 moments of all [training, held-out] rows, by kind."""
        return self._moments(_name("summary", point), 2, 2)

    def of_point(self, point: Point) -> list[UnitArray]:
        """Every array of a point."""
        return [
            self.rows(point),
            self.norms(point),
            self.kinds(point),
            self.moments(point),
            self.summary(point),
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
