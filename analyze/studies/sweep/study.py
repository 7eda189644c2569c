"""All arms of a sweep on the same held-out rows, and which of them is best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_saes.analyze.studies.sweep import arms, page, words
from residual_saes.analyze.studies.sweep.comparison import sweep
from residual_saes.analyze.study import Definition, at_least
from residual_saes.analyze.subject import places_of
from residual_saes.data.device import torch_device
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.journal import show, tell
from residual_saes.data.markdown import cell
from residual_saes.data.settings import build


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/sweep.yaml."""

    rows: int = 10_000_000  # held-out rows at most, in whole units

    def __post_init__(self) -> None:
        at_least("study.rows", self.rows, 1)


def compare(settings: Mapping[str, Any]) -> None:
    """Compare the arms of a sweep, and write its page.

    Raises:
        SettingError: runs= is missing, or run= is given.
        StoreError: an arm is damaged (the others are compared first), or no arm is finished.
    """
    if settings["run"] or not settings["runs"]:
        raise SettingError(
            "study=sweep takes runs=, the directories of several runs, e.g. runs=runs/SWEEP/*"
        )
    options = {key: value for key, value in settings["study"].items() if key != "name"}
    limit = build(Options, "study", options).rows
    store = places_of(settings["store"])
    folders = arms.find(settings["runs"])
    read, damaged = arms.read_all(folders)
    figures = sweep(read, damaged, store, limit, torch_device(settings["device"]))
    out = Path(settings["out"]) if settings["out"] else arms.common_folder(folders)
    path = page.write(out, figures, read)
    show(*words.markdown(figures, cell))
    tell("", f"wrote {path}: open it in a browser; beside it {page.JSON} and {page.MARKDOWN}")
    if damaged:
        names = ", ".join(damaged)
        raise StoreError(f"{len(damaged)} of {len(folders)} arms are damaged and left out: {names}")
    if not any(layer["best"] for layer in figures["layers"]):
        raise StoreError(
            "no arm is finished, so nothing is compared; run their `python -m train` again"
        )


DEFINITION = Definition(compare=compare, options=Options)
