"""A model before its weights: configuration, tokenizer, and what identifies it so far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_saes.harvest.hub_model import described
from residual_saes.harvest.model import ModelConfig, recorded_name
from residual_saes.harvest.model_folder import config_digest, read_config
from residual_saes.harvest.tokens import Tokenizer


@dataclass(frozen=True)
class Description:
    """What a model's small files say."""

    config: ModelConfig
    folder: Path
    whole: Any  # transformers' configuration; its text part is the decoder's
    tokenizer: Tokenizer

    @classmethod
    def of(cls, config: ModelConfig) -> Description:
        """The description of a model; of a hub model it is downloaded, without any weight.

        Raises:
            SettingError: there is no such model, or it is no causal language model with a
                tokenizer that has a BOS token.
        """
        folder = described(config.path, config.revision)
        whole = read_config(folder)
        vocabulary = whole.get_text_config().vocab_size
        return cls(config, folder, whole, Tokenizer.load(folder, vocabulary))

    @property
    def text(self) -> Any:
        """The decoder's configuration."""
        return self.whole.get_text_config()

    @property
    def max_context(self) -> int | None:
        """Positions of the model; None: any number."""
        return getattr(self.text, "max_position_embeddings", None) or None

    @property
    def quantised(self) -> bool:
        """Whether config.json declares how to read weights of fewer bits."""
        return getattr(self.whole, "quantization_config", None) is not None

    def require_template(self) -> None:
        """Raise SettingError if the model has no chat template."""
        assert self.tokenizer.template_digest

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the model's entry in the manifest that needs no weight."""
        return {
            "id": recorded_name(self.config.path, self.folder),
            "revision": self.config.revision,
            "config": config_digest(self.folder, self.whole),
            "tokenizer": self.tokenizer.digest,
            "bos": self.tokenizer.bos,
            "dtype": self.config.dtype,
            "d_model": self.text.hidden_size,
        }
