"""sparsify: cfg.json and sae.safetensors, TopK alone. delphi reads the same files.

A transcoder of sparsify (`transcode`) subtracts nothing from the row, and reads the input of the
module whose output it writes. cfg.json has two keys of ours, which sparsify drops: hook_name and
hook_name_out, for places that are no module's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from residual_saes.data.errors import StoreError
from residual_saes.data.site import ATTN_OUT, MLP_IN, MLP_OUT, RESID_POST, RESID_PRE, hook_name
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
    to_json,
    to_safetensors,
    topk,
    without_b_in,
)
from residual_saes.train.export.hooks import has_plain_mlp
from residual_saes.train.export.origin import Origin, of_hook
from residual_saes.train.ports import Ports
from residual_saes.train.sae import SAE
from residual_saes.train.tensors import any_text_of, any_whole_of, refuse, shown, whole_of

# In the order of our weights.
_TENSORS = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
# What would change the function otherwise. signed is of 2024; the last two are newer than 1.3.3.
# With multi_topk sparsify's forward decodes the 4k largest, and its encode keeps k.
_ONLY: dict[str, tuple[Any, ...]] = {
    "signed": (False,),
    "multi_topk": (False,),
    "embed_skip": (False,),
    "gram_lookup": (False,),
}
_HONOURED = {
    *("activation", "k", "d_in", "num_latents", "d_sae", "transcode", "skip_connection"),
    *("hook_name", "hook_name_out"),
}
# How it was trained, and the size where num_latents does not give it.
_HARMLESS = {
    *("expansion_factor", "normalize_decoder", "naive_decoder"),
    *("lookup_max_order", "gram_table_hash"),
}
# The folder that sparsify names after the module whose output an SAE is of; of a transcoder, after
# the module whose input and output they are. By what is read and what is written.
_MODULES = {
    (RESID_POST, RESID_POST): "",
    (MLP_OUT, MLP_OUT): ".mlp",
    (ATTN_OUT, ATTN_OUT): ".self_attn",
    (MLP_IN, MLP_OUT): ".mlp",
    (RESID_PRE, RESID_POST): "",
}


def write(sae: SAE, about: About) -> dict[str, bytes]:
    """See train.export.format.Format."""
    require_kind(about, ("sae", "transcoder"), "sparsify", "to=safetensors")
    if sae.threshold is not None:
        raise StoreError(
            "sparsify knows TopK alone, and this SAE has thresholds; to=saelens takes it"
        )
    transcode = sae.b_in is not None
    require_one_width(sae, "sparsify")
    sae = without_b_in(sae) if transcode else sae
    config = {
        "activation": "topk",
        "expansion_factor": max(1, round(sae.d_sae / sae.d_model)),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": transcode,
        "d_in": sae.d_model,
    }
    folder = folder_of(about.ports, about.architecture)
    if of_hook(folder).ports() != about.ports:
        config |= {"hook_name": hook_name(about.point), "hook_name_out": hook_name(about.target)}
    state = {
        "encoder.weight": sae.encoder,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.W_skip is not None:
        state["W_skip"] = sae.W_skip.T
    return {
        f"{folder}/cfg.json": to_json(config),
        f"{folder}/sae.safetensors": to_safetensors(**state),
    }


def folder_of(ports: Ports, architecture: str | None) -> str:
    """sparsify's name of the place, by which delphi finds it; ours where it is no module's."""
    read, written = ports.reads[0].point, ports.writes[0].point
    is_module = written.site == RESID_POST or has_plain_mlp(architecture)
    name = _MODULES.get((read.site, written.site)) if is_module else None
    return f"layers.{written.layer}{f'.{written.site}' if name is None else name}"


def read(folder: Path) -> SAE:
    """See train.export.format.Format."""
    folder = _hookpoint(folder)
    config = read_json(folder / "cfg.json")
    tensors = read_tensors(folder / "sae.safetensors")
    refuse_unknown(config, _HONOURED | _HARMLESS | _ONLY.keys(), folder, "cfg.json with")
    only(config, _ONLY, folder)
    activation = config.get("activation", "topk")
    refuse(activation != "topk", folder, f"activation {shown(activation)}", "topk")
    transcode = flag(config, "transcode", False, folder)
    skip = flag(config, "skip_connection", False, folder)
    refuse(skip and not transcode, folder, "skip_connection=true without transcode", "both")
    known = (*_TENSORS, "W_skip") if skip else _TENSORS
    refuse_unknown(tensors, known, folder, "the tensor")
    refuse(skip and "W_skip" not in tensors, folder, "skip_connection=true without W_skip", "both")
    weights = Weights.of(tensors, folder, _TENSORS, {"encoder.weight"}, transcoder=transcode)
    sae = topk(weights, whole_of("k", folder, config.get("k")), folder)
    whole_of("d_in", folder, config.get("d_in"), sae.d_model)
    for name in ("num_latents", "d_sae"):
        whole_of(name, folder, config.get(name) or None, sae.d_sae)  # 0 is none
    return golden.checked(sae, folder / "sae.safetensors")


def origin(folder: Path) -> Origin:
    """See train.export.format.Format.

    sparsify names a hook's folder after its module. A folder of another name says nothing. The
    run's config.json, beside the hooks' folders, has model and context.
    """
    folder = _hookpoint(folder).resolve()
    config = read_json(folder / "cfg.json")
    names = (config.get("hook_name"), config.get("hook_name_out"))
    hook, out = (any_text_of("hook_name", folder, name) for name in names)
    found = of_hook(hook or folder.name)
    if found.layer is None and found.hook != "embed_tokens":
        found = Origin()
    elif hook is not None and out != hook:
        found = found._replace(hook_out=out)
    elif hook is None and config.get("transcode"):
        found = found._replace(hook_out=found.hook)
        found = found._replace(site=MLP_IN) if found.site == "mlp" else found
    run = folder.parent / "config.json"
    config = read_json(run) if run.is_file() else {}
    if "sae" not in config:  # not sparsify's
        return found
    return found._replace(
        model=any_text_of("model", folder, config.get("model")),
        context=any_whole_of("ctx_len", folder, config.get("ctx_len")),
    )


def _hookpoint(folder: Path) -> Path:
    """The folder of the SAE's files: `folder`, or the only one in it that has some."""
    inside = sorted(path.parent for path in folder.glob("*/cfg.json"))
    if not inside or (folder / "cfg.json").exists():
        return folder
    which = ", ".join(hookpoint.name for hookpoint in inside)
    refuse(len(inside) > 1, folder, f"several hookpoints ({which})", "one of them")
    return inside[0]
