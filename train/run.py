"""A run's directory: its files, its settings, and the record that vouches for them.

digests.json (data/digests.py) names config.yaml from the start. A run is finished once it names
sae_final.pt, metrics.jsonl and timings.jsonl too: `seal` writes it after them. Whoever reads a
file of a run asks here, so that a bit that flipped is an error and never another figure. A run of
an earlier version has no such record. It is read all the same, and one line says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from residual_saes.data import digests, durable, locks
from residual_saes.data.digests import Digests
from residual_saes.data.durable import Written
from residual_saes.data.errors import MismatchError, SettingError, StoreError, caused, differences
from residual_saes.data.foreign import reading, yaml_object
from residual_saes.data.journal import read_metrics, tell
from residual_saes.data.store.store import Store
from residual_saes.train import checkpoint, sae_file
from residual_saes.train.sae import SAE

FOLDER = Path("runs")  # where runs go by default
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoint"
TIMINGS = "timings.jsonl"  # not in the metrics, which a killed run repeats byte for byte
FILES = (CONFIG, sae_file.FILE, METRICS, TIMINGS)  # of a finished run


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
    unrecorded: Mapping[str, Any],
) -> list[str]:
    """Write config.yaml in a new run; in an old one, compare with it. Lines to tell the user.

    Args:
        settings: must be the same whenever the run goes on.
        facts: written beside them for the reader.
        here: the environment; a change of it is told, since the bits may change with it.
        unrecorded: the values at which settings are left out of `settings`, some by group.

    Raises:
        MismatchError: the run was started with other settings.
    """
    whole = {"settings": settings, **facts, "environment": here}
    content = yaml.safe_dump(whole, sort_keys=False).encode()
    kept = record(run)
    if kept is None and not (run / CONFIG).exists():
        _require_empty(run)
        _begin(run, content)
        return []
    lines = []
    if kept and (wrong := kept.fault(CONFIG)):
        written = Written(len(content), durable.digest(content))
        if kept.files.get(CONFIG) != written:
            raise StoreError(
                f"{run / CONFIG} {wrong}; the settings and the environment that the run began with "
                "write it again, or restore it"
            )
        durable.write(run / CONFIG, [content])
        lines = [f"{run / CONFIG} {wrong}: it was written again, and now it does"]
    recorded = _parsed(run)
    old, there = recorded["settings"], recorded["environment"]
    if unequal := differences(_with(unrecorded, old), _with(unrecorded, settings)):
        raise MismatchError(f"run {run}", unequal, "Use those settings to go on, or another run=.")
    if kept is None and not has_trained(run):  # killed before its first record
        _begin(run, content)
        return []
    if kept is None and not (run / sae_file.FILE).exists():  # of an earlier version
        digests.write(run, [CONFIG])
    lines += [
        f"{key} was {was!r} and is now {now!r}: the run goes on, but its bits may differ from an "
        "undisturbed run's"
        for key, (was, now) in differences(there, here).items()
    ]
    return lines


def recorded_ways(run: Path, here: Mapping[str, Any]) -> dict[str, str] | None:
    """The ways (train/ways.py) that a run recorded when it began; {} of an earlier version.

    None: it has not begun, its record is damaged, or it began on another device.

    Args:
        here: the environment.
    """
    kept = record(run)
    if not (run / CONFIG).exists() or (kept and kept.fault(CONFIG)):
        return None
    environment = _parsed(run)["environment"]
    if environment.get("device") != here["device"]:
        return None
    return ways_in(environment)


def ways_in(environment: Mapping[str, Any]) -> dict[str, str]:
    """The ways in a recorded environment."""
    recorded = environment.get("ways", {})
    return {str(what): str(way) for what, way in recorded.items()}


def _require_empty(run: Path) -> None:
    """Raise StoreError if a new run's directory holds anything but arms of a multirun."""
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


def has_trained(run: Path) -> bool:
    """Whether a run has a checkpoint, or is finished."""
    return (run / sae_file.FILE).exists() or any((run / CHECKPOINTS).glob("*.json"))


def _begin(run: Path, config: bytes) -> None:
    """Write config.yaml and the record of it."""
    digests.put(run, {CONFIG: durable.write(run / CONFIG, [config])})


def _with(unrecorded: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings with those that are left out at their default."""
    whole = dict(settings)
    for name, default in unrecorded.items():
        if isinstance(default, Mapping):
            whole[name] = {**default, **settings.get(name, {})}
        else:
            whole.setdefault(name, default)
    return whole


def named_or_newest(named: str | None) -> Path:
    """The run that run= names. Without a name: the one under runs/ that was finished last.

    Raises:
        SettingError: none is named, and none is finished.
    """
    return Path(named) if named else _newest(Path.cwd())


def _may_be_finished(run: Path) -> bool:
    try:
        return is_finished(run)
    except StoreError:
        return True  # whoever opens the run says what is wrong


@cache  # the jobs of a multirun take the same one, which is said once
def _newest(here: Path) -> Path:
    """The run under `here`/runs that was finished last."""
    finished: list[tuple[int, Path]] = []
    for parent, folders, files in os.walk(FOLDER):
        if CONFIG in files:  # a run holds many files, and perhaps the arms of a multirun
            folders[:] = [name for name in folders if Path(parent, name, CONFIG).exists()]
        if {CONFIG, METRICS, sae_file.FILE} <= {*files} and _may_be_finished(Path(parent)):
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


# -- what vouches for a run's files ----------------------------------------------------------------


def record(run: Path) -> Digests | None:
    """What a run's files must hold; None if the run is of an earlier version, or not begun.

    Raises:
        StoreError: the record is damaged.
    """
    way_out = f"delete it, and `python -m train ... run={run}` records the run's files again"
    return digests.read(run, way_out)


def seal(run: Path, files: Mapping[str, Written]) -> None:
    """Record the files of a finished run, by their names, beside its config.yaml.

    Raises:
        StoreError: the run was finished before, with another SAE or other metrics.
    """
    kept = record(run)
    recorded = kept.files if kept else {}
    for name in (sae_file.FILE, METRICS):
        if recorded.get(name, files.get(name)) != files.get(name):
            raise StoreError(
                f"{run / name} came out other than {run / digests.FILE} records, so the "
                "environment is another; delete that record to take what came out"
            )
    config = recorded.get(CONFIG) or durable.digest_file(run / CONFIG)
    digests.put(run, {CONFIG: config, **files})


def drop_damaged_timings(kept: Digests) -> None:
    """Remove a damaged timings.jsonl from a finished run and its record."""
    if TIMINGS in kept.files and (wrong := kept.fault(TIMINGS)):
        path = kept.folder / TIMINGS
        left = {name: written for name, written in kept.files.items() if name != TIMINGS}
        digests.put(kept.folder, left, kept.about)
        path.unlink(missing_ok=True)
        tell(f"{path} {wrong}: it was dropped, for it holds speeds alone")


def require(run: Path, name: str) -> None:
    """Raise StoreError if a file is not what the run's record says; of none, one line tells.

    The logs of a run that is not finished must begin with what its newest checkpoint saw.
    """
    kept = record(run)
    if kept is None:
        _tell_unvouched(run)
    elif name in kept.files:
        kept.require([name], way_out(kept, name))
    elif name in (METRICS, TIMINGS) and sae_file.FILE not in kept.files:
        _require_begin(run, name, way_out(kept, name))


def _require_begin(run: Path, name: str, way_out: str) -> None:
    """Raise StoreError if a log lacks what the newest checkpoint saw."""
    logs = checkpoint.seen(run / CHECKPOINTS)
    if logs is None:
        return
    seen = logs[name == TIMINGS]
    path = run / name
    try:
        with path.open("rb") as file:
            found = durable.digest(file.read(seen.bytes))
    except OSError as error:
        raise caused(error, f"{path} cannot be read: {error.strerror}", way_out) from error
    if found != seen.xxh3_128:
        got = f"{path} does not hold the {seen.bytes} bytes that the checkpoint saw"
        raise StoreError(f"{got}; {way_out}")


@cache  # once a command
def _tell_unvouched(run: Path) -> None:
    tell(
        f"{run} has no {digests.FILE}: it is of an earlier version, and nothing vouches for its "
        f"files; `python -m train ... run={run}` records them"
    )


def way_out(kept: Digests, name: str) -> str:
    """How a damaged file of a run is mended."""
    if imported := kept.about.get("imported"):
        return f"run={imported} makes it again"
    again = f"`python -m train ... run={kept.folder}`"
    return {
        CONFIG: f"{again} writes it again, if settings and environment are the same",
        sae_file.FILE: f"{again} writes it again from the last checkpoint",
        TIMINGS: f"{again} drops it: it holds speeds alone",
    }.get(name, "restore it, or train the run again in another run=")


def is_finished(run: Path) -> bool:
    """Whether the record names the SAE; of a run of an earlier version, whether the SAE is there.

    Raises:
        StoreError: the record is damaged.
    """
    kept = record(run)
    return sae_file.FILE in kept.files if kept else (run / sae_file.FILE).is_file()


def sae_digest(run: Path) -> str:
    """xxh3_128 of a finished run's sae_final.pt. The file was read, and is what was recorded.

    Raises:
        StoreError: the run is not finished, or the file is damaged.
    """
    if not is_finished(run):
        raise StoreError(
            f"run {run} is not finished: it has no whole {sae_file.FILE}; "
            "run its `python -m train` again"
        )
    require(run, sae_file.FILE)
    if kept := record(run):
        return kept.files[sae_file.FILE].xxh3_128
    path = run / sae_file.FILE
    try:
        return durable.digest_file(path).xxh3_128
    except OSError as error:
        raise caused(error, f"{path} cannot be read: {error.strerror}", "restore it") from error


def sae_of(run: Path, device: torch.device | str = "cpu") -> tuple[SAE, str]:
    """The SAE of a finished run, and the digest of its file. Raises StoreError as `sae_digest`."""
    digest = sae_digest(run)
    return sae_file.load(run / sae_file.FILE, device), digest


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl.

    Raises:
        StoreError: the file is missing or damaged.
    """
    require(run, METRICS)
    return read_metrics(run / METRICS)


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml of a run.

    Raises:
        StoreError: it is missing, or not what training wrote.
    """
    path = run / CONFIG
    if not path.is_file() and record(run) is None:
        raise StoreError(f"no run at {run}; train one with `python -m train store=... run={run}`")
    require(run, CONFIG)
    return _parsed(run)


def _parsed(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    way_out = "restore it, or choose another run="
    recorded = yaml_object(path, way_out)
    with reading(f"{path} is not what training wrote", way_out):
        environment = recorded["environment"]
        ways = environment.get("ways", {})
        for part in (recorded["settings"], environment, recorded.get("source", {}), ways):
            if not isinstance(part, dict):
                raise TypeError("a group of it is no mapping")
    return recorded
