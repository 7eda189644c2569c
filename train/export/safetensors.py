"""Our own tensors by our own names: config.json and sae.safetensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.train import sae_file
from residual_saes.train.export import golden
from residual_saes.train.export.format import (
    About,
    read_json,
    read_tensors,
    refuse_unknown,
    to_json,
    to_safetensors,
)
from residual_saes.train.export.origin import Origin
from residual_saes.train.ports import Port, Ports
from residual_saes.train.sae import OPTIONAL, SAE, WEIGHTS
from residual_saes.train.tensors import any_text_of, any_whole_of, refuse, text_of, whole_of

_KEYS = {
    "k",
    "d_model",
    "d_out",
    "d_sae",
    "model",
    "context",
    "text",
    "architecture",
    "scales",
    "second",
}
_PLACES = {"site", "layer", "reads", "writes", "widths"}


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    named: dict[str, Any] = {"model": about.model, "context": about.context, "text": about.text}
    for name in ("architecture", "scales", "second"):
        if getattr(about, name) is not None:
            named[name] = getattr(about, name)
    config = {"k": sae.k, "d_model": sae.d_model, "d_sae": sae.d_sae, **_places(about, sae)}
    content = to_safetensors(**sae.tensors())
    return {"config.json": to_json({**config, **named}), "sae.safetensors": content}


def _places(about: About, sae: SAE) -> dict[str, Any]:
    """Site and layer of an autoencoder; of the others what they read and write, in the order of
    the columns.
    """
    if about.kind == "sae":
        return {"site": about.point.site, "layer": about.layer}
    reads, writes = about.ports.reads, about.ports.writes
    widths = about.widths_of(reads, sae.d_model) + about.widths_of(writes, sae.d_out)
    names = [port.name for port in (*reads, *writes)]
    return {
        "d_out": sae.d_out,
        "reads": names[: len(reads)],
        "writes": names[len(reads) :],
        "widths": dict(zip(names, widths, strict=True)),
    }


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    config = read_json(folder / "config.json")
    tensors = read_tensors(folder / "sae.safetensors")
    refuse_unknown(config, _KEYS | _PLACES, folder, "config.json with")
    refuse_unknown(tensors, {*WEIGHTS, *OPTIONAL}, folder, "the tensor")
    sae = sae_file.checked(folder, {**tensors, "k": config.get("k")})
    for name, size in (("d_model", sae.d_model), ("d_sae", sae.d_sae)):
        whole_of(name, folder, config.get(name), size)
    whole_of("d_out", folder, config.get("d_out", sae.d_out), sae.d_out)
    return golden.checked(sae, folder / "sae.safetensors")


def origin(folder: Path) -> Origin:
    """See train.export.format.Format."""
    config = read_json(folder / "config.json")
    model = any_text_of("model", folder, config.get("model"))
    context = any_whole_of("context", folder, config.get("context"))
    if "reads" in config:
        ports = Ports(_ports(config, "reads", folder), _ports(config, "writes", folder))
        scales = _scales(config.get("scales"), ports, folder)
        return Origin(model=model, context=context, several=ports, scales=scales)
    site = any_text_of("site", folder, config.get("site"))
    layer = any_whole_of("layer", folder, config.get("layer"))
    hook = None if site is None else f"{site} of layer {layer}"
    return Origin(hook, site, layer, model, context)


def _ports(config: Mapping[str, Any], name: str, folder: Path) -> tuple[Port, ...]:
    names = config.get(name)
    refuse(not isinstance(names, list) or not names, folder, f"no {name}", "hook points by name")
    try:
        return tuple(Port.of(text_of(name, folder, port)) for port in names or ())
    except SettingError as error:
        raise StoreError(f"{folder} has {name} with {error}") from error


def _scales(given: Any, ports: Ports, folder: Path) -> dict[str, float] | None:
    """What the rows of each hook point were multiplied by in training, if the file says it."""
    if given is None:
        return None
    names = [port.name for port in ports.every]
    fits = isinstance(given, dict) and sorted(given) == sorted(names)
    fits = fits and all(
        type(scale) in (int, float) and 0 < scale < math.inf for scale in given.values()
    )
    refuse(not fits, folder, "other scales", f"a positive number for each of {', '.join(names)}")
    return {name: float(given[name]) for name in names}
