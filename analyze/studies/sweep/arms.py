"""The arms of a sweep: which directories are meant, what each run's files say, and in which
settings they differ.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import SettingError, StoreError
from data.journal import read_metrics
from data.rows.split import Policy
from train import sae_file
from train.run import CONFIG, METRICS, TIMINGS, read_config

SEEDS = ("seed", "data_seed")  # settings that only say which chance
_NEEDED = ("store", "layer", "tokens", "batch", "policy", "sae")  # of a run's settings


@dataclass(frozen=True)
class Arm:
    """One run of a sweep, as its files have it."""

    run: Path
    name: str  # its directory, below the one that all arms share
    settings: dict[str, Any]  # dotted keys; those of the store are left out
    policy: Policy
    layer: int
    identity: str  # digest of its store
    store_path: str  # where the store was
    steps: int  # optimizer steps of the whole run
    records: list[dict[str, Any]]  # metrics.jsonl
    tokens_per_s: float | None
    finished: bool  # whether sae_final.pt is there

    @classmethod
    def read(cls, run: Path, name: str) -> Arm:
        """An arm, finished or not.

        Raises:
            StoreError: its files are not what training wrote.
        """
        config, finished = read_config(run), (run / sae_file.FILE).is_file()
        settings = config["settings"]
        try:
            missing = [key for key in _NEEDED if key not in settings]
            return cls(
                run=run,
                name=name,
                settings=_flat({key: value for key, value in settings.items() if key != "store"}),
                policy=Policy(**settings["policy"]),
                layer=int(settings["layer"]),
                identity=str(settings["store"]["identity"]),
                store_path=str(config["store_path"]),
                steps=int(config["steps"]),
                records=_records(run / METRICS, finished),
                tokens_per_s=_speed(run / TIMINGS),
                finished=finished,
            )
        except (KeyError, TypeError, ValueError) as error:
            lacks = f"; it lacks {', '.join(missing)}" if missing else ""
            raise StoreError(
                f"{run / CONFIG} is not what training wrote{lacks}; restore it"
            ) from error

    def of(self, split: str, figure: str) -> list[tuple[int, float]]:
        """(tokens, figure) of each record of one split that has it."""
        found = [record for record in self.records if record["split"] == split]
        return [
            (record["tokens"], record[figure]) for record in found if record.get(figure) is not None
        ]

    @property
    def last_held_out(self) -> dict[str, Any]:
        """The last held-out record; of a finished run it is of all held-out rows, at the end."""
        return next(
            (record for record in reversed(self.records) if record["split"] == "held_out"), {}
        )

    @property
    def step(self) -> int:
        """Optimizer steps that are known to be done."""
        return max((int(record["step"]) for record in self.records), default=0)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return found


def _records(path: Path, finished: bool) -> list[dict[str, Any]]:
    if not finished and (not path.exists() or b"\n" not in path.read_bytes()):
        return []  # it has not come to its first line
    records = read_metrics(path)
    sound = all(
        isinstance(record, dict) and {"split", "step", "tokens"} <= record.keys()
        for record in records
    )
    if not sound or (finished and not any(record["split"] == "held_out" for record in records)):
        raise StoreError(f"{path} is not what training wrote; restore it")
    return records


def _speed(path: Path) -> float | None:
    """The last tokens/s on record. No figure hangs on this file, so a damaged one is as good as
    none.
    """
    try:
        return float(read_metrics(path)[-1]["tokens_per_s"])
    except (StoreError, KeyError, TypeError, ValueError):
        return None


# -- which runs ------------------------------------------------------------------------------------


def find(runs: str | Sequence[Any]) -> list[Path]:
    """The runs that `runs=` names: paths and patterns, in a list or between commas; a folder stands
    for those in it.

    Raises:
        SettingError: a part of it names no run.
    """
    texts = [runs] if isinstance(runs, str) else [str(text) for text in runs]
    found: dict[Path, Path] = {}
    for text in texts:
        matched = [run for place in _named(text) for run in _runs_at(place)]
        if not matched:
            raise _none(text)
        found |= {run.absolute(): run for run in matched}
    if not found:
        raise _none("[]")
    return list(found.values())


def _none(text: str) -> SettingError:
    return SettingError(
        f"no run matches runs={text}; give directories of `python -m train` runs, the one that holds them, "
        "or a pattern such as 'runs/SWEEP/*'"
    )


def _named(text: str) -> list[Path]:
    """Paths that text matches. An arm's directory has commas in its name, so the longest part that
    is there counts.
    """
    parts, found, at = text.split(","), list[Path](), 0
    while at < len(parts):
        for end in range(len(parts), at, -1):
            if matched := _matches(",".join(parts[at:end]).strip()):
                break
        else:
            raise _none(",".join(parts[at:]))
        found += matched
        at = end
    return found


def _matches(text: str) -> list[Path]:
    if os.path.exists(
        text
    ):  # not Path.exists, which raises for a list that is longer than a name may be
        return [Path(text)]
    return [Path(match) for match in sorted(glob.glob(text))]


def _runs_at(place: Path) -> list[Path]:
    if not place.is_dir() or _is_run(place):
        return [place] if place.is_dir() else []
    return sorted(child for child in place.iterdir() if child.is_dir() and _is_run(child))


def _is_run(folder: Path) -> bool:
    """Whether training has been here; a run that lost its config.yaml is one, and damaged."""
    return any((folder / name).exists() for name in (CONFIG, METRICS, sae_file.FILE))


def common_folder(runs: Sequence[Path]) -> Path:
    """The directory in which all runs are."""
    parents = {run.absolute().parent: run.parent for run in runs}
    return next(iter(parents.values())) if len(parents) == 1 else Path(os.path.commonpath(parents))


def read_all(runs: Sequence[Path]) -> tuple[list[Arm], dict[str, str]]:
    """The arms, and what is wrong with each damaged one, by its name.

    Raises:
        StoreError: two arms are from different stores.
    """
    top = common_folder(runs).absolute()
    arms, damaged = list[Arm](), dict[str, str]()
    for run in runs:
        name = os.path.relpath(run.absolute(), top)
        try:
            arms.append(Arm.read(run, name))
        except StoreError as error:
            damaged[name] = str(error)
    for arm in arms[1:]:
        if arm.identity != arms[0].identity:
            both = (
                f"{one.run} is from {one.store_path} ({one.identity})" for one in (arms[0], arm)
            )
            raise StoreError(
                f"{' and '.join(both)}: arms of different stores are not compared; narrow runs="
            )
    return arms, damaged


# -- their settings --------------------------------------------------------------------------------


def varying(arms: Sequence[Arm]) -> list[str]:
    """Keys of the settings that are not the same in all arms, in the order of config.yaml."""
    keys = dict.fromkeys(key for arm in arms for key in arm.settings)
    return [key for key in keys if len({exact(arm.settings.get(key)) for arm in arms}) > 1]


def exact(value: Any) -> str:
    """A setting as text that is the same only for the same value: 0 and 0.0 are, 1 and true are
    not.
    """
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, sort_keys=True, default=str)


def short(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted key's last part, where that leaves no two alike."""
    keys = list(keys)
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)
    }


def labels(names: Sequence[str]) -> dict[str, str]:
    """Each name without the folder and the overrides that all share, so that what tells the arms
    apart is left.
    """
    one_folder = len({os.path.dirname(name) for name in names}) == 1
    parts = [(os.path.basename(name) if one_folder else name).split(",") for name in names]
    made = [
        set(split) for split in parts if len(split) > 1
    ]  # of overrides; others were named by hand
    shared = set.intersection(*made) if len(made) > 1 else set()
    left = [",".join(part for part in split if part not in shared) for split in parts]
    good = all(left) and len(set(left)) == len(left)
    return dict(zip(names, left if good else names, strict=True))
