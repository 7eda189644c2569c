"""Values that are refused before a command's libraries load, which takes seconds.

The code that uses a value checks it too: it is called from Python as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import exists
from typing import Any

from residual_saes.conf.meant import near
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.model_path import is_local
from residual_saes.data.settings import whole

# Settings of a command that take one of a few words.
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "harvest": {
        "action": ("run", "plan", "status", "verify", "repair", "thin"),
        "oom": ("stop", "halve"),
        "attention": ("auto", "sdpa", "flash", "flex"),
        "text.bad": ("stop", "skip"),
        "model.dtype": ("bfloat16", "float32"),
    },
    "train": {"train.matmul": ("fp32", "tf32", "bf16")},
    "analyze": {"action": ("run", "serve"), "answers.grading": ("strict", "flexible")},
}
# Whole numbers of harvest and train, with the least value.
LEAST = {"layer": 0, "tokens": 1, "context": 2, "batch": 1, "unit": 1, "chunk": 1, "readers": 1}


def require_right(command: str, values: Mapping[str, Any]) -> None:
    """Check words, whole numbers, the device and paths, as far as needs no library.

    Args:
        values: settings by their dotted names.

    Raises:
        SettingError: names the first wrong one, with what was meant if that is clear.
        StoreError: there is no such run.
    """
    for name, words in CHOICES.get(command, {}).items():
        if (value := values.get(name)) is not None and value not in words:
            meant = near(str(value), dict.fromkeys(words))
            hint = f"; did you mean {name}={meant}?" if meant else ""
            raise SettingError(f"{name}={value} must be one of {', '.join(words)}{hint}")
    for name in LEAST if command in ("harvest", "train") else ():
        value = values.get(name)
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                _require_least(name, item)
    device = values.get("device")
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        hint = "; did you mean device=cuda?" if str(device).lower() == "gpu" else ""
        raise SettingError(f"device={device} must be cpu, cuda or cuda:N{hint}")
    if command == "harvest" and values.get("action") in ("run", "plan"):
        _require_there(values)
    if command == "analyze":
        _require_run(values)


def _require_least(name: str, value: Any) -> None:
    if name == "layer" and str(value).lower() in ("middle", "mid", "auto"):
        raise SettingError(f"layer={value} must be a number; without layer= it is the middle one")
    if (number := whole(name, value)) < LEAST[name]:
        counted = "; layers are counted from 0 at the input" if name == "layer" else ""
        raise SettingError(f"{name}={number} must be at least {LEAST[name]}{counted}")


def _require_there(values: Mapping[str, Any]) -> None:
    """The model's folder and the text."""
    if values.get("model.path") is not None:
        is_local(str(values["model.path"]))
    text = values.get("text.path")
    if text is not None and not exists(text):
        raise SettingError(f"text.path={text} does not exist; give a file or folder of text")


def _require_run(values: Mapping[str, Any]) -> None:
    """A run to look at; runs= and studies that need none are left to the command."""
    run = values.get("run")
    if run is not None and ":" not in str(run) and not exists(run):
        raise StoreError(
            f"no run at {run}; train one with `python -m train store=... run={run}`, or leave "
            "run= out for the newest one under runs/"
        )
