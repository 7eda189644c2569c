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
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from residual_saes.data.errors import PipelineError, StoreError
from residual_saes.data.foreign import json_object, reading, require_file
from residual_saes.data.site import HookPoint
from residual_saes.data.store import manifest
from residual_saes.data.store.place import place_of
from residual_saes.train import export
from residual_saes.train.export import bundle
from residual_saes.train.export.origin import Origin
from residual_saes.train.ports import Port, Ports, recorded_ports
from residual_saes.train.run import CONFIG
from residual_saes.train.sae import SAE, WEIGHTS
from residual_saes.train.tensors import any_tensor_of, refuse, refuse_shape, shown, tensor_of

_WAY_OUT = "restore or download it again"
# Modules here that are no library.
_OTHERS = {
    *("__main__", "bundle", "command", "crosscoder", "format", "golden", "hooks", "hub"),
    *("loading", "origin", "readers"),
}


class About(NamedTuple):
    """What an SAE was trained on, for those who use it."""

    model: str  # hub id or folder name
    ports: Ports  # what it reads and writes
    context: int  # tokens
    text: str
    architecture: str | None = None  # the model's class in transformers; None: not recorded
    # By the names of the ports: what rows were multiplied by in training, of a crosscoder
    scales: Mapping[str, float] | None = None
    second: str | None = None  # the model of the second store, if there is one that is known
    widths: tuple[int | None, ...] = (None,)  # of each store's rows; None: not known

    @property
    def point(self) -> HookPoint:
        """What it reads first, which is all but for a crosscoder."""
        return self.ports.reads[0].point

    @property
    def target(self) -> HookPoint:
        """What it writes first, which is all but for a crosscoder."""
        return self.ports.writes[0].point

    @property
    def layer(self) -> int:
        """Of `point`."""
        return self.point.layer

    def widths_of(self, side: Sequence[Port], total: int) -> list[int]:
        """The columns of each of some ports, which have `total` in all; the same, if not known."""
        known = [
            self.widths[port.store] if port.store < len(self.widths) else None for port in side
        ]
        return [width or total // len(side) for width in known]

    @property
    def kind(self) -> str:
        """One of train.ports.KINDS."""
        if len(self.ports.reads) > 1:
            return "crosscoder"
        return "sae" if self.ports.is_autoencoder else "transcoder"


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
    with reading(f"{run / CONFIG} is not what training wrote", "restore it"):
        ports = recorded_ports(config["settings"])
    stores = config.get("store_paths", [config.get("store_path")])
    models = [_model_of(place) for place in stores]
    return About(
        source["model"],
        ports,
        source["context"],
        source["text"],
        source.get("architecture") or models[0].get("architecture"),
        config.get("scales"),
        models[1].get("id") if len(models) > 1 else None,
        tuple(model.get("d_model") for model in models),
    )


def _model_of(place: Any) -> Mapping[str, Any]:
    """What a store has of its model; nothing if the store is elsewhere."""
    folder = Path(str(place))
    if not place or not folder.is_dir():
        return {}
    try:
        return dict(manifest.read(place_of(str(folder)))["model"])
    except PipelineError:
        return {}


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
    return cast("Format", import_module(f"residual_saes.train.export.{name}"))


def read(name: str, path: Path) -> SAE:
    """The SAE in a library's files in a folder, every byte as it was written if we wrote them.

    Raises:
        StoreError: a file is damaged, or as `Format.read`.
    """
    if (path / name).is_dir():
        raise StoreError(f"{path} has the SAE in a folder of it; give {name}:{path / name}")
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


def require_kind(about: About, kinds: Collection[str], name: str, others: str) -> None:
    """Raise StoreError if the dictionary is of another kind than a library has.

    Args:
        name: the library's.
        others: the formats that take it, as `to=safetensors`.
    """
    if about.kind not in kinds:
        raise StoreError(f"{name} has no {about.kind}; {others} takes it")


def require_one_width(sae: SAE, name: str) -> None:
    """Raise StoreError if it reads rows of another width than it writes."""
    if sae.d_model != sae.d_out:
        raise StoreError(
            f"{name} has one width, and this SAE reads {sae.d_model} and writes {sae.d_out}; "
            "to=safetensors takes it"
        )


def without_b_in(sae: SAE) -> SAE:
    """The same function with a b_in of 0: nothing is subtracted from the row.

    b_enc becomes b_enc - b_in W_enc, and b_dec becomes b_dec - b_in W_skip.
    """
    b_in = (sae.b_dec if sae.b_in is None else sae.b_in).double()
    b_enc = sae.b_enc.double() - sae.encoder.double() @ b_in
    b_dec = sae.b_dec.double()
    if sae.W_skip is not None:
        b_dec = b_dec - b_in @ sae.W_skip.double()
    zero = torch.zeros_like(b_in, dtype=sae.b_enc.dtype)
    return replace(sae, b_enc=b_enc.to(zero.dtype), b_dec=b_dec.to(zero.dtype), b_in=zero)


class Weights(NamedTuple):
    """The tensors that every kind of SAE has, float32."""

    W_enc: Tensor  # (d, F)
    W_dec: Tensor  # (F, d_out)
    b_enc: Tensor  # (F,)
    b_dec: Tensor  # (d_out,)
    b_in: Tensor | None = None  # (d,) of a transcoder
    W_skip: Tensor | None = None  # (d, d_out)

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any],
        folder: Path,
        names: Sequence[str] = WEIGHTS,
        transposed: Collection[str] = (),
        *,
        transcoder: bool = False,
    ) -> Weights:
        """The weights in a file.

        Args:
            names: the file's, in the order of the first four fields.
            transposed: of which the file has the transpose.
            transcoder: of one that subtracts nothing from the row. The libraries have the
                transpose of its W_skip.

        Raises:
            StoreError: one is missing, unfit (`tensor_of`), or of another shape than the biases
                say.
        """
        tensors = [tensor_of(state, name, folder) for name in names]
        d_out, d_sae = tensors[3].numel(), tensors[2].numel()
        d = d_out
        if transcoder:
            refuse(tensors[0].ndim != 2, folder, f"{names[0]} that is no matrix", "one that is")
            d = tensors[0].shape[1 if names[0] in transposed else 0]
        shapes = ((d, d_sae), (d_sae, d_out), (d_sae,), (d_out,))
        for number, name in enumerate(names):
            shape = shapes[number][::-1] if name in transposed else shapes[number]
            refuse_shape(name, tensors[number], shape, folder)
            if name in transposed:
                tensors[number] = tensors[number].T.contiguous()
        W_enc, W_dec, b_enc, b_dec = tensors
        if not transcoder:
            return cls(W_enc, W_dec, b_enc, b_dec)
        W_skip = None
        if "W_skip" in state:
            W_skip = any_tensor_of(state, "W_skip", folder)
            refuse_shape("W_skip", W_skip, (d_out, d), folder)
            W_skip = W_skip.T.contiguous()
        return cls(W_enc, W_dec, b_enc, b_dec, torch.zeros(d), W_skip)

    def on_whole_rows(self) -> Weights:
        """The same function, of an encoder that does not subtract b_dec from the row."""
        shift = self.b_dec.double() @ self.W_enc.double()
        return self._replace(b_enc=(self.b_enc.double() + shift).float())

    def sae(self, k: int, threshold: Tensor | None = None) -> SAE:
        """The SAE that has them."""
        return SAE.of(
            self.W_enc, self.W_dec, self.b_enc, self.b_dec, k, threshold, self.b_in, self.W_skip
        )


def topk(weights: Weights, k: int, folder: Path, *, by_norm: bool = False) -> SAE:
    """An SAE that keeps the k largest.

    Args:
        by_norm: largest by activation times the norm of the decoder's row.

    Raises:
        StoreError: there are fewer latents than k.
    """
    d_sae = len(weights.b_enc)
    refuse(not 1 <= k <= d_sae, folder, f"k={k}", f"1 to {d_sae}, its latents")
    sae = weights.sae(k)
    return sae.unit_decoder() if by_norm else sae


def thresholded(weights: Weights, threshold: Tensor) -> SAE:
    """An SAE that keeps what is above a threshold (F,) and above 0, ReLU's own.

    Its k is no part of its function.
    """
    return weights.sae(len(weights.b_enc), threshold.clamp_min(0)).unit_decoder()


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
    unknown = ", ".join(sorted(shown(name) for name in set(names) - set(known)))
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
