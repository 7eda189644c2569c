"""The store that is meant where store= is not given: `python -m harvest` makes it, training takes
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data.errors import PipelineError, SettingError
from data.site import HookPoint, Point
from data.store import manifest, retention
from data.store.coming import is_announced
from data.store.place import place_of
from data.store.store import Store

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


def find(point: Point | None) -> tuple[str, str]:
    """The store to train from, and why it is this one.

    It is the default harvest's if there is one, else the only one in `FOLDER` whose rows are
    complete.

    Args:
        point: hook point that training needs; None: the store's first.

    Raises:
        SettingError: there is no such store, or there are several.
    """
    harvested = place_of(HARVESTED)
    if manifest.exists(harvested) or is_announced(harvested):
        return HARVESTED, "what `python -m harvest` makes by default"
    folders = sorted(path for path in FOLDER.glob("*/") if manifest.exists(place_of(path)))
    found = [_look(path, point) for path in folders]
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


def _look(path: Path, point: Point | None) -> Found:
    try:
        store = Store.open(path)
    except PipelineError:
        return Found(path, False, "damaged")
    if retention.read(store.place).span is not None:
        return Found(path, False, "a ring, whose rows are freed")
    wanted = min(store.points, default=None) if point is None else HookPoint.of(point)
    if wanted is None or wanted not in store.points:
        return Found(path, False, "no layer yet" if wanted is None else f"no {wanted}")
    if store.complete(wanted):
        return Found(path, True, "complete")
    done = int(store.committed(wanted).sum())
    return Found(path, False, f"{wanted}: {done} of {store.units} units")
