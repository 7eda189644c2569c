"""The manifest of a harvest: everything that the store's bytes follow from."""

from __future__ import annotations

from typing import Any

import torch

from data import environment
from data.text.documents import TextSource
from harvest.config import HarvestConfig
from harvest.model import LanguageModel


def manifest_of(config: HarvestConfig, lm: LanguageModel, source: TextSource) -> dict[str, Any]:
    """The manifest, which is written once and compared on every later start."""
    model = dict(lm.identity)
    if source.chats:
        model["chat_template"] = lm.tokenizer.template_digest
    return {
        "site": lm.site.name,
        "model": model,
        "isolation": lm.isolation,
        "text": source.identity(),
        "tokens": config.tokens,
        "context": config.context,
        "seed": config.seed,
        "unit": config.unit_tokens,
        "chunk": config.chunk_rows,
        "batch": config.batch,
        "codec": config.codec,
        "environment": environment.of_harvest(torch.device(lm.config.device)),
    }
