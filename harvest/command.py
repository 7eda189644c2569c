"""What `python -m harvest` does with its settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from conf.command import ALONE, Job
from data.device import own_device
from data.errors import SettingError
from data.journal import tell
from data.settings import optional_whole, whole
from data.store import manifest
from data.store.place import place_of
from data.store.repair import is_derived, repair, require_store
from data.text.sources import source_name, source_of
from harvest.cost import cost
from harvest.loop import harvest
from harvest.model import ModelConfig, load
from harvest.model_folder import EMBEDDED, read_config, resolve
from harvest.plan import Faults, HarvestConfig, Plan, plan, probe, require_fit, share_done
from harvest.status import status
from harvest.verify import verify

ACTIONS = ("run", "plan", "status", "verify", "repair")


def harvest_config(settings: dict[str, Any]) -> HarvestConfig:
    """Our own configuration from Hydra's plain values."""
    layers = settings["layer"] if settings["layer"] is not None else settings["model"]["layers"]
    if layers is None:
        raise SettingError(
            "layer= is not set, and this model's configuration has no default; give a layer number"
        )
    listed = layers if isinstance(layers, list) else [layers]
    return HarvestConfig(
        store=str(settings["store"] or default_store(settings["model"], settings["text"])),
        layers=tuple(sorted(whole("layer", layer) for layer in listed)),
        codec=settings["codec"]["name"],
        unit=optional_whole("unit", settings["unit"]),
        max_bytes=optional_whole("max_bytes", settings["max_bytes"]),
        readers=whole("readers", settings["readers"]),
        rank=of_job("rank", settings["rank"], "RANK", 0),
        world=of_job("world", settings["world"], "WORLD_SIZE", 1),
        faults=Faults(settings["oom"], whole("non_finite", settings["non_finite"])),
        **{
            name: whole(name, settings[name])
            for name in ("tokens", "context", "seed", "batch", "chunk")
        },
    )


def of_job(name: str, value: Any, variable: str, alone: int) -> int:
    """A process's place in its job: as set, or as its launcher says (torchrun, accelerate), or
    alone.
    """
    return whole(name, int(os.environ.get(variable, alone)) if value is None else value)


def default_store(model: dict[str, Any], group: dict[str, Any]) -> str:
    """activations/MODEL_TEXT.zarr, after the folder, file or data sets that each group names."""
    model_name = "tiny" if model["path"] == EMBEDDED else Path(str(model["path"])).name
    return f"activations/{model_name}_{source_name(group)}.zarr"


def model_config(group: dict[str, Any], device: str | None) -> ModelConfig:
    """The model that a `model` group names, on the asked device or the best: of several GPUs this
    process's own.
    """
    return ModelConfig(
        str(group["path"]), str(group["revision"]), group["dtype"], str(own_device(device))
    )


def command(settings: dict[str, Any], _: Job = ALONE) -> None:
    """Carry out one `action`."""
    action = settings["action"]
    if action not in ACTIONS:
        raise SettingError(f"action={action} is unknown; choose one of {', '.join(ACTIONS)}")
    config = harvest_config(settings)
    place = place_of(config.store)
    if action == "status":
        print("\n".join(status(place)))
        return
    if action == "repair":
        print("\n".join(repaired(repair(place))))
        return
    model = model_config(settings["model"], settings["device"])
    if action == "verify":
        require_store(place)  # before the minutes that a model may take to load
        print(verify(place, load(model)))
        return
    manifest.require_free(place)
    planned = planned_for(config, model)
    lines = planned.lines()
    if action == "plan":
        print("\n".join(lines))
        require_fit(planned, config.store)
        print(planned.hours(probe(load(model), config), config.world))
        return
    tell(*lines)
    require_fit(planned, config.store)
    source = source_of(settings["text"], config.seed)
    harvest(config, load(model), source)


def repaired(keys: list[str]) -> list[str]:
    """What a repair did, and what is left to do, in lines."""
    dropped = sum(not is_derived(key) for key in keys)
    done = [f"{'wrote again' if is_derived(key) else 'dropped'} {key}" for key in keys]
    return [
        *done,
        f"{dropped} to make again"
        + (": run the same `python -m harvest` again" if dropped else ""),
    ]


def planned_for(config: HarvestConfig, model: ModelConfig) -> Plan:
    """The plan, from the model's configuration alone: nothing is loaded for it."""
    architecture = read_config(resolve(model.path, model.revision))
    done = share_done(config)
    costs = cost(architecture, config.layers, model.dtype, config.batch, config.context)
    return plan(config, costs, architecture.get_text_config().hidden_size, model.device, done)
