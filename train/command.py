"""What `python -m train` does with its settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from residual_saes.conf.command import ALONE, Job
from residual_saes.data import command_line, durable, rank
from residual_saes.data.device import own_device
from residual_saes.data.errors import StoreError
from residual_saes.data.journal import suggest, tell
from residual_saes.data.rows import summary
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.settings import build, flag, optional_whole, whole
from residual_saes.data.store import coming, default
from residual_saes.train import objective, recipe, run, trackers, ways
from residual_saes.train.arm import Arm
from residual_saes.train.asked import Asked, stem
from residual_saes.train.columns import widths_of
from residual_saes.train.loop import train
from residual_saes.train.optim import OptimConfig
from residual_saes.train.parallel import Group
from residual_saes.train.run import FOLDER as RUNS
from residual_saes.train.run import source_of
from residual_saes.train.sae import SAEConfig
from residual_saes.train.stream import row_count, rows_of, store_at
from residual_saes.train.trainer import TrainConfig
from residual_saes.train.warm import Start

_ARM_BYTES = 150  # of a directory's name; file systems allow 255
_COUNTS = (
    "seed",
    "data_seed",
    "log_every",
    "eval_every",
    "eval_rows",
    "checkpoint_every",
)


def command(settings: dict[str, Any], job: Job = ALONE) -> None:
    """Train one arm; with the other processes, if torchrun or accelerate started several."""
    device = own_device(settings["device"])
    several = rank.processes().world > 1 and not job.multirun
    with Group(device) if several else nullcontext(Group()) as group:
        this = arm(settings, job)
        train(this, device, group)
    if not job.multirun:
        suggest(command_line.of("analyze", "study=quality", f"run={this.folder}"))


def arm(settings: dict[str, Any], job: Job = ALONE) -> Arm:
    """The arm that the settings describe.

    Raises:
        SettingError: a setting is wrong, or store= is missing and no one store is meant.
        StoreError: there is no such store.
    """
    device = own_device(settings["device"])
    log = trackers.asked(settings["log"])
    settings = continued(settings, job)
    sae_name = settings["sae"].pop("name", "sae")
    optim = build(OptimConfig, "optim", settings["optim"])
    chosen = objective.find(settings["sae"]["activation"])
    sae = build(chosen.settings, "sae", recipe.provisional(settings["sae"]))
    policy = Policy(
        flag("drop_bos", settings["drop_bos"]),
        flag("drop_outliers", settings["drop_outliers"]),
        token_ids("drop_tokens", settings["drop_tokens"]),
    )
    tokens = optional_whole("tokens", settings["tokens"])
    counts: dict[str, Any] = {name: whole(name, settings[name]) for name in _COUNTS}
    batch = optional_whole("batch", settings["batch"])
    named = settings["store"]
    paths = list(map(str, named if isinstance(named, list) else [named] if named else []))
    asked = Asked.of(settings["layer"], settings["site"], max(len(paths), 1), sae)
    paths = paths or [default_store(Path.cwd(), asked)]
    if len(paths) == 1:
        coming.await_ring(paths[0])
    stores = list(map(store_at, paths))
    layers = asked.layers_in(stores)
    name = f"{stem(stores)}_{sae_name}_{asked.name(layers)}"
    folder = run_directory(settings["run"], name, job)
    start = Start.of(settings["start"], folder) if settings["start"] else None
    if start:
        settings["sae"] = start.adopted(settings["sae"], job.given)
    sources = asked.sources(stores, layers)
    sizes, batch, chosen_sizes = recipe.filled(
        settings["sae"],
        batch,
        max(source.width for source in sources),
        lambda: tokens or row_count(sources, policy),
    )
    tell_once(chosen_sizes)
    config = TrainConfig(
        layer=layers[0] if len(layers) == 1 else layers,
        site=asked.sites[0] if len(asked.sites) == 1 else asked.sites,
        stores=len(stores),
        matmul=settings["train"]["matmul"] or ("tf32" if device.type == "cuda" else "fp32"),
        tokens=tokens,
        policy=policy,
        batch=batch,
        sae=build(chosen.settings, "sae", sizes),
        optim=optim,
        start=start.digest if start else None,
        **counts,
    )
    pinned = device.type == "cuda"
    stream = rows_of(sources, config.batch, config.data_seed, policy, pinned)
    if start:
        widths = widths_of(config.ports, stream.reader)
        start.require_fit(config.sae, widths, f"the rows of {stem(stores)}")
    follower = stream.reader.follower(file_name(str(folder.resolve())), str(folder))
    several = {"store_paths": [store.name for store in stores]} if len(stores) > 1 else {}
    facts: dict[str, Any] = {
        "store_path": stores[0].name,
        **several,
        "sae_name": sae_name,
        "source": source_of(stores[0]),
        "left_out": stream.left_out,
        **({"started_from": start.named} if start else {}),
        **_variance_lost(sources),
    }
    asked_ways = ways.asked(settings["train"]["ways"], device)
    return Arm(config, stream, folder, follower, facts, start, log, asked_ways)


def continued(settings: dict[str, Any], job: Job) -> dict[str, Any]:
    """Settings with a run's own dictionary, schedule and batch where the run is there already and
    the command line does not choose others: a later version may have other defaults.
    """
    folder = Path(settings["run"] or "")
    if (
        {"sae", "optim"} & job.given
        or "run" not in job.given
        or not (folder / run.CONFIG).is_file()
    ):
        return settings
    try:
        recorded = run.read_config(folder)
    except StoreError:  # training writes it again if these settings are the run's
        return settings
    own: dict[str, Any] = {"batch": recorded["settings"]["batch"]}
    own["sae"] = {"name": recorded["sae_name"], **SAEConfig.LATER, **recorded["settings"]["sae"]}
    own["optim"] = {**OptimConfig.LATER, **recorded["settings"]["optim"]}
    for name in job.given:
        group, _, setting = name.rpartition(".")
        if group in own:
            own[group][setting] = settings[group][setting]
    if "batch" in job.given:
        own["batch"] = settings["batch"]
    return {**settings, **own}


def _variance_lost(sources: Sequence[Source]) -> dict[str, float]:
    """What a lossy codec lost of the variance of the rows: the most of the sources; tells it."""
    most = None
    for source in sources:
        if not source.store.complete(source.point):
            continue
        lost = summary.variance_lost(*source)
        if lost is not None:
            tell(
                f"{source.store.name} keeps rows of {source.point} as "
                f"{source.store.manifest['codec']}, which lost {lost:.2e} of their variance"
            )
            most = max(lost, most or 0.0)
    return {} if most is None else {"store_variance_lost": most}


@cache  # the arms of a sweep mostly have the same sizes
def tell_once(line: str) -> None:
    """Tell a line, if it says anything, once in this process."""
    tell(*filter(None, [line]))


@cache  # the arms of a sweep take the same one, which is said once
def default_store(here: Path, asked: Asked) -> str:
    """The store that is meant where none is named, in the working directory `here`."""
    path, reason = default.find(lambda store: asked.points(asked.layers_in([store])))
    tell(f"store={path}: {reason}")
    return path


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or a list of them, ascending."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted({whole(name, token) for token in listed}))


def run_directory(asked: str | None, name: str, job: Job) -> Path:
    """The run's directory: as asked, else under runs/ by `name`.

    Arms of a multirun that share it, or are not asked for one, have directories in it.
    """
    folder = Path(asked) if asked else RUNS / file_name(name)
    is_own = asked and (
        "run" not in job.shared or any("${" in text for text in job.overrides if "run=" in text)
    )
    if not job.multirun or is_own:
        return folder
    earlier = folder / _earlier_name(job.overrides)
    return earlier if earlier.exists() else folder / arm_name(job)


def arm_name(job: Job) -> str:
    """A directory's name: what differs between the arms of a multirun, as in `lr-0.001_k-32`.

    It has letters, digits, `.`, `_` and `-` alone, which mean nothing to a shell or to Hydra.
    `store` is left out: the parent directory names it.
    """
    values = {}
    for override in job.overrides:
        key, _, value = override.partition("=")
        values[key.lstrip("+")] = value
    keys = [key for key in values if key not in {"store", "run", *job.shared}]
    last = [key.rpartition(".")[2] for key in keys]
    parts = []
    for key, short in zip(keys, last, strict=True):
        listed = values[key].strip("[]").replace(",", "-")
        parts.append(f"{short if last.count(short) == 1 else key}-{listed}")
    return file_name("_".join(parts) or "default", "._-")


def _earlier_name(overrides: Sequence[str]) -> str:
    """The name that earlier versions gave, of all overrides: a sweep that is there goes on."""
    named = [override for override in overrides if not override.startswith("store=")]
    return file_name(",".join(named) or "default")


def file_name(text: str, signs: str = "._=,-") -> str:
    """`text` as one path component of letters, digits and `signs`.

    A digest keeps changed texts apart.
    """
    safe = re.sub(rf"[^A-Za-z0-9{signs}]", "-", text)[:_ARM_BYTES].lstrip(".")
    return safe if safe == text else f"{safe}-{durable.digest(text.encode())[:8]}"
