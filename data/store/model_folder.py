"""Where the folder of a store's model lies on this machine.

The manifest holds the folder's last name alone: a store may move, and its model too. This is a hint
beside it, which nothing depends on: whoever loads the model compares its digests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from residual_saes.data.store.place import Place

KEY = "commits/model_folder.txt"


def remember(place: Place, path: str) -> None:
    """Keep where the store's model was found, if that is a folder."""
    folder = Path(path)
    if folder.is_dir():
        where = str(folder.resolve()).encode()
        if not place.exists(KEY) or place.read(KEY) != where:
            place.write(KEY, [where])


def recalled(place: Place, manifest: dict[str, Any]) -> str:
    """The folder or hub id of a store's model: as recorded, or where it was when it was read."""
    recorded = str(manifest["model"]["id"])
    if "/" in recorded or Path(recorded).is_dir() or not place.exists(KEY):
        return recorded
    kept = place.read(KEY).decode(errors="replace")
    return kept if Path(kept).is_dir() else recorded
