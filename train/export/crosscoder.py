"""Crosscoders of dictionary_learning's fork, github.com/science-of-finetuning/dictionary_learning.

Rows are (n, L, d) of L hook points of one width. With u = x W_enc + b_enc over all of them:

    CrossCoder             ReLU(u)
    BatchTopKCrossCoder    ReLU(u) where that, times a norm of the latent, is above one threshold

The norm is that of W_dec over all hook points (SAE), the sum of its norms at each (CROSSCODER), or
1 (NONE). A Python package of the fork is not on PyPI, and the library's own has no crosscoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.train.export.format import About, Weights, thresholded, without_b_in
from residual_saes.train.export.origin import Origin
from residual_saes.train.ports import Port, Ports
from residual_saes.train.sae import SAE
from residual_saes.train.tensors import dense_of, refuse, refuse_shape, tensor_of, text_of, whole_of

_WEIGHTS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_NORMALISER = ("activation_mean", "activation_std")  # NaN: rows are taken as they are
BUFFERS = {*_NORMALISER, "activation_global_scale", "target_rms", "code_normalization_id"}
# The tensors of each class.
CLASSES = {"CrossCoder": _WEIGHTS, "BatchTopKCrossCoder": _WEIGHTS | {"k", "threshold"}}
_NORMS = {1: "CROSSCODER", 2: "SAE", 4: "NONE"}  # by code_normalization_id


def submodule(port: Port) -> str:
    """The name of a hook point in config.json, of the second store as 1/resid_post_layer_21."""
    name = f"{port.point.site}_layer_{port.point.layer}"
    return f"{port.store}/{name}" if port.store else name


def of(sae: SAE, about: About) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the configuration of a BatchTopKCrossCoder without norms.

    Raises:
        StoreError: it has no threshold, or several.
    """
    count = len(about.ports.reads)
    threshold = sae.threshold
    if threshold is None or bool((threshold != threshold[0]).any()):
        raise StoreError(
            "dictionary_learning's crosscoders have one threshold for all latents, as "
            "sae.activation=batchtopk gives; to=safetensors takes this one"
        )
    width, left = divmod(sae.d_model, count)
    if left or set(about.widths_of(about.ports.reads, sae.d_model)) != {width}:
        raise StoreError("dictionary_learning has one width; to=safetensors takes several")
    plain = without_b_in(sae)
    shape = (count, width)
    state = {
        "encoder.weight": plain.W_enc.reshape(count, width, -1),
        "encoder.bias": plain.b_enc,
        "decoder.weight": plain.W_dec.reshape(-1, count, width).transpose(0, 1),
        "decoder.bias": plain.b_dec.reshape(shape),
        "k": torch.tensor(sae.k, dtype=torch.int),
        "threshold": threshold[0].clone(),
        "code_normalization_id": torch.tensor(4),
        "target_rms": torch.tensor(1.0),
        "activation_mean": torch.full(shape, torch.nan),
        "activation_std": torch.full(shape, torch.nan),
        "activation_global_scale": torch.ones(count),
    }
    trainer = {
        "dict_class": "BatchTopKCrossCoder",
        "trainer_class": "BatchTopKCrossCoderTrainer",
        "activation_dim": width,
        "dict_size": sae.d_sae,
        "num_layers": count,
        "k": sae.k,
        "code_normalization": "NONE",
        "layer": about.layer,
        "lm_name": about.model,
        "submodule_name": ",".join(submodule(port) for port in about.ports.reads),
    }
    return state, trainer


def read(kind: str, state: Mapping[str, Any], trainer: Mapping[str, Any], folder: Path) -> SAE:
    """The SAE of all hook points' rows, one behind the other, of one of `CLASSES`."""
    for name in _NORMALISER:
        used = name in state and not bool(dense_of(state, name, folder).isnan().all())
        refuse(used, folder, f"{name} of rows that it normalises", "one without")
    weights = _weights(state, folder)
    zero = torch.zeros_like(weights.b_enc)
    if kind == "CrossCoder":
        return thresholded(weights, zero)
    threshold = tensor_of(state, "threshold", folder)
    refuse(threshold.numel() != 1, folder, f"threshold {tuple(threshold.shape)}", "one number")
    norm = _norm(state, trainer, folder)
    W_dec = weights.W_dec.reshape(len(zero), -1, state["decoder.weight"].shape[2])
    of_each = torch.linalg.vector_norm(W_dec, dim=2)
    norms = {"NONE": zero + 1, "SAE": of_each.norm(dim=1), "CROSSCODER": of_each.sum(dim=1)}[norm]
    return thresholded(weights, threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny))


def _weights(state: Mapping[str, Any], folder: Path) -> Weights:
    W_enc, W_dec = (tensor_of(state, f"{side}.weight", folder) for side in ("encoder", "decoder"))
    b_enc, b_dec = (tensor_of(state, f"{side}.bias", folder) for side in ("encoder", "decoder"))
    refuse(b_dec.ndim != 2, folder, f"decoder.bias {tuple(b_dec.shape)}", "(layers, width)")
    count, width = b_dec.shape
    d_sae = b_enc.numel()
    refuse_shape("encoder.weight", W_enc, (count, width, d_sae), folder)
    refuse_shape("decoder.weight", W_dec, (count, d_sae, width), folder)
    flat = W_dec.transpose(0, 1).reshape(d_sae, count * width)
    weights = Weights(W_enc.reshape(count * width, d_sae), flat, b_enc.flatten(), b_dec.flatten())
    return weights.on_whole_rows()


def _norm(state: Mapping[str, Any], trainer: Mapping[str, Any], folder: Path) -> str:
    """One of _NORMS: CROSSCODER where nothing says it, as the fork has it."""
    named = trainer.get("code_normalization")
    norm = "CROSSCODER" if named is None else text_of("code_normalization", folder, named)
    if "code_normalization_id" in state:
        number = whole_of("code_normalization_id", folder, state["code_normalization_id"])
        norm = _NORMS.get(number, str(number))
    known = ", ".join(_NORMS.values())
    refuse(norm not in _NORMS.values(), folder, f"code_normalization {norm}", known)
    return norm


def origin(names: str) -> Origin:
    """The hook points of a crosscoder of ours, by `submodule`; of others nothing is known."""
    ports = []
    for name in names.split(","):
        store, _, rest = name.rpartition("/")
        site, _, layer = rest.rpartition("_layer_")
        try:
            ports.append(Port.of(f"{store or 0}/{site}_{layer}"))
        except SettingError:
            return Origin()
    return Origin(several=Ports(tuple(ports), tuple(ports)))
