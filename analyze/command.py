"""What `python -m analyze` does with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from residual_saes.analyze import results
from residual_saes.analyze.study import ASKED, Definition, Study, find, model_of
from residual_saes.analyze.subject import Subject, places_of, recorded_stores
from residual_saes.conf.command import ALONE, Job
from residual_saes.data import command_line
from residual_saes.data.device import torch_device
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import heartbeat, suggest
from residual_saes.data.rows.split import Policy
from residual_saes.data.settings import flag, names, optional_whole, whole
from residual_saes.train.run import CONFIG, METRICS, named_or_newest, read_config

Settings = dict[str, Any]  # conf/analyze.yaml, composed
_POLICY = ("drop_bos", "drop_outliers")


def command(settings: Settings, job: Job = ALONE) -> None:
    """Run one study and say where its results are."""
    name = settings["study"]["name"]
    action = _action(name, settings["action"])
    port = _port(settings["port"])
    definition = find(name)
    _require_taken(name, definition, settings)
    if definition.compare:
        with heartbeat("opening the runs"):
            definition.compare({**settings, "runs": _compared(settings)})
        return
    if settings["runs"] is not None:
        raise SettingError(f"runs= is for study=sweep; study={name} takes one directory, as run=")
    with heartbeat("opening the run"):
        study = study_of(settings, subject_of(settings, torch_device(settings["device"])))
        study.make_first(definition)
        outcome = study.perform(definition)
    study.subject.forget()
    study.show(definition, outcome)
    if not definition.fresh:
        results.tell_report(study.subject.run)
    if action == "run" and not job.multirun:
        suggest(_next(study, definition))
    if action == "serve":
        # The one door to the browser's pages.
        from residual_saes.analyze.pages.browser.serve import serve

        serve(study.place, port, study)


def _next(study: Study, definition: Definition) -> str:
    """The command that is useful after a study; "": none is."""
    run = study.subject.run
    if study.name in ("report", "all"):
        return command_line.opening(run / "report.html")
    if study.name == "browser":
        return command_line.of("analyze", "study=browser", f"run={run}", "action=serve")
    if definition.takes or not (run / METRICS).exists():  # an answer; or an SAE from elsewhere
        return ""
    return command_line.of("analyze", "study=report", f"run={run}")


def _action(name: str, action: Any) -> str:
    if action == "run" or (action == "serve" and name == "browser"):
        return str(action)
    raise SettingError(
        f"action={action} with study={name} is not known; it is run, or serve with study=browser"
    )


def _require_taken(study: str, definition: Definition, settings: Settings) -> None:
    """Raise SettingError if a setting of ASKED is given to a study that does not read it."""
    for name in ASKED:
        if settings[name] is not None and name not in definition.takes:
            readers = {"text": "features"}.get(name, "steer")
            raise SettingError(
                f"{name}= is for study={readers}, and this is study={study}; leave it out, or take "
                f"study={readers}"
            )


def _port(value: Any) -> int:
    port = whole("port", value)
    if not 0 <= port < 2**16:
        raise SettingError(f"port={port} must be from 0 to 65535; 0 takes one that is free")
    return port


def subject_of(settings: Settings, device: torch.device) -> Subject:
    """The SAE that run= names: a run's directory, or an SAE of another library as FORMAT:PATH.

    Without run=, it is that of the newest finished run.

    Raises:
        SettingError: run= names neither, or is missing and no run is finished; or layer=,
            accept=, drop_bos= or drop_outliers= is given for a run of ours.
        StoreError: the run or its store is missing, unfinished or damaged.
    """
    named = str(named_or_newest(settings["run"]))
    stores = places_of(settings["store"])
    layer = optional_whole("layer", settings["layer"])
    run = None
    if ":" in named:
        if stores is not None and len(stores) > 1:
            raise SettingError(f"store={','.join(stores)} must be one store, that of run={named}")
        run = _imported(named, stores[0] if stores else None, layer, settings)
    for name in ("layer", "accept", *_POLICY):
        if run is None and (value := settings[name]) is not None:
            raise SettingError(
                f"{name}={value} is for SAEs of other libraries; run={named} knows its own"
            )
    return Subject.open(run or Path(named), stores, device)


def _imported(named: str, store: str | None, layer: int | None, settings: Settings) -> Path | None:
    """The run directory made of an SAE of another library; None: `named` is a directory itself.

    This is the core's one door to analyze/peers.
    """
    from residual_saes.analyze.peers import imported

    if imported.is_foreign(named):
        accept = settings["accept"]
        accepted = [] if accept is None else names("accept", accept, imported.ACCEPT)
        drop_bos, drop_outliers = (
            True if settings[name] is None else flag(name, settings[name]) for name in _POLICY
        )
        policy = Policy(drop_bos, drop_outliers)
        return imported.run_of(named, store, layer, accepted, policy)
    if not Path(named).exists():
        prefix = named.partition(":")[0]
        known = ", ".join(imported.READERS)
        raise SettingError(f"run={named} is no directory, and {prefix}: is none of {known}")
    return None


def _compared(settings: Settings) -> Any:
    """runs= with a run directory in the place of each SAE of another library.

    It is measured on store=; without it, on the store of the first run of ours that is named.

    Raises:
        SettingError, StoreError: see `run_of` in analyze/peers/imported.py.
    """
    from residual_saes.analyze.peers import imported

    runs = settings["runs"] or []
    texts = [str(run).strip() for run in (runs if isinstance(runs, list) else runs.split(","))]
    if not any(map(imported.is_foreign, texts)):
        return runs
    stores = places_of(settings["store"])
    own = [Path(text) for text in texts if Path(text, CONFIG).is_file()]
    if stores is None and own:
        stores = [place for place, _ in recorded_stores(read_config(own[0]))]
    layer = optional_whole("layer", settings["layer"])
    found = []
    for text in texts:
        is_ours = not imported.is_foreign(text)
        run = None if is_ours else _imported(text, stores[0] if stores else None, layer, settings)
        found.append(str(run or text))
    return found


def study_of(settings: Settings, subject: Subject) -> Study:
    """The study that the settings ask for."""
    options = dict(settings["study"])
    name = options.pop("name")
    return Study(
        name=name,
        subject=subject,
        options=options,
        model=model_of(subject, settings["model"], subject.device),
        problems=str(settings["problems"]) if settings["problems"] else None,
        answers=settings["answers"],
        asked={name: settings[name] for name in ASKED if settings[name] is not None},
    )
