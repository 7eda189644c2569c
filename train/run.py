"""A run's directory: its settings, and where a stopped run goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data import durable, locks
from data.errors import MismatchError, SettingError, StoreError, caused, differences
from data.journal import tell
from data.store.store import Store
from train import sae_file

FOLDER = Path("runs")  # where runs go by default
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
    run: Path,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    here: Mapping[str, Any],
    unrecorded: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Write config.yaml in a new run; in an old one, compare with it. Lines to tell the user.

    Args:
        settings: must be the same whenever the run goes on.
        facts: written beside them for the reader.
        here: the environment; a change of it is told, since the bits may change with it.
        unrecorded: by group, the values of settings that are left out of `settings` at them.

    Raises:
        MismatchError: the run was started with other settings.
    """
    if not (run / CONFIG).exists():
        foreign = [
            file.name
            for file in run.iterdir()
            if file.name not in (CHECKPOINTS, locks.FILE) and not durable.is_temporary(file)
        ]
        holds_arms = any((folder / CONFIG).exists() for folder in run.iterdir())
        if foreign and not holds_arms:
            raise StoreError(
                f"{run} is no run and holds other files ({foreign[0]}); choose another run="
            )
        whole = {"settings": settings, **facts, "environment": here}
        durable.write(run / CONFIG, [yaml.safe_dump(whole, sort_keys=False).encode()])
        return []
    recorded = read_config(run)
    old, there = recorded["settings"], recorded["environment"]
    if unequal := differences(_with(unrecorded, old), _with(unrecorded, settings)):
        raise MismatchError(f"run {run}", unequal, "Use those settings to go on, or another run=.")
    return [
        f"{key} was {was!r} and is now {now!r}: the run goes on, but its bits may differ from an "
        "undisturbed run's"
        for key, (was, now) in differences(there, here).items()
    ]


def _with(
    unrecorded: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Recorded settings with those that are left out at their default."""
    whole = dict(settings)
    for group, defaults in unrecorded.items():
        whole[group] = {**defaults, **settings.get(group, {})}
    return whole


def named_or_newest(named: str | None) -> Path:
    """The run that run= names. Without a name: the one under runs/ that was finished last.

    Raises:
        SettingError: none is named, and none is finished.
    """
    return Path(named) if named else _newest(Path.cwd())


@cache  # the jobs of a multirun take the same one, which is said once
def _newest(here: Path) -> Path:
    """The run under `here`/runs that was finished last."""
    finished: list[tuple[int, Path]] = []
    for parent, folders, files in os.walk(FOLDER):
        if CONFIG in files:  # a run holds many files, and perhaps the arms of a multirun
            folders[:] = [name for name in folders if Path(parent, name, CONFIG).exists()]
        if {CONFIG, METRICS, sae_file.FILE} <= {*files}:
            run = Path(parent)
            finished.append(((run / sae_file.FILE).stat().st_mtime_ns, run))
    if not finished:
        raise SettingError(
            f"run= is missing, and there is no finished run under {FOLDER}/; train one with "
            "`python -m train`, or give the directory of one as run="
        )
    _, run = max(finished)
    tell(f"run={run}: the newest finished run under {FOLDER}/")
    return run


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
        got = f"{path} is not what training wrote"
        raise caused(error, got, "restore it, or choose another run=") from error
    return dict(recorded)
