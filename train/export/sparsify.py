"""sparsify: cfg.json and sae.safetensors, TopK alone. delphi reads the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.export import golden
from train.export.format import (
    About,
    Weights,
    only,
    read_json,
    read_tensors,
    refuse_unknown,
    require_topk,
    to_json,
    to_safetensors,
    topk,
)
from train.export.origin import Origin, of_hook
from train.sae import SAE
from train.tensors import any_text_of, any_whole_of, refuse, shown, whole_of

# In the order of our weights.
_TENSORS = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
# What would change the function otherwise. signed is of 2024; the last two are newer than 1.3.3.
# With multi_topk sparsify's forward decodes the 4k largest, and its encode keeps k.
_ONLY: dict[str, tuple[Any, ...]] = {
    "signed": (False,),
    "multi_topk": (False,),
    "transcode": (False,),
    "skip_connection": (False,),
    "embed_skip": (False,),
    "gram_lookup": (False,),
}
_HONOURED = {"activation", "k", "d_in", "num_latents", "d_sae"}
# How it was trained, and the size where num_latents does not give it.
_HARMLESS = {
    *("expansion_factor", "normalize_decoder", "naive_decoder"),
    *("lookup_max_order", "gram_table_hash"),
}


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
    folder = _hookpoint(folder)
    config = read_json(folder / "cfg.json")
    tensors = read_tensors(folder / "sae.safetensors")
    refuse_unknown(config, _HONOURED | _HARMLESS | _ONLY.keys(), folder, "cfg.json with")
    only(config, _ONLY, folder)
    activation = config.get("activation", "topk")
    refuse(activation != "topk", folder, f"activation {shown(activation)}", "topk")
    refuse_unknown(tensors, _TENSORS, folder, "the tensor")
    weights = Weights.of(tensors, folder, _TENSORS, transposed={"encoder.weight"})
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
    found = of_hook(folder.name)
    if found.layer is None and found.hook != "embed_tokens":
        found = Origin()
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
