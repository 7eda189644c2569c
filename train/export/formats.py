"""Trained SAEs in the files of SAELens, sparsify and dictionary_learning, and theirs as ours.

What our SAE computes is in train/sae.py. The others' differ in small things, which are folded into
the weights where that is exact, and refused where it is not:

    SAELens              cfg.json, sae_weights.safetensors  topk; jumprelu and standard have a threshold per latent
    sparsify             cfg.json, sae.safetensors          TopK alone; delphi reads the same files
    dictionary_learning  config.json, ae.pt                 AutoEncoderTopK; JumpReluAutoEncoder leaves b_dec in the row
    safetensors          config.json, sae.safetensors       our own tensors by our own names
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.errors import StoreError
from data.site import RESID_POST, hook_name
from train.sae import SAE

# SAELens before this version had another layout, by which it would take files that do not name
# theirs.
_SAELENS_LAYOUT = "6.0.0"


class About(NamedTuple):
    """What an SAE was trained on, for those who use it."""

    model: str  # hub id or folder name
    layer: int  # of the model, from 0: the SAE is of its output, resid_post
    context: int  # tokens
    text: str


def about(run: Path, config: Mapping[str, Any]) -> About:
    """What config.yaml of a run says of it.

    Raises:
        StoreError: it is of a version that did not write that down.
    """
    source = config.get("source")
    if source is None:
        raise StoreError(
            f"{run} does not say what it was trained on: it is of an earlier version; train it again"
        )
    return About(source["model"], config["settings"]["layer"], source["context"], source["text"])


class Format(NamedTuple):
    """A peer's files."""

    write: Callable[[SAE, About], dict[str, bytes]]  # contents by path below the export's folder
    read: Callable[[Path], SAE]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _tensors(**named: Tensor) -> bytes:
    return save(
        {name: tensor.detach().cpu().float().contiguous() for name, tensor in named.items()}
    )


def _pickled(state: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, buffer)
    return buffer.getvalue()


# -- SAELens ---------------------------------------------------------------------------------------


def saelens_config(sae: SAE, about: About) -> dict[str, Any]:
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
            "sae_lens_version": _SAELENS_LAYOUT,
            "model_name": about.model,
            "hook_name": hook_name(about.layer),
            "hf_hook_name": f"model.layers.{about.layer}.output",
            "context_size": about.context,
            "dataset_path": about.text,
            "prepend_bos": True,
        },
    }


def _to_saelens(sae: SAE, about: About) -> dict[str, bytes]:
    return {
        "cfg.json": _json(saelens_config(sae, about)),
        "sae_weights.safetensors": _tensors(**sae.tensors()),
    }


def _from_saelens(folder: Path) -> SAE:
    config, tensors = (
        _read_json(folder / "cfg.json"),
        _read_tensors(folder / "sae_weights.safetensors"),
    )
    kind = _required(config, "architecture", folder)
    _refuse(
        kind not in ("topk", "jumprelu", "standard"),
        folder,
        f"architecture {kind}",
        "topk, jumprelu or standard",
    )
    for name in ("normalize_activations", "reshape_activations"):
        asked = config.get(name, "none")
        _refuse(asked not in ("none", None), folder, f"{name}={asked}", "none")
    W_enc, W_dec, b_enc, b_dec = (
        _tensor(tensors, name, folder) for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + b_dec @ W_enc
    if kind == "topk":
        if config.get("rescale_acts_by_decoder_norm", False):
            return _unit_decoder(
                SAE.of(W_enc, W_dec, b_enc, b_dec, int(_required(config, "k", folder)))
            )
        return SAE.of(W_enc, W_dec, b_enc, b_dec, int(_required(config, "k", folder)))
    threshold = (
        _tensor(tensors, "threshold", folder) if kind == "jumprelu" else torch.zeros_like(b_enc)
    )
    return _thresholded(W_enc, W_dec, b_enc, b_dec, threshold)


# -- sparsify --------------------------------------------------------------------------------------


def _to_sparsify(sae: SAE, about: About) -> dict[str, bytes]:
    _require_topk(sae, "sparsify")
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
    return {f"{folder}/cfg.json": _json(config), f"{folder}/sae.safetensors": _tensors(**state)}


def _from_sparsify(folder: Path) -> SAE:
    inside = sorted(path.parent for path in folder.glob("*/cfg.json"))
    if inside and not (folder / "cfg.json").exists():
        which = ", ".join(one.name for one in inside)
        _refuse(len(inside) > 1, folder, f"several hookpoints ({which})", "one of them")
        (folder,) = inside
    config, tensors = _read_json(folder / "cfg.json"), _read_tensors(folder / "sae.safetensors")
    kind = config.get("activation", "topk")
    _refuse(kind != "topk", folder, f"activation {kind}", "topk")
    for name in ("transcode", "skip_connection"):
        _refuse(bool(config.get(name)), folder, f"{name}=true", "an autoencoder of one layer")
    weight = _tensor(tensors, "encoder.weight", folder)
    W_dec, b_enc, b_dec = (
        _tensor(tensors, name, folder) for name in ("W_dec", "encoder.bias", "b_dec")
    )
    return SAE.of(weight.T.contiguous(), W_dec, b_enc, b_dec, int(_required(config, "k", folder)))


# -- dictionary_learning ---------------------------------------------------------------------------


def _to_dictionary_learning(sae: SAE, about: About) -> dict[str, bytes]:
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
    return {"config.json": _json({"trainer": trainer, "buffer": buffer}), "ae.pt": _pickled(state)}


def _from_dictionary_learning(folder: Path) -> SAE:
    path = folder / "ae.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        raise StoreError(f"{path} cannot be read as an SAE ({type(error).__name__})") from error
    _refuse(
        not isinstance(state, dict),
        folder,
        "an ae.pt that is no state dict",
        "dictionary_learning's",
    )
    if "encoder.weight" in state:
        _refuse(
            "k" not in state,
            folder,
            "an autoencoder with an encoder but no k",
            "AutoEncoderTopK or BatchTopKSAE",
        )
        W_enc, W_dec = (
            _tensor(state, f"{name}.weight", folder).T.contiguous()
            for name in ("encoder", "decoder")
        )
        b_enc, b_dec = (_tensor(state, name, folder) for name in ("encoder.bias", "b_dec"))
        threshold = float(state.get("threshold", -1.0))
        config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if "BatchTopK" in str(config.get("trainer", {}).get("dict_class", "")) and threshold >= 0:
            return _thresholded(W_enc, W_dec, b_enc, b_dec, torch.full_like(b_enc, threshold))
        return SAE.of(W_enc, W_dec, b_enc, b_dec, int(state["k"]))
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    W_enc, W_dec, b_enc, b_dec, thresholds = (_tensor(state, name, folder) for name in names)
    return _thresholded(W_enc, W_dec, b_enc + b_dec @ W_enc, b_dec, thresholds)


# -- ours ------------------------------------------------------------------------------------------


def _to_safetensors(sae: SAE, about: About) -> dict[str, bytes]:
    config = {
        "k": sae.k,
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "site": RESID_POST,
        **about._asdict(),
    }
    return {"config.json": _json(config), "sae.safetensors": _tensors(**sae.tensors())}


def _from_safetensors(folder: Path) -> SAE:
    config, tensors = _read_json(folder / "config.json"), _read_tensors(folder / "sae.safetensors")
    W_enc, W_dec, b_enc, b_dec = (
        _tensor(tensors, name, folder) for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    return SAE.of(
        W_enc, W_dec, b_enc, b_dec, int(_required(config, "k", folder)), tensors.get("threshold")
    )


FORMATS = {
    "saelens": Format(_to_saelens, _from_saelens),
    "sparsify": Format(_to_sparsify, _from_sparsify),
    "dictionary_learning": Format(_to_dictionary_learning, _from_dictionary_learning),
    "safetensors": Format(_to_safetensors, _from_safetensors),
}


# -- what they share -------------------------------------------------------------------------------


def _require_topk(sae: SAE, name: str) -> None:
    if sae.threshold is not None:
        raise StoreError(
            f"{name} knows TopK alone, and this SAE has thresholds; to=saelens takes it"
        )


def _unit_decoder(sae: SAE) -> SAE:
    """The same function with decoder rows of norm 1: activations take the norms, and are kept by
    those products.
    """
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    threshold = None if sae.threshold is None else sae.threshold * norms
    return SAE.of(
        sae.W_enc * norms,
        sae.W_dec / norms[:, None],
        sae.b_enc * norms,
        sae.b_dec,
        sae.k,
        threshold,
    )


def _thresholded(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor
) -> SAE:
    """An SAE whose k is no part of its function: latents above a threshold, which is no less than
    ReLU's 0.
    """
    return _unit_decoder(SAE.of(W_enc, W_dec, b_enc, b_dec, len(b_enc), threshold.clamp_min(0)))


def _refuse(condition: bool, folder: Path, got: str, allowed: str) -> None:
    if condition:
        raise StoreError(f"{folder} has {got}; what can be taken is {allowed}")


def _required(config: Mapping[str, Any], name: str, folder: Path) -> Any:
    _refuse(name not in config, folder, f"no {name} in its configuration", "a whole one")
    return config[name]


def _tensor(found: Mapping[str, Any], name: str, folder: Path) -> Tensor:
    _refuse(
        not isinstance(found.get(name), Tensor), folder, f"no tensor {name}", "an SAE that has it"
    )
    tensor: Tensor = found[name]
    return tensor.float()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {type(error).__name__}") from error
    _refuse(not isinstance(found, dict), path.parent, f"a {path.name} that is no object", "one")
    return dict(found)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read as safetensors: {type(error).__name__}") from error
