"""What `python -m train` does with its settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from conf.command import ALONE, Job
from data import durable, rank
from data.device import own_device
from data.errors import SettingError
from data.journal import tell
from data.rows import summary
from data.rows.source import Source
from data.rows.split import Policy
from data.settings import build, flag, optional_whole, whole
from data.store import coming, default, retention
from data.store.store import Store
from train import objective
from train.arm import Arm
from train.loop import train
from train.optim import OptimConfig
from train.parallel import Group
from train.run import FOLDER as RUNS
from train.run import source_of
from train.stream import rows_of, store_at
from train.trainer import TrainConfig

_ARM_BYTES = 150  # of a directory's name; file systems allow 255
_COUNTS = (
    "seed",
    "data_seed",
    "batch",
    "log_every",
    "eval_every",
    "eval_rows",
    "checkpoint_every",
)


def command(settings: dict[str, Any], job: Job = ALONE) -> None:
    """Train one arm; with the other processes, if torchrun or accelerate started several."""
    device = own_device(settings["device"])
    if rank.processes().world > 1 and not job.multirun:
        with Group(device) as group:
            train(arm(settings, job), device, group)
    else:
        train(arm(settings, job), device)


def arm(settings: dict[str, Any], job: Job = ALONE) -> Arm:
    """The arm that the settings describe.

    Raises:
        SettingError: a setting is wrong, or store= is missing and no one store is meant.
        StoreError: there is no such store.
    """
    device = own_device(settings["device"])
    sae_name = settings["sae"].pop("name", "sae")
    optim = build(OptimConfig, "optim", settings["optim"])
    chosen = objective.find(settings["sae"]["activation"])
    sae = build(chosen.settings, "sae", settings["sae"])
    policy = Policy(
        flag("drop_bos", settings["drop_bos"]),
        flag("drop_outliers", settings["drop_outliers"]),
        token_ids("drop_tokens", settings["drop_tokens"]),
    )
    tokens = optional_whole("tokens", settings["tokens"])
    counts: dict[str, Any] = {name: whole(name, settings[name]) for name in _COUNTS}
    asked_layer = optional_whole("layer", settings["layer"])
    path = str(settings["store"] or default_store(Path.cwd(), asked_layer))
    coming.await_ring(path)
    store = store_at(path)
    layer = first_layer(store) if asked_layer is None else asked_layer
    config = TrainConfig(
        layer=layer,
        matmul=settings["train"]["matmul"] or ("tf32" if device.type == "cuda" else "fp32"),
        tokens=tokens,
        policy=policy,
        sae=sae,
        optim=optim,
        **counts,
    )
    pinned = device.type == "cuda"
    sources = (Source.of(store, layer),)
    stream = rows_of(sources, config.batch, config.data_seed, policy, pinned)
    folder = run_directory(settings["run"], f"{Path(store.name).stem}_{sae_name}_L{layer}", job)
    follower = stream.reader.follower(file_name(str(folder.resolve())), str(folder))
    facts: dict[str, Any] = {
        "store_path": store.name,
        "sae_name": sae_name,
        "source": source_of(store),
        "left_out": stream.left_out,
    }
    if store.complete(layer) and (lost := summary.variance_lost(store, layer)) is not None:
        facts["store_variance_lost"] = lost
        tell(
            f"{store.name} keeps rows as {store.manifest['codec']}, which lost {lost:.2e} of their "
            "variance"
        )
    return Arm(config, stream, folder, follower, facts)


@cache  # the arms of a sweep take the same one, which is said once
def default_store(here: Path, layer: int | None) -> str:
    """The store that is meant where none is named, in the working directory `here`."""
    path, reason = default.find(layer)
    tell(f"store={path}: {reason}")
    return path


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or a list of them, ascending."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted({whole(name, token) for token in listed}))


def first_layer(store: Store) -> int:
    """The default layer."""
    points = retention.read(store.place).points or store.points
    if not points:
        raise SettingError(
            f"{store.name} has no layer yet; finish it with `python -m harvest store={store.name}`"
        )
    return points[0].layer


def run_directory(asked: str | None, name: str, job: Job) -> Path:
    """The run's directory: as asked, else under runs/ by `name`, and by the arm in a multirun."""
    if asked:
        return Path(asked)
    folder = RUNS / file_name(name)
    return folder / arm_name(job.overrides) if job.multirun else folder


def arm_name(overrides: Sequence[str]) -> str:
    """A directory name made of a job's overrides.

    `store` is left out: the parent directory names it.
    """
    named = [override for override in overrides if not override.startswith("store=")]
    return file_name(",".join(named) or "default")


def file_name(text: str) -> str:
    """`text` as one path component. A digest keeps changed texts apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,-]", "-", text)[:_ARM_BYTES].lstrip(".")
    return safe if safe == text else f"{safe}-{durable.digest(text.encode())[:8]}"
