"""What model.path= names: a folder of this machine, the embedded model, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from residual_saes.data.errors import SettingError

EMBEDDED = "embedded"  # model.path of the model that ships with the package


def is_local(path: str) -> bool:
    """Whether `path` names a folder of this machine, or the embedded model.

    Raises:
        SettingError: it is neither that nor a hub id.
    """
    if path == EMBEDDED or os.path.isdir(path):
        return True
    if os.path.isfile(path):
        raise SettingError(
            f"model.path={path} is a file; give the folder that holds it, "
            f"as model.path={Path(path).parent}"
        )
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise SettingError(
            f"model.path={path} is no folder; give a Hugging Face model folder or a hub id, as "
            "openai-community/gpt2"
        )
    return False
