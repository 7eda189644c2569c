"""Whether every byte of a store is what was committed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from data.errors import MismatchError, StoreError, differences
from data.journal import tell
from data.store import retention, verified
from data.store.place import Place
from data.store.repair import damage, require_store
from data.store.store import Store
from harvest.model import LanguageModel
from harvest.selfcheck import require_same
from harvest.site import SITES


def verify(place: Place, open_model: Callable[[int], LanguageModel]) -> str:
    """Check every digest of the store, and recompute one random unit; the good news as a line.

    A verification that was stopped goes on where it was (data/store/verified.py).

    Args:
        open_model: loads the model up to a layer. It may take minutes, so it comes last.

    Raises:
        StoreError: there is no store, or something is wrong; a line is told of each object.
        MismatchError: the store was made with another model.
    """
    require_store(place)
    wrong: list[str] = []
    with verified.kept(place) as sound:
        for _, lines in damage(place, sound):
            wrong += lines
    if wrong:
        way_out = f"`python -m harvest action=repair store={place.name}` drops what is named"
        tell(*wrong[:-1])
        raise StoreError(f"{wrong[-1]}; {way_out}")
    store = Store.open(place)
    if not store.spine_complete:
        raise StoreError(
            f"{store.name}: some units of its text have no record; run its `python -m harvest` "
            "again"
        )
    intact = f"{store.name}: every object holds the bytes that were committed"
    committed = [store.committed(layer) for layer in store.layers]
    whole = np.flatnonzero(np.all(committed, axis=0)).tolist() if committed else []
    lm = open_model(max(store.layers, default=0))
    require_model(store, lm)
    if not whole:
        return f"{intact}; no unit has residuals yet"

    lm.isolation = store.manifest["isolation"]
    lm.site = SITES[store.manifest["site"]]
    kept = retention.read(place)
    unit = random.choice([unit for unit in whole if not kept.is_freed(unit)] or whole)
    tell(f"every digest is right; recomputing unit {unit}")
    require_same(store, lm, unit, store.layers)
    freed = ""
    if kept.freed:
        freed = f"; the shards of {kept.freed} units are freed, as in a ring they may be"
    return f"{intact}; unit {unit}, recomputed, is the same{freed}"


def require_model(store: Store, lm: LanguageModel) -> None:
    """Raise MismatchError if the store was made with another model."""
    recorded = dict(store.manifest["model"])
    recorded.pop("chat_template", None)  # of the text, not of the residuals
    if unequal := differences(recorded, lm.identity):
        raise MismatchError(
            f"store {store.name}",
            unequal,
            "Give the model it was made with as model= or model.path=.",
        )
