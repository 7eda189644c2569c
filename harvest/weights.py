"""A model's weights: from the files of its folder into a decoder, up to the deepest layer.

The decoder is built as the whole model's configuration says, without memory. Blocks above the
deepest one get no weights, and no forward pass reaches them. So every family runs its own code, and
no configuration is changed: it decides which layers share keys and values.

V is the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from residual_saes.data.errors import (
    PipelineError,
    SettingError,
    TemporaryError,
    first_line,
    is_passing,
)
from residual_saes.data.foreign import json_object, reading
from residual_saes.data.machine import is_out_of_memory
from residual_saes.harvest import weight_files
from residual_saes.harvest.decoder import (
    PER_LAYER_TABLE,
    cut_,
    find_blocks,
    outline,
    plain_config,
)

# Multimodal checkpoints name their text decoder's weights in two orders. Both are renamed to the
# names of AutoModel, or of AutoModelForCausalLM.
_DECODER_NAMES = {r"^(?:model\.)?language_model\.(?:model\.)?": ""}
_CAUSAL_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}


Emptied = list[tuple[Any, str, torch.Tensor | None]]  # where a tensor was, and the tensor


def load_cut(folder: Path, whole: Any, dtype: str, device: str, deepest: int | None) -> nn.Module:
    """The text decoder up to layer `deepest`, or all of it, in `dtype` straight on `device`.

    On a CPU, weights of that dtype stay mapped files, so they take no memory of their own. On a GPU
    they arrive tensor by tensor, and none that is not used.

    Args:
        whole: the folder's configuration; its text part is the decoder's.

    Raises:
        SettingError: there is no such layer, or the weights do not fit in memory, or are damaged or
            incomplete, or transformers cannot build the family, or it has no list of layers.
    """
    text = whole.get_text_config()
    family, layers = outline(text)
    if deepest is None:
        deepest = layers - 1
    if not 0 <= deepest < layers:
        raise SettingError(
            f"layer={deepest} is out of range: {folder} has layers 0 to {layers - 1}"
        )
    above: Emptied = []

    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        """The family's own constructor. Then the blocks above the deepest lose their weights."""
        if "add_pooling_layer" in inspect.signature(family.__init__).parameters:
            options["add_pooling_layer"] = False  # BERT's, which no causal checkpoint holds
        family.__init__(self, config, *args, **options)
        blocks = find_blocks(self)
        cut_(self, blocks, deepest)
        for block in blocks[deepest + 1 :]:
            above.extend(hollowed(block))
        present = self.state_dict().keys()
        ties = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {name: source for name, source in ties if name in present}

    # With the family's own names: transformers' lists of renamed weights go by them.
    members = {"__init__": build, "__module__": family.__module__}
    cut: Any = type(family.__name__, (family,), members)
    with _mapped_weights(folder) as weights:
        for name, weight in weights.items():
            if deepest < layers - 1 and name.endswith(f"{PER_LAYER_TABLE}.weight"):
                width = (deepest + 1) * text.hidden_size_per_layer_input
                weights[name] = _Columns(weight, width)
        decoder = _loaded(
            folder,
            lambda options: cut.from_pretrained(
                None, state_dict=weights, trust_remote_code=False, **options
            ),
            _options(whole, dtype, device, _DECODER_NAMES),
        )
    for tensors, name, tensor in above:
        tensors[name] = tensor
    return decoder


def hollowed(block: nn.Module) -> Emptied:
    """Take all weights from a block that lies on `meta`, so that none is asked for at loading."""
    taken: Emptied = []
    for module in block.modules():
        setattr(module, "_is_hf_initialized", True)  # noqa: B010 else transformers would fill it
        for name, parameter in module._parameters.items():
            taken.append((module._parameters, name, parameter))
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set:
                taken.append((module._buffers, name, buffer))
    for tensors, name, _ in taken:
        tensors[name] = None
    return taken


def load_with_head(folder: Path, whole: Any, dtype: str, device: str) -> nn.Module:
    """The whole causal language model of a folder's text decoder; raises like `load_cut`."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    options = _options(whole, dtype, device, _CAUSAL_NAMES)
    generation = folder / "generation_config.json"
    if generation.exists():  # else the family's own
        way_out = "copy or download it again"
        json_object(generation, way_out, SettingError)
        with reading(f"{generation} cannot be used", way_out, SettingError):
            options["generation_config"] = GenerationConfig.from_pretrained(
                folder, trust_remote_code=False
            )
    with _mapped_weights(folder) as weights:

        def from_mapped(options: dict[str, Any]) -> Any:
            with torch.device("meta"):
                family: Any = type(AutoModelForCausalLM.from_config(options["config"]))
            # Not by the folder: its index may name files of towers alone, which are not there.
            return family.from_pretrained(
                None, state_dict=weights, trust_remote_code=False, **options
            )

        return _loaded(folder, from_mapped, options)


def _options(whole: Any, dtype: str, device: str, names: dict[str, str]) -> dict[str, Any]:
    """What transformers is told at every load."""
    text = whole.get_text_config()
    return {
        "config": plain_config(text),
        "dtype": getattr(torch, dtype),  # not .to(): that would round the rotary frequencies too
        "device_map": device,
        "key_mapping": None if text is whole else names,
        "output_loading_info": True,
    }


def _loaded(
    folder: Path,
    load: Callable[[dict[str, Any]], tuple[Any, Any]],
    options: dict[str, Any],
) -> nn.Module:
    """What `load` gives, complete; its refusals as ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would list every tensor that is left out on purpose
    try:
        loaded, report = load(options)
    except PipelineError:
        raise
    except SafetensorError as error:
        raise SettingError(
            f"the weights in {folder} are damaged ({error}); copy or download them again"
        ) from error
    except Exception as error:  # the family's own code and quantisers may raise anything
        if is_out_of_memory(error):
            raise SettingError(
                f"the weights in {folder} do not fit into the memory of "
                f"device={options['device_map']}; take a larger one, or layer= further down"
            ) from error
        if is_passing(error):
            raise TemporaryError(
                f"{folder} cannot be read: {first_line(error)}; the same command goes on once that "
                "is mended"
            ) from error
        raise not_loadable(folder, error) from error
    finally:
        logging.set_verbosity(verbosity)
    # transformers fills missing weights with random numbers, and only logs it.
    if missing := report["missing_keys"]:
        raise SettingError(
            f"{folder} lacks {len(missing)} weights, e.g. {sorted(missing)[0]}; it is incomplete"
        )
    decoder: nn.Module = loaded.eval().requires_grad_(False)
    return decoder


def not_loadable(folder: Path, error: Exception) -> SettingError:
    """The refusal of a folder that transformers cannot load."""
    return SettingError(f"{folder} is not a loadable causal language model: {first_line(error)}")


@contextmanager
def _mapped_weights(folder: Path) -> Iterator[dict[str, Any]]:
    """Every weight of a folder by its name, unread: `weight[...]` maps or reads it."""
    with ExitStack() as files:
        weights: dict[str, Any] = {}
        way_out = "copy or download them again"
        with reading(f"the weights in {folder} are damaged", way_out, SettingError):
            for path in weight_files.present(folder):
                file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    weights[name] = file.get_slice(name)
        yield weights


class _Columns:
    """The first `width` columns of a weight (V, columns) that is not read yet."""

    def __init__(self, weight: Any, width: int) -> None:
        self._weight = weight
        self._width = width

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A view of the mapped file: on a CPU it takes no memory, on a GPU the columns alone."""
        assert index is ...
        columns: torch.Tensor = self._weight[...][:, : self._width]
        return columns

    def get_dtype(self) -> Any:
        """As safetensors names it."""
        return self._weight.get_dtype()

    def get_shape(self) -> list[int]:
        """(V, width)."""
        return [self._weight.get_shape()[0], self._width]
