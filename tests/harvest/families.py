"""Every causal family of transformers: a tiny random model of it, and whether it can be harvested.

`python -m tests.harvest.families` writes docs/families.md, which `make test-long`
compares, and `make test` a part of it.
"""

from __future__ import annotations

import inspect
import tempfile
import textwrap
import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from residual_saes.data.errors import SettingError
from residual_saes.data.site import SITES, HookPoint
from residual_saes.harvest.anatomy import Anatomy
from residual_saes.harvest.decoder import find_blocks, meta_decoder
from residual_saes.harvest.forward import batch_residuals
from residual_saes.harvest.isolation import forward_inputs
from residual_saes.harvest.model import ModelConfig, load
from residual_saes.harvest.model_folder import read_config
from residual_saes.harvest.proof import prove
from residual_saes.harvest.selfcheck import choose_isolation, worst
from residual_saes.harvest.site import tap
from tests.harvest.models import VOCABULARY, Bare, enlarge_, save_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CONTEXT = 40
LAYERS = [0, 2]  # of four
# One rounding of a stored value is 2^-8; in float32 the rows of every family are far closer.
ALLOWED = 1e-4

# Sizes by the names that configurations give them.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "intermediate_size": 64,
    "n_inner": 64,
    "d_ff": 64,
    "ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "decoder_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Compressed keys and values.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # Linear attention and state spaces.
    "state_size": 8,
    "chunk_size": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
}
_AS_MANY_KEYS = {"num_key_value_heads": 4}  # as query heads: compressed ones are all different
_HALF_FULL = ["sliding_attention", "full_attention"] * 2
# What else a family's sizes must obey.
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _AS_MANY_KEYS,
    "axk2": {**_AS_MANY_KEYS, "gated_norm_rank": 1},
    "bailing_hybrid": _AS_MANY_KEYS,
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": _HALF_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(_HALF_FULL)
        },
    },
    "dbrx": {
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _AS_MANY_KEYS,
    "deepseek_v3": _AS_MANY_KEYS,
    "deepseek_v32": _AS_MANY_KEYS,
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": _HALF_FULL,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
    },
    "glm4_moe_lite": _AS_MANY_KEYS,
    "glm_moe_dsa": _AS_MANY_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "helium": {"head_dim": 8},
    "hy_v4": _AS_MANY_KEYS,
    "kimi_linear": _AS_MANY_KEYS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {**_AS_MANY_KEYS, "head_dim": 8},
    "mamba2": {"n_groups": 1, "head_dim": 16},
    "minicpm3": _AS_MANY_KEYS,
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local"] * 4,
        "local_attn_chunk_length": 8,
        "is_decoder": True,
        "attention_head_size": 8,
        "feed_forward_size": 64,
    },
    "youtu": _AS_MANY_KEYS,
    "zamba": {**_AS_MANY_KEYS, "attn_layer_period": 1, "attn_layer_offset": 0},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# No tiny configuration builds these; each with the reason.
UNTRIED = {
    "blt": "its four models have sizes of their own",
    "dots3_note_text": "a part of its attention cannot be made small",
    "gemma4_assistant": "it reads another model's states",
    "git": "its vision tower cannot be made small",
    "phi4_multimodal": "its vision and audio towers cannot be made small",
    "qwen4_exp_text": "its tables of n-grams cannot be made small",
}


class Verdict(NamedTuple):
    """What became of a family."""

    family: str  # model_type of its text decoder
    way: str | None  # the isolation; None: refused
    reason: str  # of a refusal
    error: float  # largest error of a row relative to its norm, against the whole model
    sites: str = ""  # that its layers have, and why no others


@cache
def families() -> dict[str, list[str]]:
    """The text decoders of all causal families, each with the model types that hold it.

    It takes three seconds.
    """
    found: dict[str, list[str]] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            text = CONFIG_MAPPING[kind]().get_text_config().model_type
        except Exception:  # defaults that contradict each other: its own name then
            text = kind
        holders = found.setdefault(text if text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else kind, [])
        holders.append(kind)
    return found


def tiny_config(family: str) -> Any:
    """A configuration of four small layers."""
    kind = CONFIG_MAPPING[family]
    names = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    names |= {*inspect.signature(kind.__init__).parameters, *getattr(kind, "attribute_map", {})}
    names |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    sizes = {name: value for name, value in _SMALL.items() if name in names}
    return kind(**{**sizes, **_OWN.get(family, {})})


def save_family(folder: Path, family: str) -> Path:
    """A random model with weights large enough that attention matters, and its tokenizer."""
    build_family(folder, family)
    return folder


def build_family(folder: Path, family: str) -> Any:
    """The model that `save_family` writes."""
    torch.manual_seed(0)
    tiny_config(family).save_pretrained(folder)
    config = read_config(folder).get_text_config()
    meta = meta_decoder(config)
    assert sum(weight.numel() for weight in meta.parameters()) < 2e7, "not a tiny model"
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    enlarge_(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def tried(family: str, root: Path) -> Verdict:
    """Harvest a batch of a tiny model, and compare with the whole model on each piece alone."""
    folder = root / family
    try:
        whole = build_family(folder, family)
        lm = load(ModelConfig(str(folder), dtype="float32"), deepest=max(LAYERS))
        lm.isolation = choose_isolation(lm, list(map(HookPoint, LAYERS)), CONTEXT)
        points = [HookPoint(layer, site) for layer in LAYERS for site in lm.anatomy.sites(layer)]
        prove(lm, points, torch.from_numpy(_batch()[0].astype(np.int64)))
    except SettingError as error:
        return Verdict(family, None, _plain(error, folder), 0.0)
    tokens, starts = _batch()
    out = {point: torch.empty(tokens.size, lm.d_model) for point in points}
    batch_residuals(lm, forward_inputs(tokens, starts, lm.isolation), points, out)
    expected = _alone(whole, lm.anatomy, tokens, starts, points)
    errors = [worst(out[point], expected[point]) for point in points]
    return Verdict(family, lm.isolation, "", max(errors), _sites(lm.anatomy))


def _sites(anatomy: Anatomy) -> str:
    """The sites of a family's layers, as the page has them."""
    told: list[str] = []
    for number, layer in enumerate(anatomy.layers):
        there = anatomy.sites(number)
        lacking = [site for site in SITES if site not in there]
        reasons = dict.fromkeys(layer.refused[site] for site in lacking)
        if not lacking:
            told.append("all")
        elif len(there) == 2:
            told.append(f"{', '.join(there)} ({'; '.join(reasons)})")
        else:
            told.append(f"all but {', '.join(lacking)} ({'; '.join(reasons)})")
    return "; in other layers ".join(dict.fromkeys(told))


def _plain(error: SettingError, folder: Path) -> str:
    """The reason of a refusal, without the folder."""
    return str(error).replace(f"{folder} ", "its checkpoint ")


def _batch() -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    starts = rng.random((2, CONTEXT)) < 0.1
    starts[:, 0] = True
    return np.where(starts, 2, rng.integers(4, 257, starts.shape)).astype(np.uint32), starts


def _alone(
    whole: Any,
    anatomy: Anatomy,
    tokens: NDArray[np.uint32],
    starts: NDArray[np.bool_],
    points: list[HookPoint],
) -> dict[HookPoint, torch.Tensor]:
    """(n, d) float32 rows a point: each piece run alone in the whole model with its head."""
    layers = Bare(find_blocks(whole.base_model), anatomy)
    edges = [*np.flatnonzero(starts).tolist(), tokens.size]
    rows: dict[HookPoint, list[torch.Tensor]] = {point: [] for point in points}
    for first, end in pairwise(edges):
        ids = torch.from_numpy(tokens.ravel()[first:end].astype(np.int64))[None]
        with torch.no_grad(), tap(layers, points) as taken:
            whole(input_ids=ids, use_cache=False)
        for point in points:
            rows[point].append(taken[point][0])
    return {point: torch.cat(rows[point]) for point in points}


def page(verdicts: list[Verdict]) -> str:
    """docs/families.md."""
    holders = families()
    supported = [verdict for verdict in verdicts if verdict.way is not None]
    refused = [verdict for verdict in verdicts if verdict.way is None]
    whole = sum(verdict.sites == "all" for verdict in supported)
    error = max(verdict.error for verdict in supported)
    prose = [
        f"This page lists which of the {len(holders)} text decoders of transformers "
        f"{transformers.__version__} can be harvested. Look your model up here before you harvest "
        "it: its family is `model_type` in its `config.json`.",
        f"{len(supported)} families are supported. All of them have the "
        f"[sites](glossary.md#site) `resid_pre` and `resid_post`; {whole} have all six. "
        f"{len(refused)} are refused, each in one line. {len(UNTRIED)} were not tried.",
        '"How" says how the documents of a packed [row](glossary.md#row) are kept apart. Each '
        "start of a harvest tries three ways, and takes the first whose rows are right "
        "([harvest.md](harvest.md)). **packed**: [pieces](glossary.md#piece) share a row; nothing "
        "is lost. **padded**: each piece has a row of its own; 5 to 11% more tokens are computed. "
        "**alone**: each piece is a pass of its own, which is slow for short pieces; models that "
        'read their padding (bidirectional ones) need it. "Also in" names other model types that '
        "hold the same text decoder.",
        "Each family was tried with a tiny random model: the rows of a batch of packed documents "
        "against each piece run alone in the whole model. The largest error of a row is "
        f"{error:.0e} of its norm; one rounding of a stored value is 4e-03. Sites inside a layer "
        "are found by the layer's structure. Every start proves them: what they add up to must be "
        "the layer's output. `python -m tests.harvest.families` writes this page. "
        "`make test-long` compares all of it, `make test` a part.",
    ]
    lines = ["# Families of models", ""]
    for paragraph in prose:
        lines += [*textwrap.wrap(paragraph, 130, break_on_hyphens=False), ""]
    lines += ["## Supported", "", "| family | how | sites | also in |", "|---|---|---|---|"]
    for verdict in supported:
        others = [kind for kind in holders[verdict.family] if kind != verdict.family]
        lines.append(
            f"| {verdict.family} | {verdict.way} | {verdict.sites} | {', '.join(others)} |"
        )
    lines += ["", "## Refused", "", "| family | reason |", "|---|---|"]
    for verdict in refused:
        lines.append(f"| {verdict.family} | {verdict.reason} |")
    lines += ["", "## Not tried", "", "| family | reason |", "|---|---|"]
    for family, reason in UNTRIED.items():
        lines.append(f"| {family} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try every family and write the page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as root:
        for family in sorted(families()):
            if family not in UNTRIED:
                verdicts.append(tried(family, Path(root)))
                print(verdicts[-1], flush=True)
    PAGE.write_text(page(verdicts))


if __name__ == "__main__":
    main()
