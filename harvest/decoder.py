"""The parts of a text decoder: its layers, its final norm, what a cut leaves of it.

They are found by structure and by what the forward pass calls, not by names of families.

Shapes: b rows and t positions of one pass, d d_model, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from data.errors import SettingError, first_line

# Gemma 4's table of per-layer inputs, (V, layers * width): 5.6 GB in E4B, 3.8 GB of it to layer 27.
PER_LAYER_TABLE = "embed_tokens_per_layer"


def meta_decoder(text: Any) -> nn.Module:
    """The whole decoder without memory.

    Args:
        text: configuration of the text decoder; it is not changed.

    Raises:
        SettingError: transformers cannot build it.
    """
    from transformers import AutoModel

    config = plain_config(text)
    try:
        with torch.device("meta"):
            decoder: nn.Module = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # the family's own code may raise anything
        raise SettingError(
            f"model_type={text.model_type} cannot be built from its configuration "
            f"({type(error).__name__}: {first_line(error)}); take a model that "
            "transformers' AutoModel builds"
        ) from error
    return decoder


def plain_config(text: Any) -> Any:
    """A copy without what config.json says about how to run the model, not about its function.

    An attention kernel that is not installed (`flash_attention_2`) would stop the model, and kept
    hidden states would fill the memory.
    """
    config = copy.deepcopy(text)
    config._attn_implementation = None  # transformers then takes SDPA where the family has it
    config.output_hidden_states = False
    config.output_attentions = False
    return config


def find_blocks(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's list of layers: the heaviest module list that lies in no other one.

    Raises:
        SettingError: there is none, or an encoder stands beside the decoder.
    """
    family = type(decoder).__name__
    if hasattr(decoder, "encoder") and hasattr(decoder, "decoder"):
        raise SettingError(
            f"{family} is an encoder with a decoder, whose rows would depend on the encoder's "
            "text; take a decoder-only model"
        )
    lists = outermost_lists(decoder)
    if not lists:
        raise SettingError(
            f"{family} has no list of layers to take residuals from; take a decoder whose layers "
            "are one nn.ModuleList"
        )
    return max(lists, key=parameter_count)


def require_one_visit(decoder: nn.Module, blocks: nn.ModuleList) -> None:
    """Refuse families that run their layers several times a token (HRM).

    Args:
        decoder: without memory; one pass of it is followed. A family whose code looks at values
            cannot be followed, and passes.

    Raises:
        SettingError: a layer is run more than once.
    """
    visits = dict.fromkeys(range(len(blocks)), 0)

    def count(layer: int) -> Callable[..., None]:
        def on_entry(*_: object) -> None:
            visits[layer] += 1

        return on_entry

    handles: list[Any] = []
    for layer, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(count(layer)))
    try:
        with torch.inference_mode(), suppress(Exception):
            decoder(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    if max(visits.values()) > 1:
        raise SettingError(
            f"{type(decoder).__name__} runs its layers {max(visits.values())} times for one token, "
            "so a layer has no single residual; take another model"
        )


def outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The module lists below a module that lie in no other list."""
    lists: list[nn.ModuleList] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            lists.append(child)
        else:
            lists += outermost_lists(child)
    return lists


def find_final_norm(decoder: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The norm that the last layer's output goes through; the identity where there is none.

    One token is run: the norm is the module beside the blocks that is called after the last one.

    Raises:
        SettingError: several modules are.
    """
    parent = next(module for module in decoder.modules() if blocks in module.children())
    device = next(decoder.parameters()).device
    followers: list[nn.Module] = []
    behind_last: list[bool] = []

    def note(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if module is blocks[-1]:
            behind_last.append(True)
        elif behind_last:
            followers.append(module)

    handles = [blocks[-1].register_forward_hook(note)]
    for child in parent.children():
        if child is not blocks:
            handles.append(child.register_forward_hook(note))
    try:
        with torch.inference_mode():
            decoder(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(followers) > 1:
        names = ", ".join(type(module).__name__ for module in followers)
        raise SettingError(
            f"{type(decoder).__name__} calls {names} behind its last layer: which of them is its "
            "final norm is not known"
        )
    return followers[0] if followers else nn.Identity()


def parameter_count(module: nn.Module) -> int:
    """Numbers in all parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def cut_(decoder: nn.Module, blocks: nn.ModuleList, deepest: int) -> None:
    """Free what only blocks above `deepest` use. No forward pass may go further."""
    if deepest >= len(blocks) - 1:
        return
    for block in blocks[deepest + 1 :]:
        block.to("meta")  # the block stays: the decoder's code may look at its attributes
    narrow_per_layer_inputs_(decoder, deepest + 1)


def narrow_per_layer_inputs_(decoder: nn.Module, layers: int) -> None:
    """Keep the columns of the first `layers` in Gemma 4's table; without a table do nothing.

    The decoder gets zeros for the other layers, which it does not reach. Its configuration and all
    its other products stay, and so does every bit of what it computes.
    """
    table = getattr(decoder, PER_LAYER_TABLE, None)
    if table is None:
        return
    config: Any = decoder.config
    columns = config.num_hidden_layers * config.hidden_size_per_layer_input
    width = layers * config.hidden_size_per_layer_input
    kept = table.weight[:, :width].clone()  # a view would keep all of it in memory
    table.weight = nn.Parameter(kept, requires_grad=False)
    table.embedding_dim = width

    def pad(_module: nn.Module, _inputs: Any, rows: torch.Tensor) -> torch.Tensor:
        return functional.pad(rows, (0, columns - rows.shape[-1]))

    table.register_forward_hook(pad)
