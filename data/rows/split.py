"""Which rows are trained on: held-out units and some kinds of rows are left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data import order
from data.errors import StoreError
from data.store.kinds import BOS, ORDINARY, OUTLIER
from data.store.store import Store

TRAINING, HELD_OUT = range(2)


def parts(store: Store) -> list[list[int]]:
    """The training and the held-out units of a store."""
    held_out = order.held_out(store.units, store.manifest["seed"]).tolist()
    excepted = set(held_out)
    return [[unit for unit in range(store.units) if unit not in excepted], held_out]


@dataclass(frozen=True)
class Policy:
    """Which stored rows a reader serves, by their kind (data/store/kinds.py).

    Rows with NaN or infinity are never served.
    """

    drop_bos: bool = True  # leave out the BOS token of every piece
    drop_outliers: bool = True  # leave out other rows longer than ten median norms

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds that are served."""
        served = {BOS: not self.drop_bos, OUTLIER: not self.drop_outliers, ORDINARY: True}
        return tuple(kind for kind in served if served[kind])


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


def require_complete(store: Store, layer: int) -> None:
    """Raise StoreError unless every unit of `layer` is committed."""
    if layer not in store.layers:
        raise StoreError(f"layer {layer} is not in {store.name}; it has {store.layers}")
    if not store.complete(layer):
        raise StoreError(
            f"layer {layer} of {store.name} lacks {len(store.missing([layer]))} of {store.units} "
            "units; run the same `python -m harvest` command again to finish it"
        )


def training_units(store: Store) -> list[int]:
    """All units but the held-out ones."""
    held_out_units(store)
    return parts(store)[TRAINING]


def held_out(store: Store, layer: int, policy: Policy, batch: int) -> Iterator[torch.Tensor]:
    """Every kept row of the held-out units once, in stored order.

    Gives (n, d) bfloat16 with n <= `batch`.
    """
    for unit in held_out_units(store):
        keep = np.isin(store.kinds(layer, unit), policy.kinds)
        rows = torch.from_numpy(store.residuals(layer, unit)[keep]).view(torch.bfloat16)
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]
