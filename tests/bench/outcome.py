"""What every benchmark says beside its figures, and where it keeps them."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What figures depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def finish(shape: dict[str, Any], figures: dict[str, Any], out: Path | None) -> None:
    """Print the figures; keep them with date and machine in `out`, if it is given."""
    for name, value in {**shape, **figures}.items():
        print(f"{name:>24}  {value:,.3f}" if isinstance(value, float) else f"{name:>24}  {value}")
    if out:
        if paths := absolute_paths({**shape, **figures}):
            raise ValueError(f"a result names no path of a machine: {paths}; give the name alone")
        date = datetime.now(UTC).isoformat(timespec="seconds")
        out.write_text(
            json.dumps({"date": date, "machine": machine(), "shape": shape, **figures}, indent=1)
            + "\n"
        )


def absolute_paths(value: Any) -> list[str]:
    """The texts in a result, at any depth, that are an absolute path: they tell of one machine."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return [path for inner in value for path in absolute_paths(inner)]
    return [value] if isinstance(value, str) and value.startswith(("/", "~/", "file:")) else []
