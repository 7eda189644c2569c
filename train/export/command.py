"""`python -m train.export run=runs/NAME to=saelens`: a finished run's SAE in the files of other
libraries.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from residual_saes.conf.command import ALONE, Job
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.journal import heartbeat, note, show, tell
from residual_saes.data.settings import names
from residual_saes.train import sae_file
from residual_saes.train.export import bundle, circuit_tracer, format, golden, loading
from residual_saes.train.export.format import About
from residual_saes.train.run import CONFIG, named_or_newest, read_config, sae_of
from residual_saes.train.sae import SAE

SET = "circuit_tracer"  # the library whose files hold several runs, of a layer each


def command(settings: dict[str, Any], _: Job = ALONE) -> None:
    """Write the files and say where they are."""
    asked = names("to", settings["to"], format.names())
    folder, runs = _runs(settings["run"])
    out = Path(settings["out"]) if settings["out"] else None
    members = [_member(run) for run in runs]
    is_set = len(runs) > 1
    for name in asked:
        if name == SET and is_set:
            groups = {(out or folder / "export"): members}
        else:
            groups = {}
            for run, member in zip(runs, members, strict=True):
                groups[(out / run.name if is_set else out) if out else run / "export"] = [member]
        for place, group in groups.items():
            _export(name, group, place / name, settings["to"] == "all")


def _runs(named: Any) -> tuple[Path, list[Path]]:
    """The runs that run= names, and the folder they lie in.

    It is one, several, a pattern of several, or a sweep's folder.

    Raises:
        SettingError: the pattern fits none.
    """
    if isinstance(named, list) or (isinstance(named, str) and glob.has_magic(named)):
        patterns = named if isinstance(named, list) else [named]
        runs = [run for pattern in patterns for run in _matching(str(pattern))]
        return Path(os.path.commonpath(runs)), runs
    run = named_or_newest(named)
    arms = sorted(path.parent for path in run.glob(f"*/{CONFIG}"))
    return run, arms if arms and not (run / CONFIG).exists() else [run]


def _matching(pattern: str) -> list[Path]:
    """The runs whose folders fit a pattern; a folder that has a name with its signs is itself."""
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [Path(pattern)]
    runs = [Path(run) for run in sorted(glob.glob(pattern)) if Path(run, CONFIG).exists()]
    if not runs:
        raise SettingError(f"run={pattern} fits no run; give the directory of a finished one")
    return runs


def _member(run: Path) -> tuple[SAE, About]:
    with heartbeat(f"reading {run / sae_file.FILE}"):
        config = read_config(run)
        return sae_of(run)[0], format.about(run, config)


def _export(name: str, group: Sequence[tuple[SAE, About]], place: Path, may_lack: bool) -> None:
    """Write the files of one library.

    Args:
        may_lack: tell of an SAE that the library has not, instead of raising.
    """
    note(f"making the files of {name}")
    try:
        if name == SET:
            files = golden.beside(circuit_tracer.write_set(group), [sae for sae, _ in group])
        else:
            files = golden.files(name, *group[0])
    except StoreError as error:
        if not may_lack:
            raise
        tell(f"not written for {name}: {error}")
        return
    written = bundle.write(place, files)
    for file in written:
        tell(f"wrote {place / file}")
    for line in circuit_tracer.remarks(group) if name == SET else ():
        tell(line)
    if code := loading.lines(name, place, written):
        tell(f"to load it in {name}:")
        show(*code)
