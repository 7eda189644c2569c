"""The language model as a source of residuals: loaded, and truncated after the deepest layer.

Shapes: b rows and t positions of one pass, d d_model. Layer 0 is the first decoder layer, never the
embedding.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from residual_saes.data.errors import SettingError, first_line
from residual_saes.data.machine import is_out_of_memory
from residual_saes.data.model_path import EMBEDDED
from residual_saes.harvest.anatomy import Anatomy
from residual_saes.harvest.attention import SDPA, Attending, switch_
from residual_saes.harvest.decoder import cut_, find_blocks, find_final_norm
from residual_saes.harvest.dissection import dissect
from residual_saes.harvest.headers import require_layers, stored
from residual_saes.harvest.hub_model import complete, described
from residual_saes.harvest.isolation import Isolation
from residual_saes.harvest.model_folder import config_digest, read_config, weights_digest
from residual_saes.harvest.tokens import Tokenizer
from residual_saes.harvest.weights import load_cut, load_with_head

_FOLLOWED_TOKENS = 8  # of each of two texts, by which a decoder's anatomy is found


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
    blocks: nn.ModuleList  # all of the decoder's layers; those above `deepest` have no weights
    tokenizer: Tokenizer
    d_model: int
    vocabulary: int  # token ids
    n_layers: int  # of the whole model
    deepest: int  # the last layer that has its weights
    max_context: int  # tokens
    identity: dict[str, Any]  # the model's entry in the manifest
    isolation: Isolation = "packed"
    attention: Attending = SDPA  # of packed rows
    causal: Any = None  # transformers' model of decoder and head, where the head was asked for
    # The norm between the last layer and the head, where the head was asked for; nn.Identity in
    # families without one.
    final_norm: Any = None

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the sites inside its layers are; found once, by two passes of a few tokens.

        Raises:
            SettingError: the decoder's code fails at such a pass.
        """
        ids = np.random.default_rng(0).choice(self.ordinary_tokens, (2, _FOLLOWED_TOKENS))
        on_device = torch.from_numpy(ids).to(self.config.device)
        try:
            return dissect(self.decoder, self.blocks, self.deepest, on_device)
        except Exception as error:  # the family's own code may raise anything
            if is_out_of_memory(error):
                raise
            raise SettingError(
                f"the layers of {type(self.decoder).__name__} cannot be followed "
                f"({type(error).__name__}: {first_line(error)}); take site=resid_post"
            ) from error

    @property
    def ordinary_tokens(self) -> NDArray[np.int64]:
        """Token ids that are no special ones: some families look at padding tokens."""
        special = list(self.tokenizer.backend.get_added_tokens_decoder())
        known = min(self.vocabulary, self.tokenizer.backend.get_vocab_size())
        return np.setdiff1d(np.arange(known), special)

    def attend_by_(self, attention: Attending) -> None:
        """Have its layers attend in packed rows by another way."""
        self.attention = attention
        switch_(self.decoder.config, on=attention != SDPA)

    def truncate_(self, deepest: int) -> None:
        """Free what only layers above `deepest` use. No forward pass may go further."""
        if deepest >= self.deepest:
            return
        cut_(self.decoder, self.blocks, deepest)
        self.deepest = deepest
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


def load(
    config: ModelConfig,
    *,
    deepest: int | None = None,
    head: bool = False,
    tokenizer: Tokenizer | None = None,
) -> LanguageModel:
    """Load a text decoder in its own dtype, straight onto its device.

    Vision and audio towers are neither built nor read, nor is the language-model head unless
    `head`. The digest of the weights is taken while they load.

    Args:
        deepest: the last layer that is wanted, from 0 on; None: all. What lies above takes no
            memory.
        tokenizer: the folder's, if it is loaded already.

    Raises:
        SettingError: the folder holds no complete causal language model with a tokenizer that has a
            BOS token.
    """
    folder, weights = complete(config.path, config.revision)
    whole = read_config(folder)
    require_layers(stored(config.path, folder), whole.get_text_config(), config.path)
    if tokenizer is None:
        tokenizer = Tokenizer.load(folder, whole.get_text_config().vocab_size)
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        digest = pool.submit(weights_digest, weights)
        if head:
            loaded: Any = load_with_head(folder, whole, config.dtype, config.device)
        else:
            loaded = load_cut(folder, whole, config.dtype, config.device, deepest)
    decoder = loaded.base_model if head else loaded
    if head:
        loaded.get_output_embeddings().register_forward_pre_hook(_contiguous)
    blocks = find_blocks(decoder)
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
        "n_layers": len(blocks),
    }
    return LanguageModel(
        config=config,
        decoder=decoder,
        blocks=blocks,
        tokenizer=tokenizer,
        d_model=text.hidden_size,
        vocabulary=text.vocab_size,
        n_layers=len(blocks),
        deepest=len(blocks) - 1 if deepest is None else deepest,
        max_context=getattr(text, "max_position_embeddings", None) or 2**31,
        identity=identity,
        causal=loaded if head else None,
        final_norm=find_final_norm(decoder, blocks) if head else None,
    )


def of_loaded(model: Any, tokenizer: Any = None) -> LanguageModel:
    """A transformers model with its head that the user has loaded; it is left as it is.

    Args:
        tokenizer: transformers' own; None: the one of the folder or hub id the model is from.

    Raises:
        SettingError: it is no such model, or there is no tokenizer as `Tokenizer` wants it.
    """
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "name_or_path"):
        kind = type(model).__name__
        raise SettingError(f"model= is a {kind}; give a model that transformers has loaded")
    decoder: Any = model.base_model
    text: Any = model.config.get_text_config()
    blocks = find_blocks(decoder)
    path = str(model.name_or_path)
    if tokenizer is None:
        tokens = Tokenizer.load(described(path, "main"), text.vocab_size)
    else:
        tokens = Tokenizer.of_loaded(tokenizer, text.vocab_size)
    dtype: Any = "float32" if model.dtype == torch.float32 else "bfloat16"
    return LanguageModel(
        config=ModelConfig(path, dtype=dtype, device=str(model.device)),
        decoder=decoder,
        blocks=blocks,
        tokenizer=tokens,
        d_model=text.hidden_size,
        vocabulary=text.vocab_size,
        n_layers=len(blocks),
        deepest=len(blocks) - 1,
        max_context=getattr(text, "max_position_embeddings", None) or 2**31,
        identity={},
        causal=model,
    )


def _contiguous(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The head's inputs, contiguous.

    Generation gives it the last position of each prompt as a slice. On a CPU torch then copies the
    unembedding once for each prompt: 43 GB for 32 prompts of Gemma 4 E4B.
    """
    states, *others = inputs
    return states.contiguous(), *others


def recorded_name(path: str, folder: Path) -> str:
    """The model's name in manifests: the hub id, or the folder's last name, which may move."""
    if path == EMBEDDED:
        return "tiny"
    return folder.name if folder == Path(path) else path
