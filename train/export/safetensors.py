"""Our own tensors by our own names: config.json and sae.safetensors."""

from __future__ import annotations

from pathlib import Path

from data.site import RESID_POST
from train.export.format import (
    About,
    read_json,
    read_tensors,
    required,
    tensor_of,
    to_json,
    to_safetensors,
)
from train.sae import SAE


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
    W_enc, W_dec, b_enc, b_dec = (
        tensor_of(tensors, name, folder) for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    return SAE.of(
        W_enc, W_dec, b_enc, b_dec, int(required(config, "k", folder)), tensors.get("threshold")
    )
