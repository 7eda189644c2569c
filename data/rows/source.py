"""A source of rows: one hook point in one store. Rows of several sources stand side by side.

The sources of a reader are hook points of one store, or of two stores of the same tokens
(data/rows/aligned.py). Row i of each is of the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.data.errors import StoreError
from residual_saes.data.site import RESID_POST, HookPoint, Point
from residual_saes.data.store.kinds import NON_FINITE
from residual_saes.data.store.store import Store


class Source(NamedTuple):
    """The rows of one hook point in one store, (N, width)."""

    store: Store
    point: HookPoint

    @classmethod
    def of(cls, store: Store, point: Point) -> Source:
        """The rows of a hook point by its name; a number is the resid_post of that layer."""
        return cls(store, HookPoint.of(point))

    @property
    def width(self) -> int:
        """Columns of its rows."""
        return self.store.d_model

    def __str__(self) -> str:
        return f"{self.point} in {self.store.name}"

    def rows(self, unit: int) -> NDArray[np.uint16]:
        """(n, width) bfloat16 bits of a unit's stored rows; raises StoreError as the store does."""
        return self.store.residuals(self.point, unit)

    def norms(self, unit: int) -> NDArray[np.float32]:
        """(n,) Euclidean norms of a unit's stored rows."""
        return self.store.norms(self.point, unit)

    def committed(self) -> NDArray[np.bool_]:
        """(units,) which units are there and taken in."""
        return self.store.committed(self.point)

    def counts(self, units: Sequence[int], kind: int) -> NDArray[np.int32]:
        """(units, C) rows of a kind in every inner chunk of some committed units."""
        counts: NDArray[np.int32] = self.store.ledger.points[self.point].chunks[units, :, kind]
        return counts

    def require_complete(self) -> None:
        """Raise StoreError unless every unit is committed."""
        store = self.store
        if self.point not in store.points:
            there = ", ".join(map(str, store.points)) or "no rows yet"
            site = "" if self.point.site == RESID_POST else f"site={self.point.site} "
            raise StoreError(
                f"{self.point} is not in {store.name}; it has {there}; `python -m harvest "
                f"{site}layer={self.point.layer} store={store.name}` adds it"
            )
        if not store.complete(self.point):
            raise StoreError(
                f"{self.point} of {store.name} lacks {store.lacking([self.point])} of "
                f"{store.units} units; run the same `python -m harvest` command again to finish it"
            )


def kinds_of(sources: Sequence[Source], unit: int) -> NDArray[np.uint8]:
    """(n,) the kind of each of a unit's rows, of all sources together.

    Of finite rows the first kind in the order BOS, OUTLIER, ORDINARY that some source has;
    NON_FINITE where some source's row is not finite.
    """
    kinds, *others = (source.store.kinds(source.point, unit) for source in sources)
    for other in others:
        finite = (kinds != NON_FINITE) & (other != NON_FINITE)
        kinds = np.where(finite, np.minimum(kinds, other), NON_FINITE).astype(np.uint8)
    return kinds
