"""The language model as a source of residuals: load what is used of it, truncate it, tap it.

Shapes: B rows, T context, d d_model; residuals are `resid_post`, the output of a decoder layer (the
value that the next layer reads), so layer 0 is the first block's output and never the embedding.
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
from harvest.isolation import Isolation
from harvest.isolation import forward_inputs as forward_inputs
from harvest.model_folder import EMBEDDED as EMBEDDED
from harvest.model_folder import config_digest, load_decoder, read_config, weights_digest
from harvest.model_folder import is_out_of_memory as is_out_of_memory
from harvest.model_folder import resolve as resolve
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
    """A text decoder, without its head unless that was asked for."""

    config: ModelConfig
    decoder: nn.Module
    blocks: nn.ModuleList  # its layers, as long as it has not been truncated all of them
    tokenizer: Tokenizer
    d_model: int
    vocabulary: int  # token ids
    n_layers: int  # of the whole model
    max_context: int  # tokens
    identity: dict[str, Any]  # what the manifest records of it
    isolation: Isolation = "packed"
    causal: Any = (
        None  # transformers' model of `decoder` and its head, where the head was asked for
    )

    def truncate_(self, deepest: int) -> None:
        """Drop every layer above `deepest` and what only these read, and give the memory back.

        The layers that stay were laid out by the whole model's configuration (which of them share
        keys and values, which ends a pattern), so this cannot be had by loading fewer of them.
        """
        del self.blocks[deepest + 1 :]
        narrow_per_layer_inputs_(self.decoder, len(self.blocks))
        gc.collect()  # modules are circular, and GBs cannot wait for the next collection
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


class _Leading(nn.Module):
    """The first `width` outputs of `whole`, with the bits that they have among all of them.

    A product of fewer columns may be given another kernel, whose sums round otherwise; then a
    layer's rows would depend on how deep the model was cut. This one costs 0.3 % of E4B's forward
    to layer 27.
    """

    def __init__(self, whole: nn.Module, width: int) -> None:
        super().__init__()
        self.whole, self.width = whole, width

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(b, t, d) to (b, t, width)."""
        found: torch.Tensor = self.whole(states)[..., : self.width]
        return found


def narrow_per_layer_inputs_(decoder: nn.Module, layers: int) -> None:
    """Where every layer has an input of its own per token (Gemma 4), keep those of the first
    `layers` only.

    The table holds them side by side: (vocabulary, layers * width), 5.6 GB in Gemma 4 E4B, 3.8 GB
    of it to layer 27.
    """
    table = getattr(decoder, "embed_tokens_per_layer", None)
    if table is None:
        return
    config: Any = decoder.config
    projection: Any = decoder.per_layer_model_projection
    width = layers * config.hidden_size_per_layer_input
    table.weight = nn.Parameter(
        table.weight[:, :width].clone(), requires_grad=False
    )  # a view would keep all of it
    table.embedding_dim = width
    decoder.per_layer_model_projection = _Leading(projection, width)
    config.num_hidden_layers = layers  # by which the decoder shapes both


def load(config: ModelConfig, *, head: bool = False) -> LanguageModel:
    """Load the text decoder, all layers of it, in its own dtype straight onto its device.

    What sees or hears is neither built nor read, nor is the head unless asked for. The weights'
    digest is taken while they load.

    Raises:
        SettingError: the folder holds no complete causal language model with a tokenizer that has a
            BOS token.
    """
    folder = resolve(config.path, config.revision)
    whole = read_config(folder)
    tokenizer = Tokenizer.load(folder)
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        weights = pool.submit(weights_digest, folder)
        loaded: Any = load_decoder(folder, whole, config.dtype, config.device, head=head)
    decoder = loaded.get_decoder() if head else loaded
    text: Any = decoder.config
    identity = {
        "id": "tiny"
        if config.path == EMBEDDED
        else folder.name
        if folder == Path(config.path)
        else config.path,
        "revision": config.revision,
        "architecture": (whole.architectures or [type(decoder).__name__])[0],
        "weights": weights.result(),
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


def find_blocks(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder's own list of layers: `layers` in most families, `h` in GPT-2's."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers:
            return child
    raise SettingError(
        f"{type(decoder).__name__} has no list of {n_layers} layers to take residuals from"
    )


# -- checks at every start -------------------------------------------------------------------------


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm between the last layer and the head, by the names that families give it."""
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        if isinstance(module := getattr(decoder, name, None), nn.Module):
            return module
    raise PipelineError(f"{type(decoder).__name__} has no final norm by a known name")
