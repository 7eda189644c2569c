"""circuit-tracer: a set of transcoders, one a layer, in config.yaml and a file for each.

    W_enc (F, d), W_dec (F, d), b_enc (F,), b_dec (d,), and where there are such
    activation_function.threshold (F,), W_skip (d_out, d)

Nothing is subtracted from the row. Without a threshold its activation is ReLU, unless config.yaml
says `activation: topk` and k. Its TopK has no ReLU: k more latents of zeros alone take the places
of those below 0, so that it computes what ours does.

`activation` is read since commit 4b1b491 of April 2026 (not by 0.5.0), and not where a folder on
this disk is named instead of one on the Hub: there ReLU would be computed. So files of TopK have
another name than the one that is looked for there, and config.yaml lists them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from residual_saes.data.errors import StoreError
from residual_saes.data.foreign import yaml_object
from residual_saes.data.site import MLP_OUT, hook_name
from residual_saes.train.export import golden
from residual_saes.train.export.format import (
    About,
    Weights,
    read_tensors,
    refuse_unknown,
    require_kind,
    require_one_width,
    thresholded,
    to_safetensors,
    topk,
    without_b_in,
)
from residual_saes.train.export.origin import Origin, of_hook
from residual_saes.train.sae import SAE, WEIGHTS
from residual_saes.train.tensors import any_text_of, refuse, shown, text_of, vector_of, whole_of

CONFIG = "config.yaml"
_FILE = re.compile(r"(?:topk_)?layer_(?P<layer>\d+)\.safetensors")
_WAY_OUT = "restore or download it again"
_THRESHOLD = "activation_function.threshold"
_KEYS = {
    *("model_name", "model_kind", "feature_input_hook", "feature_output_hook", "scan"),
    *("activation", "k", "transcoders", "repo_id", "revision", "subfolder"),
}
# Families whose map of hooks in circuit-tracer has this name alone; it is the same place there.
_MLP_OUT = {"Qwen3ForCausalLM": "mlp.hook_out"}


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    return write_set([(sae, about)])


def write_set(members: Sequence[tuple[SAE, About]]) -> dict[str, bytes]:
    """The files of several transcoders, of a layer each, in the order of `members`.

    Raises:
        StoreError: one is no transcoder that writes mlp_out, or they differ in what a set shares.
    """
    for sae, about in members:
        require_kind(about, ("transcoder",), "circuit-tracer", "to=safetensors")
        require_one_width(sae, "circuit-tracer")
        if about.target.site != MLP_OUT:
            raise StoreError(
                f"circuit-tracer replaces MLPs, and this transcoder writes {about.target}; "
                "to=saelens or to=safetensors takes it"
            )
    _require_same(members)
    is_topk = members[0][0].threshold is None
    files = {}
    for sae, about in members:
        name = f"{'topk_' if is_topk else ''}layer_{about.layer}.safetensors"
        if name in files:
            raise StoreError(f"several of the runs are of {about.point}; give one run a layer")
        files[name] = to_safetensors(**_state(sae))
    config = yaml.safe_dump(_config(*members[0], files), sort_keys=False)
    return {**files, CONFIG: config.encode()}


def remarks(members: Sequence[tuple[SAE, About]]) -> list[str]:
    """What whoever opens the files has to know."""
    lines = []
    layers = sorted(about.layer for _, about in members)
    if layers != list(range(len(layers))):
        has = ", ".join(map(str, layers))
        lines.append(
            f"circuit-tracer opens sets of layers 0, 1, 2, ... without a gap, and this has {has}: "
            "export the runs of all layers at once, as run=[RUN,RUN,...]"
        )
    if members[0][0].threshold is None:
        lines.append(
            "circuit-tracer reads `activation: topk` since its commit 4b1b491, by its "
            "load_transcoders, with whole paths or hf:// addresses in config.yaml's transcoders; "
            "sae.activation=batchtopk makes transcoders that 0.5.0 opens too"
        )
    return lines


def _require_same(members: Sequence[tuple[SAE, About]]) -> None:
    """Raise StoreError if the members of a set differ in what circuit-tracer has once."""
    shared: dict[str, Any] = {}
    for sae, about in members:
        k = sae.k if sae.threshold is None else None
        facts = {
            "model": about.model,
            "sites": f"{about.point.site} to {about.target.site}",
            "d_sae": sae.d_sae,
            "k": k,
            "skip": sae.W_skip is not None,
        }
        for name, value in facts.items():
            if shared.setdefault(name, value) != value:
                raise StoreError(
                    f"circuit-tracer's sets have one {name}, and the runs have {shared[name]} and "
                    f"{value}; export them one by one"
                )


def _state(sae: SAE) -> dict[str, Tensor]:
    plain = without_b_in(sae)
    encoder, W_dec, b_enc = plain.encoder, plain.W_dec, plain.b_enc
    state: dict[str, Tensor] = {}
    if plain.threshold is None:
        zeros = encoder.new_zeros(sae.k, sae.d_model)
        encoder, W_dec = torch.cat([encoder, zeros]), torch.cat([W_dec, zeros])
        b_enc = torch.cat([b_enc, zeros[:, 0]])
    else:
        state[_THRESHOLD] = plain.threshold
    if plain.W_skip is not None:
        state["W_skip"] = plain.W_skip.T
    return {"W_enc": encoder, "W_dec": W_dec, "b_enc": b_enc, "b_dec": plain.b_dec, **state}


def _config(sae: SAE, about: About, files: Mapping[str, bytes]) -> dict[str, Any]:
    """circuit-tracer's config.yaml."""
    out = _MLP_OUT.get(about.architecture or "") or _hook(hook_name(about.target))
    config: dict[str, Any] = {
        "model_name": about.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": _hook(hook_name(about.point)),
        "feature_output_hook": out,
        "scan": about.model,
    }
    if sae.threshold is None:
        config |= {"activation": "topk", "k": sae.k}
        config["transcoders"] = sorted(files, key=_layer)
    return config


def _hook(name: str) -> str:
    """The name of a hook in its block."""
    return name.split(".", 2)[2]


def _layer(file: str) -> int:
    """The layer of a file, by its name; -1: the name has none."""
    found = _FILE.fullmatch(file)
    return int(found["layer"]) if found else -1


def read(folder: Path) -> SAE:
    """See train.export.format.Format: of a layer's file, or a folder that has one."""
    file = _file(folder)
    config = _read_config(file)
    tensors = read_tensors(file)
    refuse_unknown(config, _KEYS, file.parent, f"{CONFIG} with")
    refuse_unknown(tensors, {*WEIGHTS, "W_skip", _THRESHOLD}, file, "the tensor")
    weights = Weights.of(tensors, file, transposed={"W_enc"}, transcoder=True)
    activation = config.get("activation")
    known = activation in (None, "topk", "relu")
    refuse(not known, file, f"activation {shown(activation)}", "topk or relu")
    if activation == "topk":
        refuse(_THRESHOLD in tensors, file, f"topk with {_THRESHOLD}", "one of them")
        sae = _topk(weights, whole_of("k", file, config.get("k")), file)
    elif _THRESHOLD in tensors and activation is None:
        size = len(weights.b_enc)
        sae = thresholded(weights, vector_of(tensors, _THRESHOLD, size, file))
    else:
        refuse(_THRESHOLD in tensors, file, f"relu with {_THRESHOLD}", "one of them")
        sae = thresholded(weights, torch.zeros_like(weights.b_enc))
    return golden.checked(sae, file)


def _topk(weights: Weights, k: int, file: Path) -> SAE:
    """The SAE of a TopK without ReLU, which is ours if k latents of zeros are the last ones."""
    left = len(weights.b_enc) - k
    padding = (weights.W_enc[:, left:], weights.W_dec[left:], weights.b_enc[left:])
    is_padded = 1 <= k <= left and not any(bool(part.any()) for part in padding)
    got = "a topk that keeps values below 0"
    refuse(not is_padded, file, got, "one whose last k latents are zeros")
    rest = weights._replace(
        W_enc=weights.W_enc[:, :left], W_dec=weights.W_dec[:left], b_enc=weights.b_enc[:left]
    )
    return topk(rest, k, file)


def origin(folder: Path) -> Origin:
    """See train.export.format.Format."""
    file = _file(folder)
    config = _read_config(file)
    model = any_text_of("model_name", file, config.get("model_name"))
    hooks = [
        f"blocks.{_layer(file.name)}.{text_of(name, file, config[name])}"
        for name in ("feature_input_hook", "feature_output_hook")
        if name in config
    ]
    if len(hooks) < 2 or _layer(file.name) < 0:
        return Origin(model=model)
    return of_hook(hooks[0])._replace(model=model, hook_out=hooks[1])


def _read_config(file: Path) -> dict[str, Any]:
    """config.yaml beside a layer's file; empty where there is none."""
    path = file.with_name(CONFIG)
    if os.path.lexists(path):
        return yaml_object(path, _WAY_OUT)
    refuse(file.name.startswith("topk_"), file.parent, f"no {CONFIG}", f"{file.name} with it")
    return {}


def _file(folder: Path) -> Path:
    """The layer's file: `folder` itself, or the only one in it."""
    if not folder.is_dir():
        return folder
    inside = sorted(path for path in folder.iterdir() if _layer(path.name) >= 0)
    refuse(not inside, folder, "no layer_N.safetensors", "a layer's file, or the folder of one")
    which = ", ".join(path.name for path in inside)
    refuse(len(inside) > 1, folder, f"several layers ({which})", "one of them, as FOLDER/FILE")
    return inside[0]
