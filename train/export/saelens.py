"""SAELens: cfg.json and sae_weights.safetensors.

Its architectures topk, jumprelu and standard (which is jumprelu with thresholds of 0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.site import hook_name
from train.export.format import (
    About,
    read_json,
    read_tensors,
    refuse,
    required,
    tensor_of,
    thresholded,
    to_json,
    to_safetensors,
    unit_decoder,
)
from train.sae import SAE

# SAELens before this version takes files that do not name theirs for another layout.
_LAYOUT = "6.0.0"


def config_of(sae: SAE, about: About) -> dict[str, Any]:
    """SAELens' cfg.json."""
    return {
        "architecture": "topk" if sae.threshold is None else "jumprelu",
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.threshold is None else {}),
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _LAYOUT,
            "model_name": about.model,
            "hook_name": hook_name(about.layer),
            "hf_hook_name": f"model.layers.{about.layer}.output",
            "context_size": about.context,
            "dataset_path": about.text,
            "prepend_bos": True,
        },
    }


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    return {
        "cfg.json": to_json(config_of(sae, about)),
        "sae_weights.safetensors": to_safetensors(**sae.tensors()),
    }


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    config = read_json(folder / "cfg.json")
    tensors = read_tensors(folder / "sae_weights.safetensors")
    kind = required(config, "architecture", folder)
    refuse(
        kind not in ("topk", "jumprelu", "standard"),
        folder,
        f"architecture {kind}",
        "topk, jumprelu or standard",
    )
    for name in ("normalize_activations", "reshape_activations"):
        asked = config.get(name, "none")
        refuse(asked not in ("none", None), folder, f"{name}={asked}", "none")
    W_enc, W_dec, b_enc, b_dec = (
        tensor_of(tensors, name, folder) for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + b_dec @ W_enc
    if kind == "topk":
        if config.get("rescale_acts_by_decoder_norm", False):
            return unit_decoder(
                SAE.of(W_enc, W_dec, b_enc, b_dec, int(required(config, "k", folder)))
            )
        return SAE.of(W_enc, W_dec, b_enc, b_dec, int(required(config, "k", folder)))
    threshold = (
        tensor_of(tensors, "threshold", folder) if kind == "jumprelu" else torch.zeros_like(b_enc)
    )
    return thresholded(W_enc, W_dec, b_enc, b_dec, threshold)
