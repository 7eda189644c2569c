"""What a model's weight files hold, by their headers: no weight is read or downloaded.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.data.errors import SettingError
from residual_saes.data.foreign import reading
from residual_saes.data.model_path import is_local
from residual_saes.harvest.hub_model import asked_of_hub
from residual_saes.harvest.weight_files import INDEX, SINGLE, is_tower, needed

# As the file format names the types that decoders are trained and published in.
_PLAIN = ("F64", "F32", "F16", "BF16")
_SAME = {"float32": "F32", "bfloat16": "BF16"}
# Least share of the decoder's numbers that files hold. What exactly is missing tells the loading,
# which knows every family's names; here a part of a download is told from a model.
_LEAST = 0.9
_REPEATED = 64  # layers without weights of their own


class Entry(NamedTuple):
    """A weight in a file."""

    name: str
    dtype: str  # as the format names it
    numbers: int


class Stored(NamedTuple):
    """What files hold of a text decoder and its head."""

    numbers: Mapping[str, int]  # by the data type, as the format names it
    weights: int  # tensors

    @property
    def total(self) -> int:
        return sum(self.numbers.values())

    def other_share(self, dtype: str) -> float:
        """Share of the numbers that are of another type than `dtype`, as torch names it."""
        return 1 - self.numbers.get(_SAME[dtype], 0) / self.total if self.total else 0.0


def stored(path: str, folder: Path) -> Stored:
    """What the files of a model hold of its text decoder.

    Args:
        path: folder, hub id or `embedded`.
        folder: what `harvest.hub_model.described` gave for it.

    Raises:
        SettingError: there are no weights, or a header cannot be read.
    """
    numbers: dict[str, int] = {}
    weights = 0
    for entry in _entries(path, folder):
        if not is_tower(entry.name):
            numbers[entry.dtype] = numbers.get(entry.dtype, 0) + entry.numbers
            weights += 1
    return Stored(numbers, weights)


def require_layers(files: Stored, text: Any, path: str) -> None:
    """Raise SettingError for more layers than files can hold, before they are built.

    Args:
        text: the decoder's configuration.
    """
    layers = getattr(text, "num_hidden_layers", None) or 0
    # Some families run a layer several times.
    if layers > files.weights + _REPEATED:
        raise SettingError(
            f"model.path={path} has {layers:,} layers by its config.json, and {files.weights:,} "
            "weights in its files; download or copy it again"
        )


def require_usable(files: Stored, wanted: int, path: str) -> None:
    """Check that the files can hold the weights of a decoder that is not declared as quantised.

    Args:
        wanted: numbers in the decoder's parameters.

    Raises:
        SettingError: the weights are of types that nothing declares, or a good part is missing.
    """
    odd = {dtype: count for dtype, count in files.numbers.items() if dtype not in _PLAIN}
    if sum(odd.values()) > files.total / 2:
        raise SettingError(
            f"model.path={path} stores its weights as {', '.join(sorted(odd))}, and its "
            "config.json has no quantization_config to read them by; take the model that it was "
            "made from, in bfloat16 or float32"
        )
    if files.total < _LEAST * wanted:
        raise SettingError(
            f"model.path={path} holds {files.total:,} of the {wanted:,} numbers of its decoder; it "
            "is incomplete: download or copy it again"
        )


def _entries(path: str, folder: Path) -> Iterator[Entry]:
    """Every weight of a model's files."""
    names = needed(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        for name in names:
            yield from _in_file(folder / name)
    elif is_local(path):
        raise SettingError(
            f"model.path={path} lacks {missing[0]}; a model's folder holds {SINGLE}, or {INDEX} "
            "and the files that it names"
        )
    else:
        yield from _on_hub(path, folder.name)


def _in_file(file: Path) -> Iterator[Entry]:
    from safetensors import safe_open

    way_out = "copy or download it again"
    with reading(f"{file} is damaged", way_out, SettingError), safe_open(file, "numpy") as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            weight = opened.get_slice(name)
            yield Entry(name, weight.get_dtype(), prod(weight.get_shape()))


def _on_hub(path: str, commit: str) -> Iterator[Entry]:
    """The headers come by range requests: 100 kB of each file."""
    from huggingface_hub import HfApi

    metadata = asked_of_hub(path, lambda: HfApi().get_safetensors_metadata(path, revision=commit))
    for part in metadata.files_metadata.values():
        for name, weight in part.tensors.items():
            yield Entry(name, weight.dtype, weight.parameter_count)
