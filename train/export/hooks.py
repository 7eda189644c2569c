"""Where hook points are in transformers' modules, by nnsight's names: `model.layers.21.mlp.output`.

The families are those whose forward passes were read, and are tried in tests/train/test_hooks.py.
Of another one no module is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from residual_saes.data.site import (
    ATTN_OUT,
    MLP_IN,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    HookPoint,
)


class Family(NamedTuple):
    """How the decoders of a family are built."""

    layers: str  # the path to the decoder's list of layers
    sites: Mapping[str, str]  # by site the module in a layer, and its input or output


_EVERY = {RESID_PRE: "input", MLP_IN: "mlp.input", RESID_POST: "output"}
_PLAIN = {
    **_EVERY,
    ATTN_OUT: "self_attn.output",
    RESID_MID: "post_attention_layernorm.input",
    MLP_OUT: "mlp.output",
}
_POST_NORMS = {
    **_EVERY,
    ATTN_OUT: "post_attention_layernorm.output",
    RESID_MID: "pre_feedforward_layernorm.input",
    MLP_OUT: "post_feedforward_layernorm.output",
}
_FAMILIES = {
    r"Gemma[234](Text)?Model|Gemma[234]ForCausalLM": Family("model.layers", _POST_NORMS),
    r"Gemma[34]ForConditionalGeneration": Family("model.language_model.layers", _POST_NORMS),
    r"(Llama|Mistral|Gemma|Phi3|Qwen2|Qwen3|SmolLM3)ForCausalLM": Family("model.layers", _PLAIN),
    r"GPT2LMHeadModel": Family(
        "transformer.h",
        {**_PLAIN, ATTN_OUT: "attn.output", RESID_MID: "ln_2.input"},
    ),
    r"GPTNeoXForCausalLM": Family(
        "gpt_neox.layers",
        {**_EVERY, ATTN_OUT: "attention.output", MLP_OUT: "mlp.output"},
    ),
}


def family(architecture: str | None) -> Family | None:
    """The family of a class of transformers; None: not known."""
    for form, found in _FAMILIES.items():
        if re.fullmatch(form, architecture or ""):
            return found
    return None


def module(point: HookPoint, architecture: str | None) -> str | None:
    """nnsight's name of a hook point, as `model.layers.21.mlp.output`; None: not known."""
    found = family(architecture)
    if found is None or point.site not in found.sites:
        return None
    return f"{found.layers}.{point.layer}.{found.sites[point.site]}"


def has_plain_mlp(architecture: str | None) -> bool:
    """Whether what the MLP's module gives is what is added to the stream: there is no post-norm."""
    found = family(architecture)
    return found is not None and found.sites[MLP_OUT] == "mlp.output"
