"""Which safetensors files of a model's folder or repository hold the text decoder's weights."""

from __future__ import annotations

import re
from pathlib import Path

from residual_saes.data.errors import SettingError
from residual_saes.data.foreign import json_object, reading

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights of what sees or hears, by the first parts of their names. What is not known to be of a
# tower counts as the decoder's.
_TOWER = re.compile(
    r"(?:model\.)?(?:\w*(?:vision|visual|audio|image|speech)\w*|mm_projector|multi_modal_projector)\."
)


def is_tower(weight: str) -> bool:
    """Whether a weight of this name belongs to a vision or audio tower."""
    return _TOWER.match(weight) is not None


def shards(index: Path) -> list[str]:
    """The files that an index names, without those that hold towers' weights alone.

    Raises:
        SettingError: it is no index of shards.
    """
    way_out = "download it again"
    whole = json_object(index, way_out, SettingError)
    with reading(f"{index} is no index of shards", way_out, SettingError):
        weight_map: dict[str, str] = whole["weight_map"]
        # A name is a plain one: an index from the network must not lead out of its folder.
        names = {Path(file).name for weight, file in weight_map.items() if not is_tower(weight)}
    return sorted(names)


def needed(folder: Path) -> list[str]:
    """The names of a model's weight files: the single file, or the shards of its index.

    Args:
        folder: has the index, if there is one.
    """
    index = folder / INDEX
    return shards(index) if index.is_file() and not (folder / SINGLE).is_file() else [SINGLE]


def present(folder: Path) -> list[Path]:
    """A model's weight files.

    Raises:
        SettingError: one is not there.
    """
    files = [folder / name for name in needed(folder)]
    for file in files:
        if not file.is_file():
            raise SettingError(
                f"{folder} has no {file.name}; its weights must be complete, and in the "
                "safetensors format"
            )
    return files
