"""Trained SAEs in the files of other libraries, and theirs as ours.

A library is a file of this folder with three functions, found by its name (to=NAME):

    write(sae, about)     contents by path below the export's folder
    read(folder)          the SAE in such files
    origin(folder)        the hook and the model that they say it is of

What our SAE computes is in train/sae.py. The others differ in small things. What can be folded into
the weights exactly is folded; the rest is refused. A key, a tensor or an activation that is not
known is refused by its name: it may change the function.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from data.errors import StoreError
from data.foreign import json_object, reading, require_file
from train import export
from train.export import bundle
from train.export.origin import Origin
from train.sae import SAE, WEIGHTS
from train.tensors import refuse, refuse_shape, shown, tensor_of

_WAY_OUT = "restore or download it again"
# Modules here that are no library.
_OTHERS = {"__main__", "bundle", "command", "format", "golden", "origin", "readers"}


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
        """The SAE in the library's files, checked by the golden rows beside them, if any.

        Raises:
            StoreError: they are missing, unreadable or damaged, or hold what our SAE cannot
                compute.
        """
        ...

    def origin(self, folder: Path) -> Origin:
        """What the library's files say of the place that the SAE is of.

        Raises:
            StoreError: they are missing or unreadable, or contradict themselves.
        """
        ...


def names() -> list[str]:
    """Libraries whose files can be written and read."""
    modules = [module.name for module in pkgutil.iter_modules(export.__path__)]
    return [name for name in modules if name not in _OTHERS]


def find(name: str) -> Format:
    """The format of one of `names`."""
    return cast("Format", import_module(f"train.export.{name}"))


def read(name: str, path: Path) -> SAE:
    """The SAE in a library's files in a folder, every byte as it was written if we wrote them.

    Raises:
        StoreError: a file is damaged, or as `Format.read`.
    """
    bundle.require_whole(path)
    return find(name).read(path)


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


class Weights(NamedTuple):
    """The tensors that every kind of SAE has, float32."""

    W_enc: Tensor  # (d, F)
    W_dec: Tensor  # (F, d)
    b_enc: Tensor  # (F,)
    b_dec: Tensor  # (d,)

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any],
        folder: Path,
        names: Sequence[str] = WEIGHTS,
        transposed: Collection[str] = (),
    ) -> Weights:
        """The weights in a file.

        Args:
            names: the file's, in the order of the fields.
            transposed: of which the file has the transpose.

        Raises:
            StoreError: one is missing, unfit (`tensor_of`), or of another shape than the biases
                say.
        """
        tensors = [tensor_of(state, name, folder) for name in names]
        d, d_sae = tensors[3].numel(), tensors[2].numel()
        shapes = ((d, d_sae), (d_sae, d), (d_sae,), (d,))
        for number, name in enumerate(names):
            shape = shapes[number][::-1] if name in transposed else shapes[number]
            refuse_shape(name, tensors[number], shape, folder)
            if name in transposed:
                tensors[number] = tensors[number].T.contiguous()
        return cls(*tensors)

    def on_whole_rows(self) -> Weights:
        """The same function, of an encoder that does not subtract b_dec from the row."""
        shift = self.b_dec.double() @ self.W_enc.double()
        return self._replace(b_enc=(self.b_enc.double() + shift).float())


def topk(weights: Weights, k: int, folder: Path, *, by_norm: bool = False) -> SAE:
    """An SAE that keeps the k largest.

    Args:
        by_norm: largest by activation times the norm of the decoder's row.

    Raises:
        StoreError: there are fewer latents than k.
    """
    d_sae = len(weights.b_enc)
    refuse(not 1 <= k <= d_sae, folder, f"k={k}", f"1 to {d_sae}, its latents")
    sae = SAE.of(*weights, k)
    return unit_decoder(sae) if by_norm else sae


def thresholded(weights: Weights, threshold: Tensor) -> SAE:
    """An SAE that keeps what is above a threshold (F,) and above 0, ReLU's own.

    Its k is no part of its function.
    """
    return unit_decoder(SAE.of(*weights, len(weights.b_enc), threshold.clamp_min(0)))


def ungated(weights: Weights, b_gate: Tensor, r_mag: Tensor) -> tuple[Weights, Tensor]:
    """The weights and the thresholds of a gated SAE (arXiv 2404.16014), which is one with such.

    With u = x W_enc, the gate is open where u + b_gate > 0, and the magnitude is
    z = exp(r_mag) u + b_mag. It is open where z > b_mag - exp(r_mag) b_gate.

    Args:
        weights: b_enc is b_mag.
    """
    growth = r_mag.exp()
    return weights._replace(W_enc=weights.W_enc * growth), weights.b_enc - growth * b_gate


def refuse_unknown(names: Iterable[str], known: Collection[str], folder: Path, what: str) -> None:
    """Raise StoreError if one of `names` is not known: it may change the function."""
    unknown = ", ".join(sorted(set(names) - set(known)))
    got = f"{what} {unknown}, which may change its function"
    refuse(bool(unknown), folder, got, "an SAE without")


def only(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], folder: Path) -> None:
    """Raise StoreError if a value is none of those `allowed` by its name.

    A missing one is allowed.
    """
    for name, values in allowed.items():
        got = config.get(name, values[0])
        said = str(got).lower() if isinstance(got, bool) else shown(got)
        words = " or ".join(json.dumps(value).strip('"') for value in values)
        refuse(got not in values, folder, f"{name}={said}", words)


def flag(config: Mapping[str, Any], name: str, default: bool, folder: Path) -> bool:
    """A value that is true or false. Raises StoreError: it is neither."""
    value = config.get(name, default)
    refuse(not isinstance(value, bool), folder, f"{name}={shown(value)}", "true or false")
    return bool(value)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration. Raises StoreError if it is missing or no JSON object."""
    return json_object(path, _WAY_OUT)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors. Raises StoreError if it is missing or damaged."""
    require_file(path, _WAY_OUT)
    with reading(f"{path} cannot be read as safetensors", _WAY_OUT):
        return load_file(path)
