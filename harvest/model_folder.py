"""A model's folder: its configuration, its decoder, and the digests that identify them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from data import durable
from data.errors import SettingError, first_line

EMBEDDED = "embedded"  # model.path of the model that ships with the package
# Multimodal checkpoints name their text decoder's weights in two orders. Both are renamed to the
# names of AutoModel, or of AutoModelForCausalLM.
_DECODER_NAMES = {r"^(?:model\.)?language_model\.(?:model\.)?": ""}
_CAUSAL_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
# Entries of config.json that no residual depends on.
_NOISE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def read_config(folder: Path) -> Any:
    """The configuration in a model's folder; its `get_text_config()` is the decoder's.

    Raises:
        SettingError: there is none, or it is not of a causal language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(folder, error) from error
    kind = config.get_text_config().model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SettingError(f"{folder} is not a loadable causal language model but a {kind}")
    return config


def load_decoder(
    folder: Path, whole: Any, dtype: str, device: str, *, head: bool = False
) -> nn.Module:
    """The whole text decoder in `dtype`, straight onto `device`.

    Vision and audio towers are neither built nor read, nor is the language-model head unless
    `head`.

    Args:
        whole: the folder's configuration.

    Raises:
        SettingError: the weights do not fit in memory, or are damaged or incomplete.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    text = whole.get_text_config()
    names = _CAUSAL_NAMES if head else _DECODER_NAMES
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would list every tensor that is left out on purpose
    try:
        loaded, report = (AutoModelForCausalLM if head else AutoModel).from_pretrained(
            folder,
            config=text,
            dtype=getattr(torch, dtype),  # not .to(): that would round the rotary frequencies too
            device_map=device,
            key_mapping=None if text is whole else names,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise SettingError(
            f"the weights in {folder} are damaged ({error}); copy or download them again"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise SettingError(
                f"the weights in {folder} do not fit into the memory of device={device} as {dtype}"
            ) from error
        raise _not_loadable(folder, error) from error
    finally:
        logging.set_verbosity(verbosity)
    # transformers fills missing weights with random numbers, and only logs it.
    if missing := report["missing_keys"]:
        raise SettingError(
            f"{folder} lacks {len(missing)} weights, e.g. {sorted(missing)[0]}; it is incomplete"
        )
    decoder: nn.Module = loaded.eval().requires_grad_(False)
    return decoder


def _not_loadable(folder: Path, error: Exception) -> SettingError:
    return SettingError(f"{folder} is not a loadable causal language model: {first_line(error)}")


def weights_digest(files: Sequence[Path]) -> str:
    """Digest of the weight files' names and bytes, in the order of `files`.

    Hashing releases the interpreter's lock, so it can run in a thread while the weights load.
    """
    lines: list[bytes] = []
    for file in files:
        lines.append(f"{file.name} {durable.digest_file(file).xxh3_128}\n".encode())
    return durable.digest(*lines)


def config_digest(folder: Path, whole: Any) -> str:
    """Digest of the text decoder's part of config.json.

    The same weights with other settings are another model. The digest is of the file itself:
    transformers adds defaults that differ between its versions.
    """
    recorded = json.loads((folder / "config.json").read_text())
    text = whole.get_text_config()
    part = recorded
    if text is not whole:
        names = [name for name in recorded if getattr(whole, name, None) is text]
        part = recorded[names[0]] if names else recorded
    kept = {name: value for name, value in part.items() if name not in _NOISE}
    return durable.digest(json.dumps(kept, sort_keys=True).encode())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch or NumPy refused, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator, and cuBLAS for its workspace, have no exception class of their own.
    message = str(error)
    return isinstance(error, RuntimeError) and (
        ("DefaultCPUAllocator" in message and "memory" in message)
        or "CUBLAS_STATUS_ALLOC_FAILED" in message
        or "out of memory" in message
    )
