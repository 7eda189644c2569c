"""`python -m harvest`: text through a language model into an activation store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import text
from data.errors import SettingError, run_command
from data.settings import optional_whole, torch_device, whole
from data.verify import repair
from harvest.lm import EMBEDDED, ModelConfig, load
from harvest.loop import check_layers, harvest, share_done, status, verify
from harvest.plan import HarvestConfig, plan, require_room

ACTIONS = ("run", "plan", "status", "verify", "repair")


def harvest_config(settings: dict[str, Any]) -> HarvestConfig:
    """Our own configuration from Hydra's plain values."""
    layers = settings["layer"] if settings["layer"] is not None else settings["model"]["layers"]
    if layers is None:
        raise SettingError("layer= is not set, and this model's configuration has no default; give a layer number")
    listed = layers if isinstance(layers, list) else [layers]
    return HarvestConfig(
        store=Path(settings["store"] or default_store(settings["model"], settings["text"])),
        layers=tuple(sorted(whole("layer", layer) for layer in listed)),
        tokens=whole("tokens", settings["tokens"]),
        context=whole("context", settings["context"]),
        seed=whole("seed", settings["seed"]),
        batch=whole("batch", settings["batch"]),
        unit=optional_whole("unit", settings["unit"]),
        chunk=whole("chunk", settings["chunk"]),
        codec=settings["codec"]["name"],
    )


def default_store(model: dict[str, Any], source: dict[str, Any]) -> str:
    """activations/MODEL_TEXT.zarr, after the folder, file or data set that each group names."""
    model_name = "tiny" if model["path"] == EMBEDDED else Path(str(model["path"])).name
    text_name = Path(source["path"]).stem if source["path"] is not None else source["name"]
    return f"activations/{model_name}_{text_name}.zarr"


def text_source(group: dict[str, Any]) -> text.TextSource:
    """The source that a `text` group names: its path if it has one, else its data set, else the embedded problems."""
    if group["path"] is not None:
        return text.FileText(Path(group["path"]), group["field"])
    if group["dataset"] is not None:
        options = {name: group[name] for name in ("dataset", "config", "split", "field", "revision")}
        return text.HubText(**options)
    return text.TinyText()


def model_config(group: dict[str, Any], device: str | None) -> ModelConfig:
    """The model that a `model` group names, on the asked or the best device."""
    return ModelConfig(str(group["path"]), str(group["revision"]), group["dtype"], str(torch_device(device)))


def command(settings: dict[str, Any]) -> None:
    """Carry out one `action`."""
    action = settings["action"]
    if action not in ACTIONS:
        raise SettingError(f"action={action} is unknown; choose one of {', '.join(ACTIONS)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: this version harvests with one process a store")
    config = harvest_config(settings)
    if action == "status":
        print("\n".join(status(config.store)))
        return
    if action == "repair":
        dropped = repair(config.store)
        print("\n".join([*(f"dropped {record}" for record in dropped), f"{len(dropped)} units to make again"]))
        return
    lm = load(model_config(settings["model"], settings["device"]))
    if action == "verify":
        print(verify(config.store, lm))
    elif action == "plan":
        check_layers(config, lm)
        planned = plan(config, lm.d_model, config.layers, share_done(config))
        print("\n".join(planned.lines()))
        require_room(planned, config.store)
    else:
        harvest(config, lm, text_source(settings["text"]))


@hydra.main(version_base="1.3", config_path="../conf", config_name="harvest")
def main(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    run_command(lambda: command({str(key): value for key, value in settings.items()}))


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that its refusals come here, to be said in one line
    run_command(main, (HydraException, OmegaConfBaseException))
