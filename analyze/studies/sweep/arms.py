"""The arms of a sweep: the runs that runs= names, what their files record, how they differ."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_saes.analyze.subject import place_of_writes, recorded_stores
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.journal import read_metrics, tell
from residual_saes.data.rows.split import Policy
from residual_saes.train import sae_file
from residual_saes.train.ports import Ports, recorded_ports
from residual_saes.train.run import (
    CONFIG,
    METRICS,
    TIMINGS,
    is_finished,
    metrics_of,
    read_config,
    require,
    sae_digest,
)

SEEDS = ("seed", "data_seed")  # settings that change random numbers alone
_OF_IMPORTED = ("sae.kind", "sae.activation", "sae.d_sae", "sae.k")  # known of any library's SAE
_NEEDED = ("store", "layer", "tokens", "batch", "policy", "sae")  # of a run's settings


@dataclass(frozen=True)
class Arm:
    """One run of a sweep, as its files record it."""

    run: Path
    name: str  # the run's path below the folder that all arms share
    settings: dict[str, Any]  # by dotted key, without those of the store
    policy: Policy
    ports: Ports  # what it reads and writes
    config: Mapping[str, Any]  # config.yaml
    stores: list[tuple[str, str]]  # place and identity of each store, when the run was trained
    steps: int  # optimizer steps of the whole run
    records: list[dict[str, Any]]  # metrics.jsonl
    tokens_per_s: float | None
    sae: str | None  # digest of sae_final.pt; None: the run is not finished

    @classmethod
    def read(cls, run: Path, name: str) -> Arm:
        """An arm, finished or not.

        Raises:
            StoreError: the run's files are not what training wrote.
        """
        config = read_config(run)
        finished = is_finished(run)
        if "imported" in config:  # an SAE of another library, of whose training we know nothing
            config = {**config, "steps": 0}
            config["settings"] = {"tokens": 0, "batch": 0, **config["settings"]}
        settings = config["settings"]
        try:
            missing = [key for key in _NEEDED if key not in settings]
            own_settings = {key: value for key, value in settings.items() if key != "store"}
            return cls(
                run=run,
                name=name,
                settings=_flat(own_settings),
                policy=Policy.of(settings["policy"]),
                ports=recorded_ports(settings),
                config=config,
                stores=recorded_stores(config),
                steps=int(config["steps"]),
                records=[] if "imported" in config else _records(run, finished),
                tokens_per_s=None if "imported" in config else _speed(run),
                sae=sae_digest(run) if finished else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            lacks = f"; it lacks {', '.join(missing)}" if missing else ""
            raise StoreError(
                f"{run / CONFIG} is not what training wrote{lacks}; restore it"
            ) from error

    @property
    def place(self) -> int | str:
        """What it writes: arms that write the same are compared."""
        return place_of_writes(self.ports)

    @property
    def identity(self) -> str:
        """Digests of the run's stores."""
        return ", ".join(identity for _, identity in self.stores)

    @property
    def finished(self) -> bool:
        return self.sae is not None

    @property
    def is_imported(self) -> bool:
        """Whether it is an SAE of another library."""
        return "imported" in self.config

    def of(self, split: str, figure: str) -> list[tuple[int, float]]:
        """(tokens, figure) of each record of one split that has the figure."""
        points = []
        for record in self.records:
            if record["split"] == split and record.get(figure) is not None:
                points.append((record["tokens"], record[figure]))
        return points

    @property
    def last_held_out(self) -> dict[str, Any]:
        """The last held-out record; of a finished run it covers all held-out rows."""
        for record in reversed(self.records):
            if record["split"] == "held_out":
                return dict(record)
        return {}

    @property
    def step(self) -> int:
        """Optimizer steps that the records show as done."""
        return max((int(record["step"]) for record in self.records), default=0)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _records(run: Path, finished: bool) -> list[dict[str, Any]]:
    path = run / METRICS
    if not finished and (not path.exists() or b"\n" not in path.read_bytes()):
        return []  # training has not written its first line
    records = metrics_of(run)
    splits = set()
    for record in records:
        if not isinstance(record, dict) or not {"split", "step", "tokens"} <= record.keys():
            raise StoreError(f"{path} is not what training wrote; restore it")
        splits.add(record["split"])
    if finished and "held_out" not in splits:
        raise StoreError(f"{path} is not what training wrote; restore it")
    return records


def _speed(run: Path) -> float | None:
    """The last tokens/s on record; None if the file is missing or damaged, which is said.

    No other figure depends on this file.
    """
    try:
        require(run, TIMINGS)
        return float(read_metrics(run / TIMINGS)[-1]["tokens_per_s"])
    except StoreError as error:
        tell(f"no tokens/s of {run}: {error}")
    except (KeyError, TypeError, ValueError):
        tell(f"no tokens/s of {run}: {run / TIMINGS} is not what training wrote")
    return None


# -- which runs ------------------------------------------------------------------------------------


def find(runs: str | Sequence[Any]) -> list[Path]:
    """The runs that `runs=` names, each once.

    Args:
        runs: paths and patterns, in a list or between commas. A folder that is no run stands for
            the runs in it. So does a run that is named alone and holds the arms of a multirun.

    Raises:
        SettingError: a part of `runs` names no run.
    """
    texts = [runs] if isinstance(runs, str) else [str(text) for text in runs]
    paths_of = [_paths(text) for text in texts]
    alone = sum(map(len, paths_of)) == 1
    by_path: dict[Path, Path] = {}
    for text, paths in zip(texts, paths_of, strict=True):
        matched = []
        for path in paths:
            matched += _runs_at(path, alone)
        if not matched:
            raise _none(text)
        for run in matched:
            by_path[run.absolute()] = run
    if not by_path:
        raise _none("[]")
    return list(by_path.values())


def _none(text: str) -> SettingError:
    return SettingError(
        f"no run matches runs={text}; give directories of `python -m train` runs, "
        "the one that holds them, or a pattern such as 'runs/SWEEP/*'"
    )


def _paths(text: str) -> list[Path]:
    """The paths that text between commas matches.

    The name of an arm's directory has commas itself. So each path is the longest run of parts that
    matches.
    """
    parts = text.split(",")
    paths: list[Path] = []
    start = 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            if matched := _matches(",".join(parts[start:end]).strip()):
                break
        else:
            raise _none(",".join(parts[start:]))
        paths += matched
        start = end
    return paths


def _matches(text: str) -> list[Path]:
    # Path.exists would raise for a text longer than a file's name may be.
    if os.path.exists(text):
        return [Path(text)]
    return [Path(match) for match in sorted(glob.glob(text))]


def _runs_at(path: Path, alone: bool) -> list[Path]:
    if not path.is_dir():
        return []
    if _is_run(path) and not alone:
        return [path]
    arms = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
    return [path] if _is_run(path) and not arms else arms


def _is_run(folder: Path) -> bool:
    """Whether training wrote here. A run that lost its config.yaml counts, as a damaged one."""
    return any((folder / name).exists() for name in (CONFIG, METRICS, sae_file.FILE))


def common_folder(runs: Sequence[Path]) -> Path:
    """The folder that holds all runs."""
    parents = {run.absolute().parent: run.parent for run in runs}
    if len(parents) == 1:
        return next(iter(parents.values()))
    return Path(os.path.commonpath(parents))


def read_all(runs: Sequence[Path]) -> tuple[list[Arm], dict[str, str]]:
    """The arms that can be read, and the error of each damaged one by its name.

    Raises:
        StoreError: two arms are from different stores.
    """
    top = common_folder(runs).absolute()
    arms: list[Arm] = []
    damaged: dict[str, str] = {}
    for run in runs:
        name = os.path.relpath(run.absolute(), top)
        try:
            arms.append(Arm.read(run, name))
        except StoreError as error:
            damaged[name] = str(error)
    for arm in arms[1:]:
        if arm.identity != arms[0].identity:
            raise StoreError(
                f"{_origin(arms[0])} and {_origin(arm)}: arms of different stores are not "
                "compared; narrow runs="
            )
    return arms, damaged


def _origin(arm: Arm) -> str:
    places = ", ".join(place for place, _ in arm.stores)
    return f"{arm.run} is from {places} ({arm.identity})"


# -- their settings --------------------------------------------------------------------------------


def varying(arms: Sequence[Arm]) -> list[str]:
    """Keys of the settings that are not the same in all arms, in the order of config.yaml.

    Of an SAE of another library few settings are known, and only those count.
    """
    values: dict[str, set[str]] = {}
    for arm in arms:
        for key in arm.settings:
            values.setdefault(key, set())
    for key, distinct in values.items():
        known = [arm for arm in arms if key in _OF_IMPORTED or not arm.is_imported]
        distinct |= {exact(arm.settings.get(key)) for arm in known}
    return [key for key, distinct in values.items() if len(distinct) > 1]


def exact(value: Any) -> str:
    """A setting as text, equal only for equal values: 0 and 0.0 are equal, 1 and true are not."""
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, sort_keys=True, default=str)


def short(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted key's last part, or the whole key where two keys share the last part."""
    last = {key: key.rpartition(".")[2] for key in keys}
    times = Counter(last.values())
    return {key: part if times[part] == 1 else key for key, part in last.items()}


def labels(names: Sequence[str]) -> dict[str, str]:
    """Each arm's name without the folder and the overrides that all arms share.

    The whole names, if a short name would be empty or not unique.
    """
    if len({os.path.dirname(name) for name in names}) == 1:
        parts = [os.path.basename(name).split(",") for name in names]
    else:
        parts = [name.split(",") for name in names]
    # Names without a comma were given by hand, not made of overrides.
    overrides = [set(split) for split in parts if len(split) > 1]
    shared = set.intersection(*overrides) if len(overrides) > 1 else set()
    left = [",".join(part for part in split if part not in shared) for split in parts]
    distinct = all(left) and len(set(left)) == len(left)
    return dict(zip(names, left if distinct else names, strict=True))
