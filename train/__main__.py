"""python -m train store=PATH [layer=21] [run=runs/NAME] [sae=...] [optim=...]: the one file here that knows Hydra."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load ends this at once, without a traceback

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import durable, ring, summary
from data.device import own_device
from data.errors import SettingError, run_command, run_main
from data.journal import tell
from data.reader import Policy, RingFollower
from data.settings import build, described, flag, optional_whole, whole
from data.store import Store
from train import parallel
from train.loop import Arm, train
from train.optim import OptimConfig
from train.parallel import Group
from train.run import source_of
from train.sae import SAEConfig
from train.stream import Whole, rows_of, store_at
from train.trainer import TrainConfig

_ARM_BYTES = 150  # of a directory's name; file systems allow 255


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        train_one(plain(cfg))  # an arm that is refused must not end the sweep, as an exit would
    else:
        run_command(lambda: train_one(plain(cfg)))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Hydra's settings as plain values."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def train_one(settings: dict[str, Any]) -> None:
    """Train one arm; with the other processes, if torchrun or accelerate started several."""
    device = own_device(settings["device"])
    if parallel.world() > 1 and HydraConfig.get().mode == RunMode.RUN:
        with Group(device) as group:
            train(arm(settings), device, group)
    else:
        train(arm(settings), device)


def arm(settings: dict[str, Any]) -> Arm:
    """Turn the settings into objects."""
    if not settings["store"]:
        raise SettingError("store= is missing; give the path of an activation store, e.g. store=activations/tiny.zarr")
    device, name = own_device(settings["device"]), settings["sae"].pop("name", "sae")
    optim, sae = build(OptimConfig, "optim", settings["optim"]), build(SAEConfig, "sae", settings["sae"])
    policy = Policy(*(flag(name, settings[name]) for name in ("drop_bos", "drop_outliers")))
    store = store_at(str(settings["store"]))
    layer = first_layer(store) if settings["layer"] is None else whole("layer", settings["layer"])
    counts = ("seed", "data_seed", "batch", "log_every", "eval_every", "eval_rows", "checkpoint_every")
    config = TrainConfig(
        layer=layer,
        matmul=settings["train"]["matmul"] or ("tf32" if device.type == "cuda" else "fp32"),
        tokens=optional_whole("tokens", settings["tokens"]),
        policy=policy,
        sae=sae,
        optim=optim,
        **{key: whole(key, settings[key]) for key in counts},
    )
    stream, reader = rows_of(store, layer, config.batch, config.data_seed, policy, device.type == "cuda")
    folder = run_directory(settings["run"], f"{Path(store.name).stem}_{name}_L{layer}")
    registration = file_name(str(folder.resolve()))
    following = RingFollower(reader, store, layer, registration, str(folder)) if reader.span else Whole()
    facts: dict[str, Any] = {"store_path": store.name, "sae_name": name, "source": source_of(store)}
    if store.complete(layer) and (lost := summary.variance_lost(store, layer)) is not None:
        facts |= {"store_variance_lost": lost}
        tell(f"{store.name} keeps rows as {store.manifest['codec']}, which lost {lost:.2e} of their variance")
    return Arm(config, stream, folder, following, facts)


def first_layer(store: Store) -> int:
    """The default layer."""
    found = ring.read(store.place)
    if found:
        return found.layers[0]
    if not store.layers:
        raise SettingError(f"{store.name} has no layer yet; finish it with `python -m harvest store={store.name}`")
    return store.layers[0]


def run_directory(asked: str | None, name: str) -> Path:
    """Where the run lives: as asked, or under runs/ by store, dictionary and layer, and by its arm in a multirun."""
    if asked:
        return Path(asked)
    hydra_config = HydraConfig.get()
    folder = Path("runs") / file_name(name)
    if hydra_config.mode == RunMode.MULTIRUN:
        folder /= arm_name(hydra_config.overrides.task)
    return folder


def arm_name(overrides: Sequence[str]) -> str:
    """A directory name made of a job's overrides; `store` is left out, because the parent directory names it."""
    return file_name(",".join(item for item in overrides if not item.startswith("store=")) or "default")


def file_name(text: str) -> str:
    """`text` as one path component. Where something had to be changed, a digest keeps different texts apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,-]", "-", text)[:_ARM_BYTES].lstrip(".")
    return safe if safe == text else f"{safe}-{durable.digest(text.encode())[:8]}"


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that its refusals come here, to be said in one line
    run_main(main, (HydraException, OmegaConfBaseException), lambda: described("train", sys.argv[1:]))
