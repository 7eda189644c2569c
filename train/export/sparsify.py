"""sparsify: cfg.json and sae.safetensors, TopK alone. delphi reads the same files."""

from __future__ import annotations

from pathlib import Path

from train.export.format import (
    About,
    read_json,
    read_tensors,
    refuse,
    require_topk,
    required,
    tensor_of,
    to_json,
    to_safetensors,
)
from train.sae import SAE


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    require_topk(sae, "sparsify")
    config = {
        "activation": "topk",
        "expansion_factor": max(1, round(sae.d_sae / sae.d_model)),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
    }
    state = {
        "encoder.weight": sae.encoder,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    folder = (
        f"layers.{about.layer}"  # sparsify's name of the layer's output, by which delphi finds it
    )
    return {
        f"{folder}/cfg.json": to_json(config),
        f"{folder}/sae.safetensors": to_safetensors(**state),
    }


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    inside = sorted(path.parent for path in folder.glob("*/cfg.json"))
    if inside and not (folder / "cfg.json").exists():
        which = ", ".join(hookpoint.name for hookpoint in inside)
        refuse(len(inside) > 1, folder, f"several hookpoints ({which})", "one of them")
        (folder,) = inside
    config = read_json(folder / "cfg.json")
    tensors = read_tensors(folder / "sae.safetensors")
    kind = config.get("activation", "topk")
    refuse(kind != "topk", folder, f"activation {kind}", "topk")
    for name in ("transcode", "skip_connection"):
        refuse(bool(config.get(name)), folder, f"{name}=true", "an autoencoder of one layer")
    weight = tensor_of(tensors, "encoder.weight", folder)
    W_dec, b_enc, b_dec = (
        tensor_of(tensors, name, folder) for name in ("W_dec", "encoder.bias", "b_dec")
    )
    return SAE.of(weight.T.contiguous(), W_dec, b_enc, b_dec, int(required(config, "k", folder)))
