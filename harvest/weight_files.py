"""Which safetensors files of a model's folder or repository hold the text decoder's weights."""

from __future__ import annotations

import json
from pathlib import Path

from data.errors import SettingError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        SettingError: it is no index of shards.
    """
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        # A name is a plain one: an index from the network must not lead out of its folder.
        names = {Path(file).name for file in weight_map.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"{index} is no index of shards; download it again") from error
    return sorted(names)
