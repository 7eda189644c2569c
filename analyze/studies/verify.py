"""Whether all that belongs to a run holds the bytes that were written: `study=verify run=RUN`.

The run's files, studies, kept results, pages, exports and release are compared with their records
(data/digests.py), the checkpoints and the store with their own. Nothing is opened as what it is, so
damage in one place hides none in another. Nothing is written.

What other processes write meanwhile is no damage: a fault counts if the record did not change
while it was found and nobody holds the folder's lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residual_saes.analyze.results import FOLDER
from residual_saes.analyze.study import Definition
from residual_saes.analyze.subject import open_store, places_of, recorded_stores, require_each
from residual_saes.data import digests, durable, locks, sealed
from residual_saes.data.digests import Digests
from residual_saes.data.errors import PipelineError, SettingError, StoreError, TemporaryError
from residual_saes.data.journal import Progress, size, tell
from residual_saes.data.settings import build
from residual_saes.data.store import repair
from residual_saes.data.store.place import place_of
from residual_saes.data.store.store import Store
from residual_saes.train import checkpoint, sae_file
from residual_saes.train import run as runs
from residual_saes.train.run import CHECKPOINTS, CONFIG, METRICS, TIMINGS, named_or_newest

_TRIES = 3  # of a folder whose record changes while it is read


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/verify.yaml."""

    store: bool = True  # whether the store is read, too


@dataclass
class Checked:
    """What was read so far, and how much of it is damaged."""

    run: Path
    files: set[Path] = field(default_factory=set)  # that a record names
    checkpoints: int = 0
    bytes: int = 0
    damaged: int = 0
    passing: bool = True  # whether all that is wrong may pass by itself
    _progress: Progress = field(default_factory=lambda: Progress(quiet_s=5.0))

    def whole(self, name: str, nbytes: int) -> None:
        """Count what is as it was written."""
        self.bytes += nbytes
        self._progress.show(f"{size(self.bytes)} compared, {name}")

    def wrong(self, error: PipelineError) -> None:
        """Tell of damage in one line, whose end is the way out."""
        self.damaged += 1
        self.passing &= isinstance(error, TemporaryError)
        self._progress.close()
        tell(str(error))


def verify(settings: Mapping[str, Any]) -> None:
    """Read all that belongs to the run, and print what was read.

    Raises:
        SettingError: runs= is given.
        StoreError: there is no run, or something is damaged: a line of each was told.
    """
    if settings["runs"]:
        raise SettingError("study=verify takes one directory, as run=")
    given = {key: value for key, value in settings["study"].items() if key != "name"}
    options = build(Options, "study", given)
    run = named_or_newest(settings["run"])
    if not any((run / name).exists() for name in (CONFIG, digests.FILE, sae_file.FILE)):
        raise StoreError(f"no run at {run}; train one with `python -m train store=... run={run}`")
    checked = Checked(run)
    for folder, _ in _folders(run):
        _folder(checked, folder)
    _tell_unnamed(checked)
    _checkpoints(checked)
    ending = "" if checked.checkpoints == 1 else "s"
    whole = (
        f"{run}: {len(checked.files):,} files and {checked.checkpoints} checkpoint{ending}, "
        f"{size(checked.bytes)}, are as they were written"
    )
    if options.store:
        whole += f"; {_stores(checked, places_of(settings['store']))}"
    if checked.damaged:
        kind = TemporaryError if checked.passing else StoreError
        raise kind(f"{run}: {checked.damaged} damaged, in a line each above, with the way out")
    print(whole)


# -- folders with a record -------------------------------------------------------------------------


def _folders(run: Path) -> Iterator[tuple[Path, list[str]]]:
    """The run's folder and those below it, with the names of their files.

    The checkpoints' and other runs' are left out.
    """
    for parent, folders, files in os.walk(run):
        place = Path(parent)
        folders[:] = [name for name in sorted(folders) if not _is_apart(place / name, run)]
        yield place, sorted(files)


def _is_apart(folder: Path, run: Path) -> bool:
    return folder == run / CHECKPOINTS or (folder / CHECKPOINTS).is_dir()


def _folder(checked: Checked, folder: Path) -> None:
    """Compare a folder's files with its record, if it has one."""
    for _ in range(_TRIES):
        before = _record(folder, checked.run)
        found = list(_faults(before, folder, checked.run))
        if not found or _record(folder, checked.run) == before:
            break
    if isinstance(before, Digests):
        checked.files |= {before.path(name) for name in before.files}
        faulty = {name for name, _ in found}
        for name, written in before.files.items():
            if name not in faulty:
                checked.whole(str(folder / name), written.bytes)
    if found and _is_written(folder, checked.run):
        _tell_busy(folder)
        return
    for _, error in found:
        checked.wrong(error)


def _tell_busy(path: Path) -> None:
    tell(f"{path} is being written by another process; verify again once it has ended")


def _record(folder: Path, run: Path) -> Digests | str | None:
    """A folder's record, what is wrong with it, or None if it has none."""
    try:
        return digests.read(folder, _way_out(folder, run))
    except StoreError as error:
        return str(error)


def _faults(
    kept: Digests | str | None, folder: Path, run: Path
) -> Iterator[tuple[str, PipelineError]]:
    """The files that are not whole, by name, with the errors that say it."""
    if isinstance(kept, str):
        yield digests.FILE, StoreError(kept)
    if not isinstance(kept, Digests):
        return
    for name in kept.files:
        way_out = runs.way_out(kept, name) if folder == run else _way_out(folder, run)
        try:
            kept.require([name], way_out)
        except StoreError as error:
            yield name, error


def _way_out(folder: Path, run: Path) -> str:
    """How what is damaged in a folder is made again."""
    parts = folder.relative_to(run).parts
    if not parts:
        return f"delete it, and `python -m train ... run={run}` records the run's files again"
    if parts[0] == FOLDER and parts[1:2] == ("kept",):
        return "the study that needs it makes it again"
    if parts[0] == FOLDER and len(parts) > 1:
        study = parts[1].lstrip(".").partition(".")[0]
        return f"`python -m analyze study={study} run={run}` does it again"
    if parts[0] == "export" and len(parts) > 1:
        return f"`python -m train.export run={run} to={parts[1]}` writes it again"
    if parts[0] == "publish":
        return f"`python -m train.publish run={run} repo=OWNER/NAME` writes it again"
    return "restore it, or write it again"


def _is_written(folder: Path, run: Path) -> bool:
    """Whether another process is at work on a folder."""
    holders = {folder}
    if run / FOLDER in folder.parents:  # under the lock of a study
        holders |= {path for path in (run / FOLDER).glob(".*") if path.is_dir()}
    return any(locks.is_held(holder) for holder in holders)


def _tell_unnamed(checked: Checked) -> None:
    """Say which folders hold files that no record names; those with digests of their own count."""
    for folder, files in _folders(checked.run):
        paths = [folder / name for name in files if _is_unnamed(folder / name, checked)]
        names = [path.name for path in paths if not _is_sealed(path, checked)]
        if names:
            what = "unfinished, or of an earlier version"
            if _is_written(folder, checked.run):
                what = "being written"
            tell(f"{folder}: nothing vouches for {', '.join(names)}: {what}")


def _is_sealed(path: Path, checked: Checked) -> bool:
    """Whether a file has a digest of its own, which is compared."""
    whole = sealed.is_whole(path)
    if whole:
        checked.files.add(path)
        with suppress(FileNotFoundError):  # it is gone by now
            checked.whole(str(path), path.stat().st_size)
    elif whole is not None:
        way_out = _way_out(path.parent, checked.run)
        checked.wrong(StoreError(f"{path} is not what was written; {way_out}"))
    return whole is not None


def _is_unnamed(path: Path, checked: Checked) -> bool:
    if not path.is_file() or path.name in (digests.FILE, locks.FILE):
        return False
    return not durable.is_temporary(path) and path not in checked.files


# -- checkpoints -----------------------------------------------------------------------------------


def _checkpoints(checked: Checked) -> None:
    """Compare the checkpoints, and of an unfinished run the logs that the newest has seen."""
    run = checked.run
    for name, nbytes in checkpoint.check(run / CHECKPOINTS):
        if nbytes is not None:
            checked.checkpoints += 1
            checked.whole(name, nbytes)
            continue
        path = run / CHECKPOINTS / name
        if _is_written(run, run):
            _tell_busy(path)
            continue
        way_out = f"`python -m train ... run={run}` passes it over and removes it"
        checked.wrong(StoreError(f"{path} is not what was written; {way_out}"))
    for name in (METRICS, TIMINGS):
        if run / name not in checked.files and (run / name).exists():
            _required(checked, name)


def _required(checked: Checked, name: str) -> None:
    try:
        runs.require(checked.run, name)
    except StoreError as error:
        if _is_written(checked.run, checked.run):
            _tell_busy(checked.run / name)
        else:
            checked.wrong(error)


# -- the store -------------------------------------------------------------------------------------


def _stores(checked: Checked, asked: Sequence[str] | None) -> str:
    """Compare every object of the run's stores; what was read, in words."""
    try:
        recorded = recorded_stores(runs.read_config(checked.run))
    except (StoreError, KeyError, ValueError):
        if asked is None:
            return "its store is not known"  # what is wrong with config.yaml was told
        recorded = [("", "")] * len(asked)
    if asked is not None:
        require_each(checked.run, asked, recorded)
    read = []
    for number, (place, identity) in enumerate(recorded):
        read.append(_store(checked, place, identity, asked[number] if asked else None))
    return ", and ".join(line for line in read if line)


def _store(checked: Checked, recorded: str, identity: str, asked: str | None) -> str:
    """Compare every object of a store; what was read, in words."""
    place = place_of(asked or recorded)
    try:
        if identity:
            open_store(checked.run, recorded, identity, asked)
        for _, lines in repair.damage(place):
            for line in lines:
                way_out = f"`python -m harvest action=repair store={place.name}` drops it"
                checked.wrong(StoreError(f"{line}; {way_out}"))
        store = Store.open(place)
    except StoreError as error:
        checked.wrong(error)
        return ""
    return f"{place.name}: {store.units} units, {size(sum(store.ledger.nbytes.values()))}, too"


DEFINITION = Definition(compare=verify, options=Options)
