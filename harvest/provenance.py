"""The manifest of a harvest: everything that the store's bytes follow from."""

from __future__ import annotations

from typing import Any

import torch

from residual_saes.data import environment
from residual_saes.data.site import RESID_POST
from residual_saes.data.store import manifest
from residual_saes.data.store.place import Place
from residual_saes.data.text.documents import TextSource
from residual_saes.harvest.attention import Attention
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.description import Description
from residual_saes.harvest.model import LanguageModel


def manifest_of(config: HarvestConfig, lm: LanguageModel, source: TextSource) -> dict[str, Any]:
    """The manifest, which is written once and compared on every later start."""
    model = dict(lm.identity)
    if source.chats:
        model["chat_template"] = lm.tokenizer.template_digest
    assert isinstance(lm.attention, Attention)
    return {
        "site": RESID_POST,
        "model": model,
        "isolation": lm.isolation,
        **lm.attention.recorded(),
        **_without_model(config, source, lm.config.device),
    }


def _without_model(config: HarvestConfig, source: TextSource, device: str) -> dict[str, Any]:
    """What follows from settings, text and machine alone."""
    cut = {} if config.max_tokens is None else {"max_tokens": config.max_tokens}
    return {
        "text": {**source.identity(), **cut},
        "tokens": config.tokens,
        "context": config.context,
        "seed": config.seed,
        "unit": config.unit_tokens,
        "chunk": config.chunk_rows,
        "batch": config.batch,
        "codec": config.codec,
        "environment": environment.of_harvest(torch.device(device)),
    }


def require_same_so_far(
    place: Place, config: HarvestConfig, described: Description, source: TextSource
) -> None:
    """Compare a store that is there with all that is known before any weight is read.

    Raises:
        MismatchError: the store was made with other settings, or another model.
    """
    if not manifest.exists(place):
        return
    recorded = manifest.read(place)
    model = {**recorded["model"], **described.identity}
    if source.chats:
        model["chat_template"] = described.tokenizer.template_digest
    known = {"site": RESID_POST, "model": model}
    device = described.config.device
    manifest.require_same(place, {**recorded, **known, **_without_model(config, source, device)})
