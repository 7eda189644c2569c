"""Our own tensors by our own names: config.json and sae.safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data.site import RESID_POST
from train.export import golden
from train.export.format import (
    About,
    Weights,
    read_json,
    read_tensors,
    refuse_unknown,
    to_json,
    to_safetensors,
    topk,
)
from train.export.origin import Origin
from train.sae import SAE, WEIGHTS
from train.tensors import any_text_of, any_whole_of, refuse, vector_of, whole_of

_KEYS = {"k", "d_model", "d_sae", "site", *About._fields}


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    config = {
        "k": sae.k,
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "site": RESID_POST,
        **about._asdict(),
    }
    return {"config.json": to_json(config), "sae.safetensors": to_safetensors(**sae.tensors())}


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    config = read_json(folder / "config.json")
    tensors = read_tensors(folder / "sae.safetensors")
    refuse_unknown(config, _KEYS, folder, "config.json with")
    refuse_unknown(tensors, {*WEIGHTS, "threshold"}, folder, "the tensor")
    weights = Weights.of(tensors, folder)
    sae = topk(weights, whole_of("k", folder, config.get("k")), folder)
    for name, size in (("d_model", sae.d_model), ("d_sae", sae.d_sae)):
        whole_of(name, folder, config.get(name), size)
    if "threshold" in tensors:
        threshold = vector_of(tensors, "threshold", sae.d_sae, folder)
        refuse(bool((threshold < 0).any()), folder, "a threshold below 0", "thresholds from 0 on")
        sae = replace(sae, threshold=threshold)
    return golden.checked(sae, folder / "sae.safetensors")


def origin(folder: Path) -> Origin:
    """See train.export.format.Format."""
    config = read_json(folder / "config.json")
    site = any_text_of("site", folder, config.get("site"))
    layer = any_whole_of("layer", folder, config.get("layer"))
    hook = None if site is None else f"{site} of layer {layer}"
    model = any_text_of("model", folder, config.get("model"))
    context = any_whole_of("context", folder, config.get("context"))
    return Origin(hook, site, layer, model, context)
