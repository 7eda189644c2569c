"""The parts of a text decoder: its layers, its final norm, what a cut leaves of it.

They are found by structure and by what the forward pass calls, not by names of families.

Shapes: b rows and t positions of one pass, d d_model, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from residual_saes.data.errors import SettingError, first_line

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


class Outline(NamedTuple):
    """What a decoder's code says about it, whatever its weights."""

    family: Any  # transformers' class
    layers: int


def outline(text: Any) -> Outline:
    """The outline of the decoder that this configuration describes.

    Raises:
        SettingError: transformers cannot build it, or it has no list of layers, or these have no
            single residual stream.
    """
    key = f"{type(text).__qualname__} {text.to_json_string(use_diff=False)}"
    if key not in _outlines:
        decoder = meta_decoder(text)
        blocks = find_blocks(decoder)
        require_one_stream(decoder, blocks, text.hidden_size)
        _outlines[key] = Outline(type(decoder), len(blocks))
    return _outlines[key]


_outlines: dict[str, Outline] = {}  # of this process: E4B's takes 2.6 s


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


def require_one_stream(decoder: nn.Module, blocks: nn.ModuleList, d_model: int) -> None:
    """Refuse families whose layers have no single residual stream, before any weight is read.

    Args:
        decoder: without memory; one pass of it is followed. A family whose code looks at values
            cannot be followed, and passes; the self-check tries it with its weights.

    Raises:
        SettingError: a layer is run several times a token (HRM), or gives states of another shape
            (Gemma 3n).
    """
    outputs: dict[int, list[tuple[int, ...]]] = {}

    def note(layer: int) -> Callable[..., None]:
        def on_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple | list) else output
            outputs.setdefault(layer, []).append(tuple(states.shape))

        return on_output

    handles: list[Any] = []
    for layer, block in enumerate(blocks):
        handles.append(block.register_forward_hook(note(layer)))
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode(), suppress(Exception):
            decoder(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    family = type(decoder).__name__
    for layer, shapes in outputs.items():
        if len(shapes) > 1:
            raise SettingError(
                f"{family} runs its layers {len(shapes)} times for one token, so a layer has no "
                "single residual; take another model"
            )
        require_residuals(family, layer, shapes[0], (*ids.shape, d_model))


def require_residuals(
    family: str, layer: int, shape: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    """Raise SettingError unless a layer gave states of the `expected` shape (b, t, d)."""
    if shape != expected:
        raise SettingError(
            f"layer {layer} of {family} gives {shape or 'nothing'}, and not one residual stream "
            f"{expected}; take another model"
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
            # Device sync, at the start: the family's own masks.
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
