"""dictionary_learning: config.json and ae.pt.

A class is known by its name in config.json and by its tensors. With u = x W_enc + b_enc, and
v = (x - b_dec) W_enc + b_enc:

    AutoEncoder              ReLU(v)
    AutoEncoderNew           ReLU(u)
    GatedAutoEncoder         v where its gate is open
    JumpReluAutoEncoder      u where it is above the latent's threshold and 0
    AutoEncoderTopK          the k largest of ReLU(v)
    BatchTopKSAE             v where it is above one threshold and 0; so is MatryoshkaBatchTopKSAE

AutoEncoderTopK and BatchTopKSAE have the same tensors, so without config.json they are refused.
Crosscoders are of the library's fork: train/export/crosscoder.py.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from residual_saes.train import torch_file
from residual_saes.train.export import crosscoder, golden
from residual_saes.train.export.crosscoder import submodule
from residual_saes.train.export.format import (
    About,
    Weights,
    only,
    read_json,
    refuse_unknown,
    require_kind,
    thresholded,
    to_json,
    topk,
    ungated,
)
from residual_saes.train.export.origin import Origin, of_hook
from residual_saes.train.sae import SAE
from residual_saes.train.tensors import (
    any_text_of,
    any_whole_of,
    dense_of,
    refuse,
    tensor_of,
    text_of,
    vector_of,
    whole_of,
)

_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec"}
_TOPK = _LINEAR | {"b_dec"}
# The tensors of each class.
_CLASSES = {
    "AutoEncoder": _LINEAR | {"bias"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias"},
    "GatedAutoEncoder": {
        *("encoder.weight", "decoder.weight", "decoder_bias"),
        *("gate_bias", "mag_bias", "r_mag"),
    },
    "JumpReluAutoEncoder": _MATRICES | {"threshold"},
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK | {"k", "threshold"},
    "MatryoshkaBatchTopKSAE": _MATRICES | {"k", "threshold", "group_sizes"},
    **crosscoder.CLASSES,
}
# b_dec's names where it has another one.
_B_DEC = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
}
# Tensors that versions of a class lack. AutoEncoderTopK's threshold is for use_threshold=True.
_OPTIONAL = {
    "AutoEncoderTopK": {"k", "threshold"},
    **dict.fromkeys(crosscoder.CLASSES, crosscoder.BUFFERS),
}

# What would change the function otherwise.
_IO = {"io": ("out",)}  # in: before the module; in_and_out: a transcoder
_TRAINER_HONOURED = {
    *("dict_class", "k", "activation_dim", "dict_size", "layer", "lm_name", "submodule_name"),
    *("num_layers", "code_normalization"),
}
# How it was trained. norm_factor is in the biases already when the file is written.
_TRAINER_HARMLESS = """
anneal_start auxk_alpha bandwidth decay_start device group_fractions group_sizes group_weights
l1_penalty lr n_sparsity_updates norm_factor p_end p_start resample_steps seed
sparsity_function sparsity_penalty sparsity_queue_length sparsity_warmup_steps steps target_l0
threshold_beta threshold_start_step top_k_aux trainer_class wandb_name warmup_steps
code_normalization_alpha_cc code_normalization_alpha_sae dict_class_kwargs k_annealing_steps
k_initial k_target target_rms use_mse_loss
"""
_BUFFER_HARMLESS = {
    *("d_submodule", "n_ctxs", "ctx_len", "refresh_batch_size", "out_batch_size", "device"),
    "layer",
}


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
    require_kind(about, ("sae", "crosscoder"), "dictionary_learning", "to=safetensors")
    if about.kind == "crosscoder":
        state, trainer = crosscoder.of(sae, about)
        return _files(trainer, state, about)
    kind = "AutoEncoderTopK" if sae.threshold is None else "JumpReluAutoEncoder"
    trainer = {
        "dict_class": kind,
        "trainer_class": "TopKTrainer" if sae.threshold is None else "JumpReluTrainer",
        "activation_dim": sae.d_model,
        "dict_size": sae.d_sae,
        "k": sae.k,
        "layer": about.layer,
        "lm_name": about.model,
        "submodule_name": submodule(about.ports.reads[0]),
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
    return _files(trainer, state, about)


def _files(
    trainer: Mapping[str, Any], state: Mapping[str, Tensor], about: About
) -> dict[str, bytes]:
    config = {"trainer": trainer, "buffer": {"ctx_len": about.context}}
    return {"config.json": to_json(config), "ae.pt": _pickled(state)}


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    state = _state(folder)
    trainer, _ = _config(folder)
    kind = _class(state, trainer, folder)
    if kind in crosscoder.CLASSES:
        sae = crosscoder.read(kind, state, trainer, folder)
    else:
        sae = _sae(kind, state, trainer, folder)
        whole_of("activation_dim", folder, trainer.get("activation_dim"), sae.d_model)
    whole_of("dict_size", folder, trainer.get("dict_size"), sae.d_sae)
    return golden.checked(sae, folder / "ae.pt")


def _state(folder: Path) -> dict[str, Any]:
    """The content of ae.pt."""
    path = folder / "ae.pt"
    state = torch_file.load(path, "restore or download it again")
    library = "dictionary_learning's"
    refuse(not isinstance(state, dict), folder, "an ae.pt that is no state dict", library)
    return {text_of("name", folder, name): value for name, value in state.items()}


def _config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json's trainer and buffer; empty where there is no such file.

    Raises:
        StoreError: it says what is not known, or what our SAE cannot compute.
    """
    if not (folder / "config.json").is_file():
        return {}, {}
    config = read_json(folder / "config.json")
    refuse_unknown(config, {"trainer", "buffer"}, folder, "config.json with")
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    is_whole = isinstance(trainer, dict) and isinstance(buffer, dict)
    refuse(not is_whole, folder, "a config.json without a trainer", "one with trainer.dict_class")
    trainer = cast("dict[str, Any]", trainer)
    refuse_unknown(
        trainer, {*_TRAINER_HONOURED, *_TRAINER_HARMLESS.split()}, folder, "trainer with"
    )
    refuse_unknown(buffer, _BUFFER_HARMLESS | _IO.keys(), folder, "buffer with")
    only(buffer, _IO, folder)
    return trainer, buffer


def _class(state: Mapping[str, Any], trainer: Mapping[str, Any], folder: Path) -> str:
    """One of _CLASSES: the one that config.json names, else the only one with such tensors."""
    named = trainer.get("dict_class")
    if named is None:
        fitting = [kind for kind in _CLASSES if _has_tensors_of(kind, state)]
        refuse(not fitting, folder, f"the tensors {', '.join(sorted(state))}", ", ".join(_CLASSES))
        refuse(
            len(fitting) > 1,
            folder,
            f"the tensors of {' and of '.join(fitting)}, and no config.json that says which",
            'one with a config.json {"trainer": {"dict_class": ...}} beside ae.pt',
        )
        return fitting[0]
    named = text_of("dict_class", folder, named)
    refuse(named not in _CLASSES, folder, f"dict_class {named}", ", ".join(_CLASSES))
    known = _CLASSES[named] | _OPTIONAL.get(named, set())
    refuse_unknown(state, known, folder, f"dict_class {named} with the tensor")
    missing = ", ".join(sorted(_CLASSES[named] - state.keys()))
    refuse(bool(missing), folder, f"dict_class {named} without the tensor {missing}", "a whole one")
    return named


def _has_tensors_of(kind: str, state: Mapping[str, Any]) -> bool:
    of_layers = getattr(state.get("encoder.weight"), "ndim", 2) == 3
    known = _CLASSES[kind] | _OPTIONAL.get(kind, set())
    return of_layers == (kind in crosscoder.CLASSES) and _CLASSES[kind] <= state.keys() <= known


def _sae(kind: str, state: Mapping[str, Any], trainer: Mapping[str, Any], folder: Path) -> SAE:
    """The SAE of a class, by the formulas above."""
    weights = _weights(kind, state, folder)
    zero, size = torch.zeros_like(weights.b_enc), len(weights.b_enc)
    if kind == "AutoEncoder":
        return thresholded(weights, zero)
    if kind == "AutoEncoderNew":
        return thresholded(weights.on_whole_rows(), zero)
    if kind == "GatedAutoEncoder":
        b_gate, r_mag = (vector_of(state, name, size, folder) for name in ("gate_bias", "r_mag"))
        return thresholded(*ungated(weights, b_gate, r_mag))
    if kind == "JumpReluAutoEncoder":
        threshold = vector_of(state, "threshold", size, folder)
        return thresholded(weights.on_whole_rows(), threshold)
    k = whole_of("k", folder, state.get("k"), trainer.get("k"))
    if "threshold" in state:
        threshold = tensor_of(state, "threshold", folder)
        refuse(threshold.numel() != 1, folder, f"threshold {tuple(threshold.shape)}", "one number")
    if kind == "AutoEncoderTopK":  # whose threshold is for encode(use_threshold=True) alone
        return topk(weights, k, folder)
    if kind == "MatryoshkaBatchTopKSAE":
        groups = dense_of(state, "group_sizes", folder).flatten()
        fits = len(groups) <= size and bool((groups > 0).all()) and float(groups.sum()) == size
        refuse(not fits, folder, "other group_sizes", f"some that make {size} latents")
    return thresholded(weights, zero + threshold)


def _weights(kind: str, state: Mapping[str, Any], folder: Path) -> Weights:
    """The tensors that every class has, under the names of this one."""
    if "W_enc" in _CLASSES[kind]:
        return Weights.of(state, folder)
    b_enc = "mag_bias" if kind == "GatedAutoEncoder" else "encoder.bias"
    matrices = ("encoder.weight", "decoder.weight")
    return Weights.of(state, folder, (*matrices, b_enc, _B_DEC.get(kind, "b_dec")), matrices)


def origin(folder: Path) -> Origin:
    """See train.export.format.Format."""
    trainer, buffer = _config(folder)
    hook = any_text_of("submodule_name", folder, trainer.get("submodule_name"))
    found = crosscoder.origin(hook) if hook and "," in hook else of_hook(hook) if hook else Origin()
    if found.several is not None:
        trainer["layer"] = None  # the first one's
    return found._replace(
        layer=any_whole_of("layer", folder, trainer.get("layer"), found.layer),
        model=any_text_of("lm_name", folder, trainer.get("lm_name")),
        context=any_whole_of("ctx_len", folder, buffer.get("ctx_len")),
    )
