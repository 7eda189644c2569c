"""A source of rows: one hook point in one store. Rows of several sources stand side by side."""

from __future__ import annotations

from typing import NamedTuple

from data.site import HookPoint
from data.store.store import Store


class Source(NamedTuple):
    """The rows of one hook point in one store, (N, width)."""

    store: Store
    point: HookPoint

    @property
    def width(self) -> int:
        """Columns of its rows."""
        return self.store.d_model

    def __str__(self) -> str:
        return f"{self.point} in {self.store.name}"
