"""Is every byte of a store what was committed?"""

from __future__ import annotations

import random

import numpy as np

from data.errors import MismatchError, StoreError, differences
from data.store import retention
from data.store.place import Place
from data.store.repair import damage, require_store
from data.store.store import Store
from harvest.model import LanguageModel
from harvest.selfcheck import require_same


def verify(place: Place, lm: LanguageModel) -> str:
    """Check every digest of the store, and one random unit through the model; what was found to be
    right.

    Raises:
        StoreError: there is no store, or something is wrong; a line for each object.
    """
    require_store(place)
    if wrong := [line for _, lines in damage(place) for line in lines]:
        raise StoreError(
            "\n".join([*wrong, f"`python -m harvest action=repair store={place.name}` drops these"])
        )
    store = Store.open(place)
    recorded = {
        key: value for key, value in store.manifest["model"].items() if key != "chat_template"
    }
    if unequal := differences(recorded, lm.identity):
        raise MismatchError(
            f"store {store.name}",
            unequal,
            "Give the model it was made with as model= or model.path=.",
        )
    if not store.spine_complete:
        raise StoreError(
            f"{store.name}: some units of its text have no record; run its `python -m harvest` again"
        )
    have = np.flatnonzero(
        np.all([store.committed(layer) for layer in store.layers], axis=0)
    ).tolist()
    if not store.layers or not have:
        return f"{store.name}: every object holds the bytes that were committed; no unit has residuals yet"
    lm.isolation = store.manifest["isolation"]
    lm.truncate_(max(store.layers))
    kept = retention.read(place)
    unit = random.choice([unit for unit in have if not kept.is_freed(unit)] or have)
    require_same(store, lm, unit, store.layers)
    gone = (
        f"; the shards of {kept.freed} units are freed, as in a ring they may be"
        if kept.freed
        else ""
    )
    return f"{store.name}: every object holds the bytes that were committed; unit {unit}, recomputed, is the same{gone}"
