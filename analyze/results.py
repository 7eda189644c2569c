"""The results in a run's directory, side by side.

    studies/NAME          the result that was asked for last
    studies/NAME.DIGEST   results of other settings, or of an earlier version of the study
    studies/.NAME.new     a result while it is made

None overwrites another, so how many variants were tried can be counted. A result counts only with
its digests.json, which names every file of its folder and is written last, and only while every
file holds what is recorded there. So a kill, a power cut or a flipped bit leaves the result that
was there before, or none. Files that are not named are not read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.analyze import outcome as outcomes
from residual_saes.analyze.outcome import Outcome, dumped
from residual_saes.data import digests, durable, locks
from residual_saes.data.digests import Digests
from residual_saes.data.durable import Written
from residual_saes.data.errors import SettingError, StoreError, TemporaryError
from residual_saes.data.journal import tell

FOLDER = "studies"  # in a run's directory
FEATURES = "features.parquet"  # of a study that has figures of every latent
PAGE = "index.html"  # of a study that makes pages
INDEX = "index.js"  # in FOLDER: which results there are, for a report that was made before them
REPORT = "report.html"  # in a run's directory


class Result(NamedTuple):
    """A finished study, whose files hold what was recorded."""

    name: str
    digests: Digests
    outcome: Outcome

    @property
    def folder(self) -> Path:
        return self.digests.folder

    @property
    def settings(self) -> dict[str, Any]:
        """All that it follows from, the study's version included."""
        return dict(self.digests.about["settings"])

    def path(self, name: str) -> Path | None:
        """A file of the result; None if it has none of this name."""
        return self.folder / name if name in self.digests.files else None


# -- what is there ---------------------------------------------------------------------------------


def of_study(run: Path, name: str) -> list[Result]:
    """Every whole result of a study; the one that was asked for last comes first.

    A line says which are damaged.
    """
    way_out = f"it is left out; do study={name} again"
    results = [_read(folder, name, way_out) for folder in _folders(run, name)]
    return [result for result in results if result]


def current(run: Path, digest: str, name: str | None = None) -> dict[str, Result]:
    """By study the result that was asked for last, where it is whole and of this SAE.

    A line says which are not.

    Args:
        digest: of the SAE's file.
        name: of the one study that is wanted; None: all.
    """
    found = {}
    for folder in sorted((run / FOLDER).glob(name or "*")):
        study = folder.name
        if "." in study:
            continue
        result = _read(folder, study, f"it is left out; do study={study} again")
        if result is None:
            continue
        if result.settings.get("sae") == digest:
            found[study] = result
        else:
            tell(
                f"{folder} is of another SAE than the run's and is left out; do study={study} again"
            )
    return found


def find(run: Path, name: str, settings: Mapping[str, Any]) -> Result | None:
    """The whole result of these settings, if there is one; a line says what is damaged.

    Only for the process that holds the study's lock.
    """
    first, *others = _folders(run, name)
    for folder in (first, _new(run, name), *others):
        known = _settings(folder, name)
        if known == settings or (known is None and folder == first):
            result = _read(folder, name, f"study={name} is done again")
            if result and result.settings == settings:
                return result
    return None


def shown(run: Path) -> dict[str, str]:
    """By study a digest of what the result in studies/NAME follows from; none is verified."""
    found = {}
    for file in sorted((run / FOLDER).glob(f"[!.]*/{digests.FILE}")):
        name = file.parent.name
        settings = _settings(file.parent, name)
        if "." not in name and settings is not None:
            found[name] = digest_of(settings)
    return found


def index(run: Path) -> bytes:
    """Which results there are, for the page of the report.

    It is a script, since a page on a disk can read nothing else.
    """
    return f"globalThis.STUDIES = {json.dumps(shown(run))};\n".encode()


def write_index(run: Path) -> None:
    """Bring studies/index.js up to date."""
    content = index(run)
    path = run / FOLDER / INDEX
    if not path.is_file() or path.read_bytes() != content:
        durable.write(path, [content])


def tell_report(run: Path) -> None:
    """Say so if the run's report shows other results than those that are there."""
    if not (run / REPORT).is_file():
        return
    recorded = digests.sound(run / FOLDER / ".report", "study=report writes it again")
    if recorded is None or recorded.about.get("shown") != shown(run):
        tell(f"{run / REPORT} was made before that; study=report run={run} makes it anew")


def _folders(run: Path, name: str) -> list[Path]:
    """Where results of a study may lie."""
    return [run / FOLDER / name, *sorted((run / FOLDER).glob(f"{name}.*"))]


def _new(run: Path, name: str) -> Path:
    return run / FOLDER / f".{name}.new"


def _read(folder: Path, name: str, way_out: str) -> Result | None:
    """The result in a folder; None if there is none, or, as one line then says, a damaged one."""
    recorded = digests.sound(folder, way_out)
    if recorded is None:
        unread = not (folder / digests.FILE).exists() and (folder / f"{name}.json").exists()
        if unread and folder.name == name:
            tell(f"{folder / digests.FILE} is missing, so nothing vouches for the rest; {way_out}")
        return None
    try:
        recorded.require(None, way_out)
        return Result(name, recorded, outcomes.read(recorded, name, way_out))
    except TemporaryError:
        raise
    except StoreError as error:
        tell(str(error))
        return None


def _settings(folder: Path, name: str) -> dict[str, Any] | None:
    """What the result in a folder, whole or not, follows from; None if nothing says it."""
    try:
        recorded = digests.read(folder, "")
    except TemporaryError:
        raise
    except StoreError:
        recorded = None
    try:
        if recorded:
            return dict(recorded.about["settings"])
        return dict(json.loads((folder / f"{name}.json").read_bytes())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def locked(run: Path, name: str, *, shared: bool = False) -> AbstractContextManager[None]:
    """The lock of a study: of who does it, or `shared` by those who read its files.

    Raises:
        TemporaryError: another process is in the way.
    """
    by = "done" if shared else "done, or read,"
    busy = f"study={name} of {run} is being {by} by another process; wait, or stop it"
    return locks.locked(run / FOLDER / f".{name}", busy, shared=shared)


# -- what is made ----------------------------------------------------------------------------------

# All that is below is for the process that holds the study's lock.


def begin(run: Path, name: str) -> Path:
    """An empty folder for a new result; `publish` puts it in its place."""
    folder = _new(run, name)
    for left in (folder, _removed(run, name)):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    return made(folder)


def discard(run: Path, name: str) -> None:
    """Remove a new result that does not come to its end."""
    shutil.rmtree(_new(run, name), ignore_errors=True)


def publish(run: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Record the files of the new result, and make it the one in studies/NAME."""
    new = _new(run, name)
    seal(new, {"study": name, "settings": settings})
    _place(new, run, name)
    for folder in _folders(run, name)[1:]:
        # A damaged result of the same settings. One of an earlier version has no record.
        if (folder / digests.FILE).exists() and _settings(folder, name) == settings:
            _remove(folder, run, name)


def bring_back(result: Result, run: Path) -> Result:
    """Make a result the one in studies/NAME again."""
    folder = run / FOLDER / result.name
    if result.folder != folder:
        _place(result.folder, run, result.name)
    return result._replace(digests=result.digests._replace(folder=folder))


def _place(folder: Path, run: Path, name: str) -> None:
    """Rename a result's folder to studies/NAME; what lay there is set aside."""
    place = run / FOLDER / name
    if place.exists():
        settings = _settings(place, name)
        if settings is None:
            _remove(place, run, name)
        else:
            _move(place, _aside(run, name, settings))
    _move(folder, place)


def _aside(run: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """A name for a result that is not the last one asked for."""
    stem = run / FOLDER / f"{name}.{digest_of(settings)}"
    # A damaged result, or one of an earlier version, may have the name.
    numbers = (stem.with_name(f"{stem.name}.{number}") for number in count(1))
    return next(path for path in chain([stem], numbers) if not path.exists())


def _removed(run: Path, name: str) -> Path:
    return run / FOLDER / f".{name}.old"


def _remove(folder: Path, run: Path, name: str) -> None:
    # Renamed first: what a stop leaves of it is not taken for a result of an earlier version.
    removed = _removed(run, name)
    shutil.rmtree(removed, ignore_errors=True)
    _move(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename a folder, durably before anything else is done."""
    with durable.refusals(target):
        source.rename(target)
        durable.sync_directory(target.parent)


def seal(folder: Path, about: Mapping[str, Any]) -> Digests:
    """Record every file of a folder, after all of them are on the disk under their names."""
    names = []
    for parent, _, files in os.walk(folder, topdown=False):
        durable.sync_directory(Path(parent))
        paths = [Path(parent, file) for file in files if file not in (digests.FILE, locks.FILE)]
        names += [path.relative_to(folder).as_posix() for path in paths]
    return digests.write(folder, names, json.loads(dumped(about)))


def write_beside(run: Path, name: str, contents: Mapping[str, bytes], **about: Any) -> None:
    """Bring files in the run's own directory that a study leaves there up to date.

    They are recorded in studies/.NAME, with `about`.
    """
    folder = run / FOLDER / f".{name}"
    expected = {}
    for file, content in contents.items():
        expected[f"../../{file}"] = Written(len(content), durable.digest(content))
    recorded = digests.sound(folder, "they are written again")
    about = {"study": name, **about}
    if recorded and recorded.files == expected and recorded.about == about:
        wrong = list(recorded.faults())
        if not wrong:
            return
        tell(*(f"{line}; it is written again" for line in wrong))
    for file, content in contents.items():
        durable.write(run / file, [content])
    digests.put(made(folder), expected, about)


def digest_of(key: Mapping[str, Any]) -> str:
    """Digest of settings in 12 hexadecimal digits, whatever the order of their keys."""
    canonical = json.dumps(json.loads(dumped(key)), sort_keys=True)
    return durable.digest(canonical.encode())[:12]


def made(folder: Path) -> Path:
    """`folder`, which exists afterwards, durably.

    Raises:
        StoreError: it cannot be made.
        SettingError: a file has its name.
    """
    durable.make_directory(folder)
    if not folder.is_dir():
        raise SettingError(f"{folder} is no folder; move it away, or choose another run=")
    return folder
