"""Whether every byte of a store is what was committed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from residual_saes.data.errors import MismatchError, StoreError, differences
from residual_saes.data.journal import tell
from residual_saes.data.store import retention, verified
from residual_saes.data.store.ledger import spine_key
from residual_saes.data.store.place import Place
from residual_saes.data.store.repair import damage, require_store
from residual_saes.data.store.store import Store
from residual_saes.harvest.attention import Attention
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.selfcheck import require_same


def verify(place: Place, open_model: Callable[[int], LanguageModel]) -> str:
    """Check every digest of the store, and recompute one random unit; the good news as a line.

    A verification that was stopped goes on where it was (data/store/verified.py). A harvest may be
    at work in the store, or may have been killed: what it has committed is checked.

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
    _require_no_hole(store)
    intact = f"{store.name}: every object holds the bytes that were committed"
    committed = [store.committed(point) for point in store.points]
    whole = np.flatnonzero(np.all(committed, axis=0)).tolist() if committed else []
    if not store.spine_complete or len(whole) < store.units:
        intact += f" so far: {len(whole)} of {store.units} units have rows of every hook point"
    lm = open_model(max((point.layer for point in store.points), default=0))
    require_model(store, lm)
    kept = retention.read(place)
    staying = [unit for unit in whole if kept.stays(unit)]  # a ring may free others meanwhile
    if not staying:
        return f"{intact}; there is no unit that can be recomputed"

    lm.isolation = store.manifest["isolation"]
    lm.attend_by_(Attention.of(store.manifest.get("attention")))
    unit = random.choice(staying)
    tell(f"every digest is right; recomputing unit {unit}")
    require_same(store, lm, unit, store.points)
    freed = ""
    if kept.freed:
        freed = f"; the rows of {kept.freed} units are not there, as in a ring or a thin store"
    return f"{intact}; unit {unit}, recomputed, is the same{freed}"


def _require_no_hole(store: Store) -> None:
    """Raise StoreError if a unit of the spine has no record while a later one, or the end, has.

    The text is read in order, so a harvest that is at work or was stopped leaves no such hole.
    """
    there = store.ledger.spine_rows != 0
    last = store.units if store.spine_end else int(np.append(0, np.flatnonzero(there) + 1).max())
    for unit in np.flatnonzero(~there[:last]).tolist():
        if not store.place.exists(spine_key(unit)):  # else it came while the names were listed
            raise StoreError(
                f"{store.name}: unit {unit} of its text has no record, and later ones have; run "
                "its `python -m harvest` again"
            )


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
