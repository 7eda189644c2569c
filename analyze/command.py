"""`python -m analyze study=NAME run=runs/NAME`: what a trained SAE is worth; `study=sweep
runs=...`: which is best.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from analyze import study as studies
from analyze.pages.browser import serve
from analyze.pages.browser import site as browser
from analyze.pages.report import report
from analyze.peers import delphi, imported, neuronpedia, saebench
from analyze.studies import gsm8k, splice
from analyze.studies.catalogue import study as catalogue
from analyze.studies.contrast import study as contrast
from analyze.studies.logit_lens import study as logit_lens
from analyze.studies.quality import markdown, quality, write
from analyze.studies.reason_score import study as reason_score
from analyze.studies.stability import study as stability
from analyze.studies.stage_gate import study as stage_gate
from analyze.studies.steering import study as steering
from analyze.studies.sweep import arms
from analyze.studies.sweep import words as sweep_page
from analyze.studies.sweep.study import sweep
from analyze.study import Outcome, Study
from analyze.subject import Subject
from conf.command import ALONE, Job
from data.device import torch_device
from data.errors import SettingError, StoreError
from data.settings import optional_whole, whole
from harvest.model import ModelConfig


def _nothing(_: Study) -> dict[str, Any]:
    return {}


# What does each study, and what its result depends on beside the run and the study's own settings.
STUDIES: dict[str, tuple[Callable[[Study], Outcome], Callable[[Study], Mapping[str, Any]]]] = {
    "gsm8k": (gsm8k.gsm8k, gsm8k.inputs),
    "contrast": (contrast.contrast, gsm8k.inputs),
    "steering": (steering.steering, gsm8k.inputs),
    "stage_gate": (stage_gate.stage_gate, gsm8k.inputs),
    "splice": (splice.splice, _nothing),
    "logit_lens": (logit_lens.logit_lens, _nothing),
    "reason_score": (reason_score.reason_score, _nothing),
    "catalogue": (catalogue.catalogue, catalogue.inputs),
    "stability": (stability.stability, stability.inputs),
    "browser": (browser.browser, browser.inputs),
    "delphi": (delphi.delphi, delphi.inputs),
    "neuronpedia": (neuronpedia.neuronpedia, neuronpedia.inputs),
    "saebench": (saebench.saebench, saebench.inputs),
}


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
    if name == "sweep":
        return compare(settings)
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
    if name == "quality":
        figures = quality(subject, row_limit(settings))
        write(subject, figures)
        print("\n".join(markdown(subject, figures)))
        print(f"\nwrote {subject.run / 'quality.json'} and quality.md", file=sys.stderr)
    elif name == "report":
        path = report(subject, row_limit(settings), settings["model"]["path"])
        print(f"wrote {path}: open it in a browser", file=sys.stderr)
    else:
        study = study_of(settings, subject, device)
        perform, inputs = STUDIES[name]
        outcome = study.perform(perform, inputs(study))
        print("\n".join(studies.markdown(name, outcome)))
        print(f"\nresults are in {study.folder}", file=sys.stderr)
        if action == "serve":
            serve.serve(study.folder, port)


def study_of(settings: dict[str, Any], subject: Subject, device: torch.device) -> Study:
    """The study that the settings ask for; the model is by default the one that the store was
    harvested with.
    """
    recorded, asked = subject.store.manifest["model"], settings["model"]
    model = ModelConfig(
        path=subject.model_path(asked["path"]),
        revision=asked["revision"] if asked["path"] else recorded["revision"],
        dtype=asked["dtype"] or recorded["dtype"],
        device=str(device),
    )
    options = {key: value for key, value in settings["study"].items() if key != "name"}
    problems = str(settings["problems"]) if settings["problems"] else None
    return Study(settings["study"]["name"], subject, options, model, problems, settings["answers"])


def compare(settings: dict[str, Any]) -> None:
    """Compare the arms of a sweep; those that are damaged are told, and make the command fail in
    the end.
    """
    if settings["run"] or not settings["runs"]:
        raise SettingError(
            "study=sweep takes runs=, the directories of several runs, e.g. runs=runs/SWEEP/*"
        )
    device, limit = torch_device(settings["device"]), row_limit(settings)
    folders = arms.find(settings["runs"])
    read, damaged = arms.read_all(folders)
    figures = sweep(
        read, damaged, str(settings["store"]) if settings["store"] else None, limit, device
    )
    out = Path(settings["out"]) if settings["out"] else arms.common_folder(folders)
    page = sweep_page.write(out, figures, read)
    print("\n".join(sweep_page.markdown(figures)), flush=True)
    print(
        f"\nwrote {page}: open it in a browser; beside it {sweep_page.JSON} and {sweep_page.MARKDOWN}",
        file=sys.stderr,
    )
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {len(folders)} arms are damaged and left out: {', '.join(damaged)}"
        )
    if not any(layer["best"] for layer in figures["layers"]):
        raise StoreError(
            "no arm is finished, so nothing is compared; run their `python -m train` again"
        )


def row_limit(settings: dict[str, Any]) -> int:
    """Held-out rows to measure on."""
    limit = whole("study.rows", settings["study"]["rows"])
    if limit < 1:
        raise SettingError(f"study.rows={limit} must be at least 1")
    return limit
