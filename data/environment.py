"""What bits depend on besides the settings: libraries, device and threads.

A harvest records it in the store's manifest, a training run in its config.yaml. Both compare it
when they go on, so no key and no value may change.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch


def of_harvest(device: torch.device) -> dict[str, Any]:
    """What a harvest's bits depend on."""
    libraries = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": np.__version__,
    }
    if device.type == "cuda":
        return {**libraries, "device": torch.cuda.get_device_name(device)}
    return {**libraries, "device": "cpu", "threads": torch.get_num_threads()}


def of_training(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What a training run's bits depend on.

    Args:
        processes: of the run; recorded if there are several.
    """
    several = {"processes": processes} if processes > 1 else {}
    is_gpu = device.type == "cuda"
    return {
        **several,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
