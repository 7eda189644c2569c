"""The device that a stage computes on, and its free memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from residual_saes.data import rank
from residual_saes.data.errors import SettingError


def torch_device(name: str | None) -> torch.device:
    """The device asked for: cpu, cuda or cuda:N; None: the GPU if there is one.

    A GPU with a number becomes the current one of this thread. Else every process of a node would
    open a context on GPU 0 beside its own, of some 500 MB.

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
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def own_device(name: str | None) -> torch.device:
    """Like `torch_device`; None: of the GPUs that are visible here, the one of the local rank.

    More ranks than GPUs share them. Some engines show each rank its own GPU alone, as number 0.
    """
    if name is None and torch.cuda.is_available():
        number = rank.local_rank()
        if number is not None:
            name = f"cuda:{number % torch.cuda.device_count()}"
    return torch_device(name)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device, of the host for a CPU; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable: +(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
