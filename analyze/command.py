"""What `python -m analyze` does with its settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from analyze.outcome import markdown
from analyze.pages.browser import serve
from analyze.peers import imported
from analyze.study import Study, find, model_of
from analyze.subject import Subject
from conf.command import ALONE, Job
from data.device import torch_device
from data.errors import SettingError
from data.settings import optional_whole, whole


def command(settings: dict[str, Any], _: Job = ALONE) -> None:
    """Run one study and say where its results are."""
    name, action = settings["study"]["name"], settings["action"]
    if action not in ("run", "serve") or (action == "serve" and name != "browser"):
        raise SettingError(
            f"action={action} with study={name} is not known; it is run, or serve with study=browser"
        )
    port = whole("port", settings["port"])
    if not 0 <= port < 2**16:
        raise SettingError(f"port={port} must be from 0 to 65535; 0 takes one that is free")
    definition = find(name)
    if definition.compare:
        definition.compare(settings)
        return
    if settings["runs"] is not None:
        raise SettingError(f"runs= is for study=sweep; study={name} takes one directory, as run=")
    if not settings["run"]:
        raise SettingError(
            "run= is missing; give the directory of a finished training run, e.g. run=runs/demo"
        )
    device = torch_device(settings["device"])
    store = str(settings["store"]) if settings["store"] else None
    run, layer = str(settings["run"]), optional_whole("layer", settings["layer"])
    foreign = imported.is_foreign(run)
    if not foreign and (kind := run.partition(":")[0]) != run and not Path(run).exists():
        raise SettingError(
            f"run={run} is no directory, and {kind}: is none of {', '.join(imported.READERS)}"
        )
    if layer is not None and not foreign:
        raise SettingError(
            f"layer={layer} is for SAEs of other libraries; run={run} knows its own layer"
        )
    subject = Subject.open(
        imported.run_of(run, store, layer) if foreign else Path(run), store, device
    )
    study = study_of(settings, subject, device)
    outcome = study.perform(definition)
    if definition.fresh:
        print("\n".join(outcome.summary), file=sys.stderr)
        return
    print("\n".join([f"# {name}", "", *markdown(outcome)]))
    print(f"\nresults are in {study.folder}", file=sys.stderr)
    if action == "serve":
        serve.serve(study.folder, port)


def study_of(settings: dict[str, Any], subject: Subject, device: torch.device) -> Study:
    """The study that the settings ask for."""
    return Study(
        name=settings["study"]["name"],
        subject=subject,
        options={key: value for key, value in settings["study"].items() if key != "name"},
        model=model_of(subject, settings["model"], device),
        problems=str(settings["problems"]) if settings["problems"] else None,
        answers=settings["answers"],
    )
