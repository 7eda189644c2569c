"""The store that is meant where store= is not given: `python -m harvest` makes it, training takes
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from residual_saes.data.errors import PipelineError, SettingError
from residual_saes.data.site import HookPoint
from residual_saes.data.store import manifest, retention
from residual_saes.data.store.coming import is_announced
from residual_saes.data.store.place import place_of
from residual_saes.data.store.store import Store
from residual_saes.data.store.thin import Thin

FOLDER = Path("activations")


def path_of(model: str, text: str) -> str:
    """Where the harvest of a text by a model goes."""
    return str(FOLDER / f"{model}_{text}.zarr")


# What `python -m harvest` makes by the defaults of conf/harvest.yaml; a test compares.
HARVESTED = path_of("gemma-4-E4B", "fineweb_edu")


class Found(NamedTuple):
    """A store that can be trained from, or not."""

    path: Path
    complete: bool
    state: str  # for people


def find(needed: Callable[[Store], Sequence[HookPoint]]) -> tuple[str, str]:
    """The store to train from, and why it is this one.

    It is the default harvest's if there is one, else the only one in `FOLDER` whose rows are
    complete.

    Args:
        needed: the hook points that training needs of a store; it raises SettingError where they
            cannot be there.

    Raises:
        SettingError: there is no such store, or there are several.
    """
    harvested = place_of(HARVESTED)
    if manifest.exists(harvested) or is_announced(harvested):
        return HARVESTED, "what `python -m harvest` makes by default"
    folders = sorted(path for path in FOLDER.glob("*/") if manifest.exists(place_of(path)))
    found = [_look(path, needed) for path in folders]
    complete = [store.path for store in found if store.complete]
    if len(complete) == 1:
        return str(complete[0]), f"the only complete store in {FOLDER}/"
    if not found:
        raise SettingError(
            f"store= is missing, and there is no store in {FOLDER}/; make one with "
            "`python -m harvest`, or give the path of one as store="
        )
    listed = ", ".join(f"{store.path} ({store.state})" for store in found)
    if complete:
        raise SettingError(
            f"store= is missing, and several stores are complete: {listed}; "
            f"give one, as store={complete[0]}"
        )
    raise SettingError(
        f"store= is missing, and no store is complete: {listed}; "
        "its own `python -m harvest` command finishes one"
    )


def _look(path: Path, needed: Callable[[Store], Sequence[HookPoint]]) -> Found:
    try:
        store = Store.open(path)
    except PipelineError:
        return Found(path, False, "damaged")
    if isinstance(retention.read(store.place), Thin):
        return Found(path, False, "thin, for studies alone")
    if retention.read(store.place).span is not None:
        return Found(path, False, "a ring, whose rows are freed")
    if not store.points:
        return Found(path, False, "no layer yet")
    try:
        points = needed(store)
    except SettingError:
        return Found(path, False, f"only {', '.join(map(str, store.points))}")
    for point in points:
        if point not in store.points:
            return Found(path, False, f"no {point}")
        if not store.complete(point):
            done = int(store.committed(point).sum())
            return Found(path, False, f"{point}: {done} of {store.units} units")
    return Found(path, True, "complete")
