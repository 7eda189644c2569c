"""What `python -m harvest` does with its settings."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from residual_saes.conf.command import ALONE, Job
from residual_saes.conf.early import require_right
from residual_saes.data import command_line, rank
from residual_saes.data.device import own_device
from residual_saes.data.journal import aligned, heartbeat, show, suggest, tell, tell_header
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.rank import Rank
from residual_saes.data.settings import flag, optional_whole, single, whole
from residual_saes.data.store import coming, default, manifest, model_folder, retention
from residual_saes.data.store.place import place_of
from residual_saes.data.store.repair import is_derived, is_pack, repair, require_store
from residual_saes.data.text.documents import TextSource
from residual_saes.data.text.sources import source_name, source_of
from residual_saes.harvest import defaults
from residual_saes.harvest.config import Faults, HarvestConfig, check_context
from residual_saes.harvest.cost import cost
from residual_saes.harvest.description import Description
from residual_saes.harvest.dissection import require_foreseen
from residual_saes.harvest.headers import Stored, require_layers, require_usable, stored
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import ModelConfig, load
from residual_saes.harvest.plan import Plan, guess, plan, probe, require_fit, share_done
from residual_saes.harvest.provenance import require_same_so_far
from residual_saes.harvest.spine import begun
from residual_saes.harvest.status import status
from residual_saes.harvest.thinning import thin
from residual_saes.harvest.verify import verify


def command(settings: dict[str, Any], job: Job = ALONE) -> None:
    """Carry out one `action`."""
    action = settings["action"]
    require_right("harvest", {"action": action})
    place = place_of(store_of(settings))

    # What needs no model.
    if action == "status":
        show(*status(place))
        return
    if action == "repair":
        with heartbeat("checking the store"):
            made_good = repair(place)
        show(*repaired(made_good))
        return

    if action == "thin":
        thin(place, settings["out"])
        return

    # What needs a model, and a store that is there.
    if "model.path" in job.given and "model" not in job.given:
        device = own_device(settings["device"]).type
        settings["model"] = defaults.own_model(settings["model"], job.given, device)
    goes_on = bool(job.given) and manifest.exists(place)
    if goes_on:
        settings, from_store = defaults.recalled(settings, job.given, place)
        tell(from_store)
    config = harvest_config(settings)
    model = model_config(settings["model"], settings["device"])
    if action == "run":
        tell_standing(standing(settings), model.device)
    if action == "verify":
        require_store(place)  # before the minutes that a model may take to load
        with heartbeat("checking the store"):
            good_news = verify(place, lambda deepest: load(model, deepest=deepest))
        show(good_news)
        return

    # What needs room for a store. No weight is read before a plan is made that fits.
    probing = flag("probe", settings["probe"])
    force = flag("force", settings["force"])
    manifest.require_free(place)
    retention.refuse_thin(place, "harvesting")
    if goes_on and not asks_for_text(job.given):
        source = defaults.recalled_text(place)
    else:
        source = source_of(settings["text"], config.seed)
    described = Description.of(model)
    settings, chosen = defaults.filled(settings, described, source)
    (show if action == "plan" else tell)(*chosen)
    config = harvest_config(settings)
    planned = checked_plan(config, described, source, action, force=force)
    if action == "plan" and not probing:
        return
    purpose = "; a few batches are timed then" if action == "plan" else ""
    tell(f"loading {model.path} onto {model.device}, its digest taken meanwhile{purpose}")
    announced = coming.announced(place) if action == "run" and config.max_bytes else nullcontext()
    reading = begun(config, source) if action == "run" else nullcontext()
    with announced, reading as reader:
        lm = load(model, deepest=max(config.layers), tokenizer=described.tokenizer)
        if action == "plan":
            measured = planned.hours(probe(lm, config), config.world, "(measured)")
            show(*aligned({"hours": measured}))
        else:
            harvest(config, lm, source, reader)
            if model.path != EMBEDDED:
                model_folder.remember(place, model.path)
    if action == "run" and not job.multirun:
        suggest(command_line.of("train", f"store={config.store}"))


def checked_plan(
    config: HarvestConfig, described: Description, source: TextSource, action: str, *, force: bool
) -> Plan:
    """Make the plan and print it, then refuse what cannot be, without reading any weight.

    Args:
        force: of disk or memory that seem too small, warn.

    Raises:
        SettingError: the model's files, its template, a layer, the context or the memory.
        StoreError: the disk, or a store that was made with other settings.
    """
    model = described.config
    files = stored(model.path, described.folder)
    planned = planned_for(config, described, files)
    speed = planned.hours(guess(planned, model.dtype), config.world, "(a guess)")
    d_model = described.text.hidden_size
    header = {
        "model": f"{model.path}, d_model {d_model:,}, {model.dtype}, on {model.device}",
        **planned.figures(),
        "hours": speed,
        "store": str(config.store),
    }
    if 0 < (done := share_done(config)) < 1:
        header["goes on"] = f"at unit {int(done * planned.units):,} of {planned.units:,}"
    if action == "plan":
        show(*aligned(header))
    else:
        tell_header(header)

    check_context(config, described.max_context)
    if source.chats:
        described.require_template()
    require_same_so_far(place_of(config.store), config, described, source)
    if not described.quantised:
        require_usable(files, planned.model.parameters, model.path)
    require_fit(planned, config.store, force=force)
    return planned


# -- settings --------------------------------------------------------------------------------------


def harvest_config(settings: dict[str, Any]) -> HarvestConfig:
    """The harvest's configuration from plain settings; what is open is as `provisional` has it."""
    settings = defaults.provisional(settings)
    layers = settings["layer"] if settings["layer"] is not None else settings["model"]["layers"]
    listed = layers if isinstance(layers, list) else [layers]
    sites = settings["site"]
    stands = standing(settings)
    return HarvestConfig(
        store=store_of(settings),
        layers=tuple(sorted(whole("layer", layer) for layer in listed)),
        tokens=whole("tokens", settings["tokens"]),
        context=whole("context", settings["context"]),
        max_tokens=optional_whole("text.max_tokens", settings["text"].get("max_tokens")),
        seed=whole("seed", settings["seed"]),
        batch=whole("batch", settings["batch"]),
        unit=optional_whole("unit", settings["unit"]),
        chunk=whole("chunk", settings["chunk"]),
        sites=tuple(map(str, sites if isinstance(sites, list) else [sites])),
        codec=settings["codec"]["name"],
        attention=settings["attention"],
        rank=stands.rank,
        world=stands.world,
        faults=faults(settings),
        max_bytes=optional_whole("max_bytes", settings["max_bytes"]),
        readers=whole("readers", settings["readers"]),
    )


def standing(settings: dict[str, Any]) -> Rank:
    """Where this process stands among those that make the store."""
    return rank.here(
        optional_whole("rank", settings["rank"]), optional_whole("world", settings["world"])
    )


def faults(settings: dict[str, Any]) -> Faults:
    """What happens where something fails, from plain settings."""
    non_finite = whole("non_finite", settings["non_finite"])
    return Faults(settings["oom"], non_finite, settings["text"].get("bad", "stop"))


def store_of(settings: dict[str, Any]) -> str:
    """The store that is asked for, or the default."""
    named = single("store", settings["store"])
    return str(named or default_store(settings["model"], settings["text"]))


def asks_for_text(given: Collection[str]) -> bool:
    """Whether a command line names a text."""
    return any(
        name.split(".")[0] == "text" and name not in ("text.bad", "text.max_tokens")
        for name in given
    )


def default_store(model: dict[str, Any], text: dict[str, Any]) -> str:
    """activations/MODEL_TEXT.zarr, after the folder, file or data sets that the groups name."""
    path = Path(str(model["path"]))
    model_name = "tiny" if model["path"] == EMBEDDED else path.name or path.resolve().name
    return default.path_of(model_name, source_name(text))


def model_config(model: dict[str, Any], device: str | None) -> ModelConfig:
    """The model that the `model` group names, on the asked device or this process's best."""
    return ModelConfig(
        path=str(model["path"]),
        revision=str(model["revision"]),
        dtype=model["dtype"],
        device=str(own_device(device)),
    )


def tell_standing(stands: Rank, device: str) -> None:
    """Tell which of several processes this is, if an engine has said so."""
    if stands.source and stands.world > 1:
        tell(f"rank {stands.rank} of {stands.world} by {stands.source}, device {device}")


# -- parts of actions ------------------------------------------------------------------------------


def planned_for(config: HarvestConfig, described: Description, files: Stored) -> Plan:
    """The plan, from the model's configuration and its files' headers."""
    model = described.config
    require_layers(files, described.text, model.path)
    costs = cost(described.whole, config.points, model.dtype, config.batch, config.context)
    require_foreseen(described.text, config.points)
    copied = files.other_share(model.dtype)
    d_model = described.text.hidden_size
    return plan(config, costs, d_model, model.device, share_done(config), copied=copied)


def repaired(keys: list[str]) -> list[str]:
    """The lines that tell what a repair did, and what is left to do."""
    lines: list[str] = []
    dropped = 0
    for key in keys:
        if is_derived(key):
            lines.append(f"wrote again {key}")
        else:
            lines.append(f"dropped {key}")
            dropped += not is_pack(key)
    way_on = ": run the same `python -m harvest` again" if dropped else ""
    return [*lines, f"{dropped} to make again{way_on}"]
