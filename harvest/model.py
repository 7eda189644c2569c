"""The language model as a source of residuals: loaded, and truncated after the deepest layer.

Shapes: b rows and t positions of one pass, d d_model. Layer 0 is the first decoder layer, never the
embedding.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from data.errors import PipelineError, SettingError
from harvest.hub_model import complete
from harvest.isolation import Isolation
from harvest.model_folder import (
    EMBEDDED,
    config_digest,
    load_decoder,
    read_config,
    weights_digest,
)
from harvest.site import RESID_POST, Site
from harvest.tokens import Tokenizer


@dataclass(frozen=True)
class ModelConfig:
    """Which language model, and how it is run."""

    path: str  # folder, hub id, or `embedded`
    revision: str = "main"  # of a hub id
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise SettingError(f"model.dtype={self.dtype} must be bfloat16 or float32")


@dataclass
class LanguageModel:
    """A text decoder, with its language-model head only where that was asked for."""

    config: ModelConfig
    decoder: nn.Module
    blocks: nn.ModuleList  # the decoder's layers; all of them until it is truncated
    tokenizer: Tokenizer
    d_model: int
    vocabulary: int  # token ids
    n_layers: int  # of the whole model
    max_context: int  # tokens
    identity: dict[str, Any]  # the model's entry in the manifest
    isolation: Isolation = "packed"
    site: Site = RESID_POST  # where in a layer rows are taken
    causal: Any = None  # transformers' model of decoder and head, where the head was asked for

    def truncate_(self, deepest: int) -> None:
        """Drop every layer above `deepest` and what only these read, and free the memory.

        Loading fewer layers would not do: the whole model's configuration decides which of the
        layers that stay share keys and values, and where the attention pattern ends.
        """
        del self.blocks[deepest + 1 :]
        narrow_per_layer_inputs_(self.decoder, len(self.blocks))
        gc.collect()  # modules form reference cycles, and hold GBs
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


def load(config: ModelConfig, *, head: bool = False) -> LanguageModel:
    """Load the whole text decoder in its own dtype, straight onto its device.

    Vision and audio towers are neither built nor read, nor is the language-model head unless
    `head`. The digest of the weights is taken while they load.

    Raises:
        SettingError: the folder holds no complete causal language model with a tokenizer that has a
            BOS token.
    """
    folder, weights = complete(config.path, config.revision)
    whole = read_config(folder)
    tokenizer = Tokenizer.load(folder, whole.get_text_config().vocab_size)
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        digest = pool.submit(weights_digest, weights)
        loaded: Any = load_decoder(folder, whole, config.dtype, config.device, head=head)
    decoder = loaded.get_decoder() if head else loaded
    text: Any = decoder.config
    identity = {
        "id": recorded_name(config.path, folder),
        "revision": config.revision,
        "architecture": (whole.architectures or [type(decoder).__name__])[0],
        "weights": digest.result(),
        "config": config_digest(folder, whole),
        "tokenizer": tokenizer.digest,
        "bos": tokenizer.bos,
        "dtype": config.dtype,
        "d_model": text.hidden_size,
        "n_layers": text.num_hidden_layers,
    }
    return LanguageModel(
        config=config,
        decoder=decoder,
        blocks=find_blocks(decoder, text.num_hidden_layers),
        tokenizer=tokenizer,
        d_model=text.hidden_size,
        vocabulary=text.vocab_size,
        n_layers=text.num_hidden_layers,
        max_context=getattr(text, "max_position_embeddings", None) or 2**31,
        identity=identity,
        causal=loaded if head else None,
    )


def recorded_name(path: str, folder: Path) -> str:
    """The model's name in manifests: the hub id, or the folder's last name, which may move."""
    if path == EMBEDDED:
        return "tiny"
    return folder.name if folder == Path(path) else path


# -- parts of a decoder ----------------------------------------------------------------------------


def find_blocks(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder's own list of layers: `layers` in most families, `h` in GPT-2's."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers:
            return child
    raise SettingError(
        f"{type(decoder).__name__} has no list of {n_layers} layers to take residuals from"
    )


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm between the last layer and the head, by the names that families give it."""
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        norm = getattr(decoder, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise PipelineError(f"{type(decoder).__name__} has no final norm by a known name")


def narrow_per_layer_inputs_(decoder: nn.Module, layers: int) -> None:
    """Keep the per-layer token inputs of the first `layers` only (Gemma 4); else do nothing.

    Their table is (vocabulary, layers * width): 5.6 GB in Gemma 4 E4B, 3.8 GB of it to layer 27.
    """
    table = getattr(decoder, "embed_tokens_per_layer", None)
    if table is None:
        return
    config: Any = decoder.config
    projection: Any = decoder.per_layer_model_projection
    width = layers * config.hidden_size_per_layer_input
    kept = table.weight[:, :width].clone()  # a view would keep all of it in memory
    table.weight = nn.Parameter(kept, requires_grad=False)
    table.embedding_dim = width
    decoder.per_layer_model_projection = _Leading(projection, width)
    config.num_hidden_layers = layers  # the decoder shapes both by it


class _Leading(nn.Module):
    """The first `width` outputs of `whole`, computed with all of them.

    A product of fewer columns may get another kernel, which rounds its sums otherwise. Then a
    layer's rows would depend on where the model was cut. All columns cost 0.3 % of E4B's forward to
    layer 27.
    """

    def __init__(self, whole: nn.Module, width: int) -> None:
        super().__init__()
        self.whole = whole
        self.width = width

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(b, t, d) to (b, t, width)."""
        outputs: torch.Tensor = self.whole(states)
        return outputs[..., : self.width]
