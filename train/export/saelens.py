"""SAELens: cfg.json and sae_weights.safetensors, as its versions 1 to 6 write them.

Its architectures topk, jumprelu, gated (which is jumprelu with other weights) and standard: ReLU
(jumprelu with thresholds of 0), or topk by the name of its activation, as before version 6.
Its transcoders are ReLU and JumpReLU, with and without a skip; they subtract nothing from the row.
It has none of TopK, but its topk without `apply_b_dec_to_input` computes one that has no skip.
metadata.hook_name_out says what is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residual_saes.data.errors import StoreError
from residual_saes.data.site import HookPoint, hook_name
from residual_saes.train.export import golden
from residual_saes.train.export.format import (
    About,
    Weights,
    flag,
    only,
    read_json,
    read_tensors,
    refuse_unknown,
    require_kind,
    require_one_width,
    thresholded,
    to_json,
    to_safetensors,
    topk,
    ungated,
    without_b_in,
)
from residual_saes.train.export.hooks import module
from residual_saes.train.export.origin import Origin, of_hook
from residual_saes.train.sae import SAE
from residual_saes.train.tensors import (
    agree_on,
    any_text_of,
    any_whole_of,
    refuse,
    shown,
    text_of,
    vector_of,
    whole_of,
)

# SAELens before this version takes files that do not name theirs for another layout.
_LAYOUT = "6.0.0"

# Tensors of an architecture beside W_enc, W_dec, b_dec; log_threshold is a training file's.
_TENSORS = {
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold", "log_threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
    "transcoder": {"b_enc"},
    "skip_transcoder": {"b_enc", "W_skip"},
    "jumprelu_transcoder": {"b_enc", "threshold"},
    "jumprelu_skip_transcoder": {"b_enc", "threshold", "W_skip"},
}
_SCALES = ("scaling_factor", "finetuning_scaling_factor")  # one tensor's names, over the versions

# What would change the function otherwise: null, false or none, where a file has it at all.
_ONLY: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),
    "hook_point_head_index": (None,),
    "hook_head_index_out": (None,),
}
# Of model_from_pretrained_kwargs: how TransformerLens or transformers load a model without changing
# the rows between its layers. (center_writing_weights takes the mean out of them.)
_SAME_ROWS = {
    *("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
    *("dtype", "torch_dtype", "device", "device_map", "n_devices", "n_ctx", "first_n_layers"),
    *("attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "move_to_device"),
    *("default_padding_side", "default_prepend_bos"),
}
# What `read` looks at.
_HONOURED = {
    *("architecture", "k", "d_in", "d_sae", "activation_fn", "activation_fn_str"),
    *("activation_fn_kwargs", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm"),
    *("finetuning_scaling_factor", "metadata", "d_out", "hook_name_out", "hook_layer_out"),
}
# How it was trained and on what, over SAELens' versions: no part of the function.
_HARMLESS = """
act_store_device adam_beta1 adam_beta2 autocast autocast_lm aux_loss_coefficient
b_dec_init_method cached_activations_path checkpoint_path compile_llm compile_sae context_size
dataset_path dataset_trust_remote_code dead_feature_threshold dead_feature_window
decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init
device dtype eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens
expansion_factor feature_sampling_window finetuning_method finetuning_tokens
from_pretrained_path hf_hook_name hf_hook_name_out hook_eval hook_layer hook_name hook_point
hook_point_eval hook_point_layer init_encoder_as_decoder_transpose is_dataset_tokenized
jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input
jumprelu_tanh_scale
l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode
log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb lp_norm lr
lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps model_class_name
model_from_pretrained_kwargs model_kwargs model_name mse_loss_normalization
n_batches_in_buffer n_checkpoints n_eval_batches n_eval_seqs n_restart_cycles neuronpedia_id
noise_scale normalize_sae_decoder pre_act_loss_coefficient prepend_bos resume run_name
sae_compilation_mode sae_lens_training_version sae_lens_version
scale_sparsity_penalty_by_decoder_norm seed seqpos_slice store_batch_size
store_batch_size_prompts streaming target_l0 tokens_per_buffer train_batch_size
train_batch_size_tokens training_tokens use_cached_activations use_ghost_grads
use_sparse_activations verbose wandb_entity wandb_id wandb_log_frequency wandb_project
"""


def config_of(sae: SAE, about: About) -> dict[str, Any]:
    """SAELens' cfg.json."""
    transcoder = sae.b_in is not None
    kind = "topk" if sae.threshold is None else "jumprelu"
    if transcoder and sae.threshold is not None:
        kind += "_transcoder" if sae.W_skip is None else "_skip_transcoder"
    return {
        "architecture": kind,
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.threshold is None else {}),
        "d_in": sae.d_model,
        **({"d_out": sae.d_out} if kind.endswith("transcoder") else {}),
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _LAYOUT,
            "model_name": about.model,
            **_hooks(about),
            "context_size": about.context,
            "dataset_path": about.text,
            "prepend_bos": True,
        },
    }


def _hooks(about: About) -> dict[str, str]:
    """The names of what is read, and of what a transcoder writes."""
    named = {"hook_name": hook_name(about.point), "hf_hook_name": _module(about, about.point)}
    if about.kind == "transcoder":
        named["hook_name_out"] = hook_name(about.target)
        named["hf_hook_name_out"] = _module(about, about.target)
    return {key: name for key, name in named.items() if name}


def _module(about: About, point: HookPoint) -> str | None:
    return module(point, about.architecture)


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    require_kind(about, ("sae", "transcoder"), "SAELens", "to=safetensors")
    tensors = sae.tensors()
    if about.kind == "transcoder":
        if sae.threshold is None and sae.W_skip is not None:
            raise StoreError(
                "SAELens has no TopK transcoder with a skip; to=circuit_tracer, to=sparsify and "
                "to=safetensors take it"
            )
        if sae.threshold is None:
            require_one_width(sae, "SAELens' topk")
        tensors = without_b_in(sae).tensors()
        del tensors["b_in"]
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    return {
        "cfg.json": to_json(config_of(sae, about)),
        "sae_weights.safetensors": to_safetensors(**tensors),
    }


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    config = read_json(folder / "cfg.json")
    weights = folder / "sae_weights.safetensors"
    tensors = read_tensors(weights)
    kind = _kind(config, folder)
    transcoder = _is_transcoder(kind, config, folder)
    refuse_unknown(config, {*_HONOURED, *_HARMLESS.split(), *_ONLY}, folder, "cfg.json with")
    scale = _row_scale(config, folder)
    if scale is not None:
        config["normalize_activations"] = None  # it is folded below
    only(config, _ONLY, folder)
    only(_metadata(config, folder), _ONLY, folder)
    known = {"W_enc", "W_dec", "b_dec", *_SCALES, *_TENSORS[kind]}
    refuse_unknown(tensors, known, folder, f"architecture {kind} with the tensor")
    sae = _sae(kind, config, tensors, transcoder, folder)
    for name, size in (("d_in", sae.d_model), ("d_sae", sae.d_sae)):
        whole_of(name, folder, config.get(name), size)
    any_whole_of("d_out", folder, config.get("d_out"), sae.d_out)
    got = "a transcoder with activation_scaler.json"
    refuse(transcoder and scale is not None, folder, got, "one whose scale is in the weights")
    return golden.checked(sae if scale is None else sae.folded(scale), weights)


def _is_transcoder(kind: str, config: Mapping[str, Any], folder: Path) -> bool:
    """Whether it writes another hook than it reads, by its architecture or its hooks."""
    metadata = _metadata(config, folder)
    out = metadata.get("hook_name_out") or None
    is_named = kind.endswith("transcoder")
    if not is_named and out in (None, metadata.get("hook_name")):
        return False
    known = {"apply_b_dec_to_input": not is_named, **config}
    honest = {"apply_b_dec_to_input": (False,), "finetuning_scaling_factor": (None, False)}
    only(known, honest, folder)
    return True


def _sae(
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    transcoder: bool,
    folder: Path,
) -> SAE:
    """The SAE of an architecture."""
    b_enc = "b_mag" if kind == "gated" else "b_enc"
    names = ("W_enc", "W_dec", b_enc, "b_dec")
    weights = Weights.of(tensors, folder, names, transcoder=transcoder)
    has_skip = weights.W_skip is not None
    refuse(has_skip != ("skip" in kind), folder, f"architecture {kind} and no W_skip", "both")
    weights, threshold = _thresholds(kind, tensors, weights, folder)
    scale = _scale(config, tensors, len(weights.b_enc), folder)
    if scale is not None:  # the decoder's alone: TopK keeps what it keeps
        weights = weights._replace(W_dec=weights.W_dec * scale[:, None])
    if not transcoder and not flag(config, "apply_b_dec_to_input", True, folder):
        weights = weights.on_whole_rows()
    if threshold is None:
        by_norm = flag(config, "rescale_acts_by_decoder_norm", False, folder)
        k = whole_of("k", folder, config.get("k"), _arguments(config, folder).get("k"))
        return topk(weights, k, folder, by_norm=by_norm)
    only(config, {"rescale_acts_by_decoder_norm": (False, None)}, folder)
    return thresholded(weights, threshold)


def _row_scale(config: Mapping[str, Any], folder: Path) -> float | None:
    """What rows are multiplied by before the SAE: a checkpoint's activation_scaler.json has it.

    In an SAE that was trained to its end it is in the weights.
    """
    path = folder / "activation_scaler.json"
    if not path.is_file():
        return None
    scaler = read_json(path)
    refuse_unknown(scaler, {"scaling_factor", "has_whitening"}, folder, f"{path.name} with")
    only(scaler, {"has_whitening": (False,)}, folder)
    scale, kind = scaler.get("scaling_factor"), config.get("normalize_activations")
    if scale is None:
        return None
    got = f"scaling_factor={shown(scale)} with normalize_activations={shown(kind)}"
    is_number = isinstance(scale, float | int) and not isinstance(scale, bool)
    fits = is_number and 0 < scale < math.inf and kind == "expected_average_only_in"
    refuse(not fits, folder, got, "a positive one with expected_average_only_in")
    return float(scale)


def _thresholds(
    kind: str, tensors: Mapping[str, Tensor], weights: Weights, folder: Path
) -> tuple[Weights, Tensor | None]:
    """The weights and the thresholds of an architecture; None: TopK."""
    if kind == "topk":
        return weights, None
    size = len(weights.b_enc)
    if kind == "gated":
        b_gate, r_mag = (vector_of(tensors, name, size, folder) for name in ("b_gate", "r_mag"))
        return ungated(weights, b_gate, r_mag)
    if kind in ("standard", "transcoder", "skip_transcoder"):
        return weights, torch.zeros_like(weights.b_enc)
    if "log_threshold" in tensors:
        refuse("threshold" in tensors, folder, "threshold and log_threshold", "one of them")
        return weights, vector_of(tensors, "log_threshold", size, folder).exp()
    return weights, vector_of(tensors, "threshold", size, folder)


def _kind(config: Mapping[str, Any], folder: Path) -> str:
    """One of _TENSORS: the architecture, or topk where the activation says so."""
    # Version 3 had one, and did not name it.
    kind = text_of("architecture", folder, config.get("architecture", "standard"))
    known = ", ".join(_TENSORS)
    refuse(kind not in _TENSORS, folder, f"architecture {kind}", known)
    names = (config.get("activation_fn_str"), config.get("activation_fn"))
    activation = agree_on("activation_fn", folder, *names)
    if activation == "topk" and kind == "standard":
        kind = "topk"
    allowed = "topk" if kind == "topk" else "relu"
    refuse(
        activation not in (None, allowed),
        folder,
        f"activation {shown(activation)} in architecture {kind}",
        allowed,
    )
    arguments = {"k", "signed"} if kind == "topk" else set()
    given = _arguments(config, folder)
    refuse_unknown(given, arguments, folder, "activation_fn_kwargs with")
    only(given, {"signed": (False, None)}, folder)
    return kind


def _arguments(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The activation's arguments."""
    arguments = config.get("activation_fn_kwargs") or {}
    refuse(not isinstance(arguments, dict), folder, "activation_fn_kwargs", "a JSON object")
    return dict(arguments)


def _scale(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], size: int, folder: Path
) -> Tensor | None:
    """(F,) factors of the activations in the decoder, from finetuning.

    Versions 1 and 2 wrote them always, and applied them. Since then cfg.json says whether they
    count.
    """
    present = [name for name in _SCALES if name in tensors]
    refuse(len(present) > 1, folder, " and ".join(present), "one of them")
    says = config.get("finetuning_scaling_factor")
    refuse(says not in (None, True, False), folder, "another finetuning_scaling_factor", "a flag")
    if not present:
        refuse(bool(says), folder, "finetuning_scaling_factor=true and no such tensor", "both")
        return None
    scale = vector_of(tensors, present[0], size, folder)
    if says is not False:
        return scale
    is_one = torch.allclose(scale, torch.ones_like(scale))
    got = f"a {present[0]} that is not 1, and finetuning_scaling_factor=false"
    refuse(not is_one, folder, got, "one with true")
    return None


def _metadata(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Where the SAE is from: in cfg.json's metadata; before version 6, in cfg.json itself."""
    metadata = config.get("metadata", {})
    refuse(not isinstance(metadata, dict), folder, "metadata in cfg.json", "a JSON object")
    return {**config, **metadata}


def origin(folder: Path) -> Origin:
    """See train.export.format.Format."""
    metadata = _metadata(read_json(folder / "cfg.json"), folder)
    hook = metadata.get("hook_name", metadata.get("hook_point"))
    layer = metadata.get("hook_layer", metadata.get("hook_point_layer"))
    out = any_text_of("hook_name_out", folder, metadata.get("hook_name_out") or None)
    found = Origin()
    if hook is not None:
        hook = text_of("hook_name", folder, hook)
        found = of_hook(hook.replace("{layer}", shown(layer)))
        found = found._replace(hook_out=None if out == hook else out)
    return found._replace(
        layer=any_whole_of("hook_layer", folder, layer, found.layer),
        model=_model(metadata, folder),
        context=any_whole_of("context_size", folder, metadata.get("context_size")),
    )


def _model(metadata: Mapping[str, Any], folder: Path) -> str | None:
    """The model's name, with what was done to it beside loading it."""
    options = metadata.get("model_from_pretrained_kwargs") or {}
    refuse(not isinstance(options, dict), folder, "model_from_pretrained_kwargs", "a JSON object")
    changed = []
    for name, value in options.items():
        if name not in _SAME_ROWS and value not in (None, False):
            changed.append(f"{shown(name)}={shown(value)}")
    named = any_text_of("model_name", folder, metadata.get("model_name"))
    if named is None and not changed:
        return None
    return ", ".join(["a model" if named is None else named, *changed])
