"""Tiny random models of many families as Hugging Face folders, and E4B's true shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3_5VisionConfig,
    SiglipVisionConfig,
)

VOCABULARY = 300
_SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_COMMON: dict[str, Any] = {
    **_SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_HYBRID = ["sliding_attention", "sliding_attention", "full_attention"]

_GEMMA4 = Gemma4TextConfig(
    **_COMMON,
    num_hidden_layers=6,
    head_dim=16,
    global_head_dim=32,
    sliding_window=8,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCABULARY,
    layer_types=_HYBRID * 2,
)

CONFIGS = {
    "gemma4": _GEMMA4,
    # As Gemma 4 E4B is published: the text model inside one that also sees and hears. Loading its
    # text class by name would give random weights.
    "gemma4_multimodal": Gemma4Config(
        text_config=_GEMMA4,
        vision_config=Gemma4VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        ),
        audio_config=Gemma4AudioConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            output_proj_dims=32,
            subsampling_conv_channels=[8, 8],
        ),
        image_token_id=290,
        video_token_id=291,
        audio_token_id=292,
        boi_token_id=293,
        eoi_token_id=294,
    ),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=8,
        layer_types=[*_HYBRID, "full_attention"],
    ),
    "llama": LlamaConfig(**_COMMON, num_hidden_layers=4),
    "gpt2": GPT2Config(**_SPECIAL, n_embd=32, n_layer=4, n_head=2, n_positions=128),
    "qwen3_5": Qwen3_5TextConfig(
        **_COMMON,
        num_hidden_layers=4,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    ),
}

# Text decoders inside models that see, under two more orders of names.
COMPOSITE = {
    "gemma3": Gemma3Config(
        text_config=CONFIGS["gemma3"],
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
        image_token_index=290,
        boi_token_index=291,
        eoi_token_index=292,
    ),
    "qwen3_5": Qwen3_5Config(
        text_config=CONFIGS["qwen3_5"],
        vision_config=Qwen3_5VisionConfig(
            depth=1,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=32,
            num_position_embeddings=16,
        ),
    ),
}

# Gemma 4 E4B's text decoder as published.
E4B = Gemma4TextConfig(
    vocab_size=262_144,
    vocab_size_per_layer_input=262_144,
    hidden_size=2560,
    intermediate_size=10_240,
    num_hidden_layers=42,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=256,
    global_head_dim=512,
    sliding_window=512,
    num_kv_shared_layers=18,
    hidden_size_per_layer_input=256,
    layer_types=[*["sliding_attention"] * 5, "full_attention"] * 7,
)


class Bare(NamedTuple):
    """The layers of a whole model, for `tap`."""

    blocks: torch.nn.ModuleList
    anatomy: Any = None


def save_composite(folder: Path, family: str) -> Path:
    """A random model with its vision tower."""
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(COMPOSITE[family]).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_model(folder: Path, family: str) -> Path:
    """A random model with weights large enough that attention matters, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    enlarge_(model.get_decoder())
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def enlarge_(model: torch.nn.Module) -> None:
    """Make random matrices large enough that attention matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4.0)


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a small text about nothing at all"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
