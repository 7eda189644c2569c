"""A language model's folder: its configuration, tokenizer and decoder, and the digests that name
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import durable
from data.errors import SettingError, first_line
from data.tiny.embedded import MODEL_DIR

EMBEDDED = "embedded"  # model.path of the model that ships with the package
# Text decoders inside multimodal checkpoints, in the two orders of names that are about, are named
# as if alone: by themselves, and below a head.
_DECODER_NAMES = {r"^(?:model\.)?language_model\.(?:model\.)?": ""}
_CAUSAL_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
# What config.json says that no residual depends on.
_NOISE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def resolve(path: str, revision: str) -> Path:
    """The local folder of a model, downloaded from the hub if `path` is an id there.

    Raises:
        SettingError: there is no such folder, or the hub does not give the model out.
    """
    if path == EMBEDDED:
        return MODEL_DIR
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise SettingError(
            f"model.path={path} is no folder; give a Hugging Face model folder or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model"]
            )
        )
    except Exception as error:  # network, gate, unknown name: the hub's client has a dozen kinds
        raise SettingError(
            f"model.path={path} cannot be had from the Hugging Face hub ({type(error).__name__}). If it is gated, "
            "accept its terms on its page and set HF_TOKEN; without network give a local folder; "
            "`model=tiny text=tiny` runs offline"
        ) from error


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
        raise SettingError(
            f"{folder} is not a loadable causal language model: {first_line(error)}"
        ) from error
    kind = config.get_text_config().model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SettingError(f"{folder} is not a loadable causal language model but a {kind}")
    return config


def load_decoder(
    folder: Path, whole: Any, dtype: str, device: str, *, head: bool = False
) -> nn.Module:
    """The text decoder, all its layers, in `dtype` straight onto `device`; with its language-model
    head if `head`.

    What sees or hears is neither built nor read, nor is a head that is not asked for.

    Raises:
        SettingError: it does not fit, or is damaged or incomplete.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    text = whole.get_text_config()
    names = _CAUSAL_NAMES if head else _DECODER_NAMES
    said = logging.get_verbosity()
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
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise SettingError(
                f"the weights in {folder} do not fit into the memory of device={device} as {dtype}"
            ) from error
        raise SettingError(
            f"{folder} is not a loadable causal language model: {first_line(error)}"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise SettingError(
            f"the weights in {folder} are damaged ({error}); copy or download them again"
        ) from error
    finally:
        logging.set_verbosity(said)
    # transformers only logs these, and makes them up at random.
    if missing := report["missing_keys"]:
        raise SettingError(
            f"{folder} lacks {len(missing)} weights, e.g. {sorted(missing)[0]}; it is incomplete"
        )
    found: nn.Module = loaded.eval().requires_grad_(False)
    return found


def weights_digest(folder: Path) -> str:
    """Digest of the weight files' names and bytes. It lets other threads run: take it while they
    load.
    """
    files = sorted(folder.glob("*.safetensors"))
    return durable.digest(
        *(f"{file.name} {durable.digest_file(file).xxh3_128}\n".encode() for file in files)
    )


def config_digest(folder: Path, whole: Any) -> str:
    """Digest of what the file says of the text decoder: the same weights with other settings are
    another model.

    The file and not transformers' reading of it, which every version completes with other defaults.
    """
    said = json.loads((folder / "config.json").read_text())
    text = whole.get_text_config()
    part = next(
        (said[name] for name in said if text is not whole and getattr(whole, name, None) is text),
        said,
    )
    kept = {name: value for name, value in part.items() if name not in _NOISE}
    return durable.digest(json.dumps(kept, sort_keys=True).encode())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch or numpy refused, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    # The CPU's allocator, and cuBLAS for its workspace, have no exception class of their own.
    return isinstance(error, RuntimeError) and (
        ("DefaultCPUAllocator" in said and "memory" in said)
        or "CUBLAS_STATUS_ALLOC_FAILED" in said
        or "out of memory" in said
    )
