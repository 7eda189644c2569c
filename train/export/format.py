"""Trained SAEs in the files of other libraries, and theirs as ours.

A library is a file of this folder with two functions, found by its name (to=NAME):

    write(sae, about)     contents by path below the export's folder
    read(folder)          the SAE in such files

What our SAE computes is in train/sae.py. The others differ in small things. What can be folded into
the weights exactly is folded; the rest is refused.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.errors import StoreError
from train import export
from train.sae import SAE

_OTHERS = {"__main__", "command", "format"}  # modules here that are no library


class About(NamedTuple):
    """What an SAE was trained on, for those who use it."""

    model: str  # hub id or folder name
    layer: int  # of the model, from 0: the SAE is of its output, resid_post
    context: int  # tokens
    text: str


def about(run: Path, config: Mapping[str, Any]) -> About:
    """What config.yaml of a run says of it.

    Raises:
        StoreError: it is of a version that did not write that down.
    """
    source = config.get("source")
    if source is None:
        raise StoreError(
            f"{run} does not say what it was trained on: it is of an earlier version; "
            "train it again"
        )
    return About(source["model"], config["settings"]["layer"], source["context"], source["text"])


class Format(Protocol):
    """A library's module."""

    def write(self, sae: SAE, about: About) -> dict[str, bytes]:
        """The library's files: contents by path below the export's folder.

        Raises:
            StoreError: the library has no such SAE.
        """
        ...

    def read(self, folder: Path) -> SAE:
        """The SAE in the library's files.

        Raises:
            StoreError: they are missing, unreadable, or hold what our SAE cannot compute.
        """
        ...


def names() -> list[str]:
    """Libraries whose files can be written and read."""
    modules = [module.name for module in pkgutil.iter_modules(export.__path__)]
    return [name for name in modules if name not in _OTHERS]


def find(name: str) -> Format:
    """The format of one of `names`."""
    return cast("Format", import_module(f"train.export.{name}"))


# -- for the libraries' files ----------------------------------------------------------------------


def to_json(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file."""
    return json.dumps(value, indent=1).encode()


def to_safetensors(**named: Tensor) -> bytes:
    """The content of a safetensors file, in float32."""
    content = {}
    for name, tensor in named.items():
        content[name] = tensor.detach().cpu().float().contiguous()
    return save(content)


def require_topk(sae: SAE, name: str) -> None:
    """Raise StoreError if the SAE has thresholds; `name` is the library's."""
    if sae.threshold is not None:
        raise StoreError(
            f"{name} knows TopK alone, and this SAE has thresholds; to=saelens takes it"
        )


def unit_decoder(sae: SAE) -> SAE:
    """The same function with decoder rows of norm 1.

    Activations take the norms. Latents are kept by those products.
    """
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    threshold = None if sae.threshold is None else sae.threshold * norms
    return SAE.of(
        sae.W_enc * norms,
        sae.W_dec / norms[:, None],
        sae.b_enc * norms,
        sae.b_dec,
        sae.k,
        threshold,
    )


def thresholded(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor
) -> SAE:
    """An SAE that keeps what is above a threshold and above 0, ReLU's own.

    Its k is no part of its function.
    """
    return unit_decoder(SAE.of(W_enc, W_dec, b_enc, b_dec, len(b_enc), threshold.clamp_min(0)))


def refuse(condition: bool, folder: Path, got: str, allowed: str) -> None:
    """Raise StoreError under a condition."""
    if condition:
        raise StoreError(f"{folder} has {got}; what can be taken is {allowed}")


def required(config: Mapping[str, Any], name: str, folder: Path) -> Any:
    """A value of a configuration. Raises StoreError if it is not there."""
    refuse(name not in config, folder, f"no {name} in its configuration", "a whole one")
    return config[name]


def tensor_of(state: Mapping[str, Any], name: str, folder: Path) -> Tensor:
    """A tensor of a file as float32. Raises StoreError: it is not there."""
    tensor = state.get(name)
    refuse(not isinstance(tensor, Tensor), folder, f"no tensor {name}", "an SAE that has it")
    return cast(Tensor, tensor).float()


def read_json(path: Path) -> dict[str, Any]:
    """A configuration. Raises StoreError if it is missing or no JSON object."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {type(error).__name__}") from error
    refuse(not isinstance(config, dict), path.parent, f"a {path.name} that is no object", "one")
    return dict(config)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors. Raises StoreError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read as safetensors: {type(error).__name__}") from error
