"""Settings as people write them on a command line, made exact."""

from __future__ import annotations

from typing import Any

import torch

from data.errors import SettingError


def whole(name: str, value: Any) -> int:
    """`value` as an integer: 1e9 arrives as a float and is one; 1e9.5 arrives as text, 0.5 is no whole number.

    Raises:
        SettingError: it is not a whole number.
    """
    exact = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if exact and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise SettingError(f"{name}={value} is too large; its size must be below 2^63")
        return int(value)
    raise SettingError(f"{name}={value} must be a whole number, such as 21, 200000 or 2e5")


def flag(name: str, value: Any) -> bool:
    """`value` if it is true or false; any other word would be taken for true.

    Raises:
        SettingError: it is neither.
    """
    if not isinstance(value, bool):
        raise SettingError(f"{name}={value} must be true or false")
    return value


def optional_whole(name: str, value: Any) -> int | None:
    """Like `whole`, with None for a setting that is left open."""
    return None if value is None else whole(name, value)


def torch_device(name: str | None) -> torch.device:
    """The device asked for: cpu, cuda or cuda:N; None is the GPU if there is one.

    Raises:
        SettingError: there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise SettingError(f"device={name} must be cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device={name} must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise SettingError(f"device={name} needs a CUDA GPU, and torch sees {gpus}; use device=cpu")
    return device
