"""The results in a run's directory, side by side.

studies/NAME holds the result that was asked for last. Results of other settings, or of an earlier
version of the study, lie beside it in studies/NAME.DIGEST. None overwrites another, so how many
variants were tried can be counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from analyze import outcome as outcomes
from analyze.outcome import Outcome, dumped
from data import durable
from data.errors import SettingError, caused
from data.journal import tell

FOLDER = "studies"  # in a run's directory
_KEPT = "kept"  # folder of intermediate results, beside the studies'
FEATURES = "features.parquet"  # of a study that has figures of every latent
PAGE = "index.html"  # of a study that makes pages


class Result(NamedTuple):
    """A finished study."""

    name: str
    folder: Path
    settings: dict[str, Any]  # all that it follows from, the study's version included
    outcome: Outcome


def of_study(run: Path, name: str) -> list[Result]:
    """Every whole result of a study; the one that was asked for last comes first."""
    folders = [run / FOLDER / name, *sorted((run / FOLDER).glob(f"{name}.*"))]
    results = []
    for folder in folders:
        if content := outcomes.read(folder / f"{name}.json"):
            results.append(Result(name, folder, *content))
    return results


def current(run: Path, digest: str) -> dict[str, Result]:
    """By study the result that was asked for last, where it is of the SAE with this digest."""
    found = {}
    for path in sorted((run / FOLDER).glob("*/*.json")):
        name = path.stem
        if name != path.parent.name or (content := outcomes.read(path)) is None:
            continue
        if content[0].get("sae") == digest:
            found[name] = Result(name, path.parent, *content)
        else:
            tell(f"{path} is of another SAE than the run's and is left out; do study={name} again")
    return found


def begin(run: Path, name: str) -> Path:
    """An empty folder studies/NAME; the result that lay there is set aside."""
    folder = run / FOLDER / name
    set_aside(run, name)
    return made(folder)


def set_aside(run: Path, name: str) -> None:
    """Rename studies/NAME to studies/NAME.DIGEST; what is not a whole result is removed."""
    folder = run / FOLDER / name
    if content := outcomes.read(folder / f"{name}.json"):
        target = _aside(run, name, content[0])
        if not target.exists():
            folder.rename(target)
    shutil.rmtree(folder, ignore_errors=True)


def bring_back(result: Result, run: Path) -> Result:
    """Make an earlier result the one in studies/NAME again."""
    folder = run / FOLDER / result.name
    if result.folder != folder:
        set_aside(run, result.name)
        result.folder.rename(folder)
    return result._replace(folder=folder)


def _aside(run: Path, name: str, settings: Mapping[str, Any]) -> Path:
    return run / FOLDER / f"{name}.{digest_of(settings)}"


def digest_of(key: Mapping[str, Any]) -> str:
    """Digest of settings in 12 hexadecimal digits, whatever the order of their keys."""
    canonical = json.dumps(json.loads(dumped(key)), sort_keys=True)
    return durable.digest(canonical.encode())[:12]


def kept_folder(run: Path, name: str, key: Mapping[str, Any]) -> Path:
    """RUN/studies/kept/NAME-DIGEST, of intermediate results that follow from `key`."""
    return run / FOLDER / _KEPT / f"{name}-{digest_of(key)}"


def made(folder: Path) -> Path:
    """`folder`, which exists afterwards.

    Raises:
        SettingError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{folder} cannot be made: {error.strerror}"
        raise caused(error, got, "choose another run=", SettingError) from error
    return folder
