"""dictionary_learning: config.json and ae.pt.

AutoEncoderTopK; JumpReluAutoEncoder, whose encoder does not subtract b_dec from the row.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.errors import StoreError
from data.site import RESID_POST
from train.export.format import About, read_json, refuse, tensor_of, thresholded, to_json
from train.sae import SAE


def _pickled(state: Mapping[str, Tensor]) -> bytes:
    """The content of a .pt file."""
    content = {}
    for name, tensor in state.items():
        content[name] = tensor.detach().cpu().contiguous()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    kind = "AutoEncoderTopK" if sae.threshold is None else "JumpReluAutoEncoder"
    trainer = {
        "dict_class": kind,
        "trainer_class": "TopKTrainer" if sae.threshold is None else "JumpReluTrainer",
        "activation_dim": sae.d_model,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "layer": about.layer,
        "lm_name": about.model,
        "submodule_name": f"{RESID_POST}_layer_{about.layer}",
    }
    if sae.threshold is None:
        state = {
            "k": torch.tensor(sae.k, dtype=torch.int),
            "threshold": torch.tensor(-1.0),  # none
            "decoder.weight": sae.W_dec.T,
            "encoder.weight": sae.encoder,
            "encoder.bias": sae.b_enc,
            "b_dec": sae.b_dec,
        }
    else:
        state = {**sae.tensors(), "b_enc": sae.b_enc - sae.b_dec @ sae.W_enc}
    buffer = {"ctx_len": about.context}
    return {
        "config.json": to_json({"trainer": trainer, "buffer": buffer}),
        "ae.pt": _pickled(state),
    }


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    path = folder / "ae.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        raise StoreError(f"{path} cannot be read as an SAE ({type(error).__name__})") from error
    refuse(
        not isinstance(state, dict),
        folder,
        "an ae.pt that is no state dict",
        "dictionary_learning's",
    )
    if "encoder.weight" in state:
        refuse(
            "k" not in state,
            folder,
            "an autoencoder with an encoder but no k",
            "AutoEncoderTopK or BatchTopKSAE",
        )
        W_enc, W_dec = (
            tensor_of(state, f"{name}.weight", folder).T.contiguous()
            for name in ("encoder", "decoder")
        )
        b_enc, b_dec = (tensor_of(state, name, folder) for name in ("encoder.bias", "b_dec"))
        threshold = float(state.get("threshold", -1.0))
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if "BatchTopK" in str(config.get("trainer", {}).get("dict_class", "")) and threshold >= 0:
            return thresholded(W_enc, W_dec, b_enc, b_dec, torch.full_like(b_enc, threshold))
        return SAE.of(W_enc, W_dec, b_enc, b_dec, int(state["k"]))
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    W_enc, W_dec, b_enc, b_dec, thresholds = (tensor_of(state, name, folder) for name in names)
    return thresholded(W_enc, W_dec, b_enc + b_dec @ W_enc, b_dec, thresholds)
