"""Which rows are trained on: held-out units, some kinds of rows and some tokens are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows import source as rows_source
from residual_saes.data.rows.source import Source
from residual_saes.data.site import Point
from residual_saes.data.store.kinds import BOS, ORDINARY, OUTLIER
from residual_saes.data.store.store import Store

TRAINING, HELD_OUT = range(2)


def parts(store: Store) -> list[list[int]]:
    """The training and the held-out units of a store."""
    held_out = order.held_out(store.units, store.manifest["seed"]).tolist()
    excepted = set(held_out)
    return [[unit for unit in range(store.units) if unit not in excepted], held_out]


# Added to the kind of a row that is left out by its token alone. It is never stored.
EXCLUDED = 4


@dataclass(frozen=True)
class Policy:
    """Which stored rows a reader serves, by their kind (data/store/kinds.py) and their token.

    Rows with NaN or infinity are never served.
    """

    drop_bos: bool = True  # leave out the BOS token of every piece
    drop_outliers: bool = True  # leave out other rows longer than ten median norms
    drop_tokens: tuple[int, ...] = ()  # token ids whose rows are left out, ascending

    def __post_init__(self) -> None:
        if (
            self.drop_tokens != tuple(sorted(set(self.drop_tokens)))
            or min(self.drop_tokens, default=0) < 0
        ):
            raise SettingError(
                f"drop_tokens={list(self.drop_tokens)} must be token ids from 0 on, each once"
            )

    @staticmethod
    def of(recorded: Mapping[str, Any]) -> Policy:
        """The policy that a run recorded."""
        return Policy(**{**recorded, "drop_tokens": tuple(recorded.get("drop_tokens", ()))})

    def recorded(self) -> dict[str, Any]:
        """What a run records. Without drop_tokens, it is what runs recorded before it was there."""
        kinds = {"drop_bos": self.drop_bos, "drop_outliers": self.drop_outliers}
        return {**kinds, "drop_tokens": list(self.drop_tokens)} if self.drop_tokens else kinds

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds that are served."""
        served = {BOS: not self.drop_bos, OUTLIER: not self.drop_outliers, ORDINARY: True}
        return tuple(kind for kind in served if served[kind])

    def kinds_of(self, store: Store, point: Point, unit: int) -> NDArray[np.uint8]:
        """(n,) the kind of each of a unit's stored rows. A row is served if its kind is in `kinds`.

        `EXCLUDED` is added where the kind is served and the token is not.
        """
        return self.kinds_in([Source.of(store, point)], unit)

    def kinds_in(self, sources: Sequence[Source], unit: int) -> NDArray[np.uint8]:
        """(n,) the same of the rows of several sources, which are kept or left out together."""
        kinds = rows_source.kinds_of(sources, unit)
        if not self.drop_tokens:
            return kinds
        store = sources[0].store
        dropped = self.tokens_dropped(store, unit)[store.permutation(unit)]
        excluded = dropped & np.isin(kinds, self.kinds)
        return np.where(excluded, kinds + EXCLUDED, kinds).astype(np.uint8)

    def keeps(self, sources: Sequence[Source], unit: int) -> NDArray[np.bool_]:
        """(n,) which of a unit's stored rows are served."""
        return np.isin(self.kinds_in(sources, unit), self.kinds)

    def tokens_dropped(self, store: Store, unit: int) -> NDArray[np.bool_]:
        """(n,) which tokens of a unit drop_tokens names, in the order of the text."""
        return np.isin(store.tokens(unit).ravel(), self.drop_tokens)


def stored_kind(kinds: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n,) `kinds` without what `Policy.kinds_of` added."""
    return kinds % EXCLUDED


def held_out_units(store: Store) -> list[int]:
    """Units that are never trained on.

    Raises:
        StoreError: the store has a single unit, so nothing can be held out.
    """
    units = parts(store)[HELD_OUT]
    if not units:
        raise StoreError(
            f"{store.name} has a single unit of {store.unit_tokens} tokens, so nothing can be held "
            "out; harvest more tokens, or again with a smaller unit="
        )
    return units


def require_complete(store: Store, point: Point) -> None:
    """Raise StoreError unless every unit of a hook point is committed."""
    Source.of(store, point).require_complete()


def training_units(store: Store) -> list[int]:
    """All units but the held-out ones."""
    held_out_units(store)
    return parts(store)[TRAINING]


def held_out(sources: Sequence[Source], policy: Policy, batch: int) -> Iterator[torch.Tensor]:
    """Every kept row of the held-out units once, in stored order.

    Gives (n, sum of the sources' widths) bfloat16 with n <= `batch`.
    """
    for unit in held_out_units(sources[0].store):
        keep = policy.keeps(sources, unit)
        parts = [torch.from_numpy(source.rows(unit)[keep]) for source in sources]
        rows = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(torch.bfloat16)
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]
