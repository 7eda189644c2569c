"""A run's directory: its settings, and where a stopped run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data import durable
from data.errors import MismatchError, StoreError, differences
from data.store.store import Store

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoint"
TIMINGS = "timings.jsonl"  # not in the metrics, which a killed run repeats byte for byte


def source_of(store: Store) -> dict[str, Any]:
    """What a store was harvested from, for users of an SAE who do not have the store."""
    model = {key: store.manifest["model"].get(key) for key in ("revision", "weights", "n_layers")}
    return {
        "model": store.manifest["model"]["id"],
        **model,
        "text": text_of(store),
        "context": store.context,
    }


def text_of(store: Store) -> str:
    """The name of a store's text: a data set's, or its sources'."""
    text = store.manifest["text"]
    if text["kind"] == "hub":
        return str(text["dataset"])
    return ", ".join(text.get("sources", [text["kind"]]))


def agree(
    run: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], here: Mapping[str, Any]
) -> list[str]:
    """Write config.yaml in a new run; in an old one, compare with it. Lines to tell the user.

    Args:
        settings: must be the same whenever the run goes on.
        facts: written beside them for the reader.
        here: the environment; a change of it is told, since the bits may change with it.

    Raises:
        MismatchError: the run was started with other settings.
    """
    if not (run / CONFIG).exists():
        foreign = [
            file.name
            for file in run.iterdir()
            if file.name != CHECKPOINTS and not durable.is_temporary(file)
        ]
        if foreign:
            raise StoreError(
                f"{run} is no run and holds other files ({foreign[0]}); choose another run="
            )
        whole = {"settings": settings, **facts, "environment": here}
        durable.write(run / CONFIG, [yaml.safe_dump(whole, sort_keys=False).encode()])
        return []
    recorded = read_config(run)
    old, there = recorded["settings"], recorded["environment"]
    if unequal := differences(old, settings):
        raise MismatchError(f"run {run}", unequal, "Use those settings to go on, or another run=.")
    return [
        f"{key} was {was!r} and is now {now!r}: the run goes on, but its bits may differ from an "
        "undisturbed run's"
        for key, (was, now) in differences(there, here).items()
    ]


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml of a run.

    Raises:
        StoreError: it is missing, or not what training wrote.
    """
    path = run / CONFIG
    if not path.is_file():
        raise StoreError(f"no run at {run}; train one with `python -m train store=... run={run}`")
    try:
        recorded = yaml.safe_load(path.read_bytes())
        if not isinstance(recorded["settings"], dict) or not isinstance(
            recorded["environment"], dict
        ):
            raise TypeError("settings")
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is not what training wrote; restore it, or choose another run="
        ) from error
    return dict(recorded)
