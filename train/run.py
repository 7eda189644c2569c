"""A run's directory: its settings, its lock, and where a stopped run goes on."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from data import durable
from data.errors import MismatchError, StoreError, differences

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoint"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run directory, which is created if need be, for this process alone. The lock dies with the process."""
    durable.make_directory(run / CHECKPOINTS)
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(f"another process is training in {run}; wait for it, or choose another run=") from error
    else:
        durable.sweep(run)
        yield
    finally:
        os.close(handle)


def environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on besides its settings."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def agree(run: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Write config.yaml in a new run; in an old one, compare with it. Lines to tell the user.

    Args:
        settings: must be the same whenever the run goes on.
        facts: written beside them for the reader.
        here: the environment; a change of it is told, since the bits may change with it.

    Raises:
        MismatchError: the run was started with other settings.
    """
    path = run / CONFIG
    if not path.exists():
        whole = {"settings": settings, **facts, "environment": here}
        durable.write(path, [yaml.safe_dump(whole, sort_keys=False).encode()])
        return []
    try:
        recorded = yaml.safe_load(path.read_bytes())
        old, there = recorded["settings"], recorded["environment"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not what training wrote; restore it, or choose another run=") from error
    if unequal := differences(old, settings):
        raise MismatchError(f"run {run}", unequal, "Use those settings to go on, or another run=.")
    return [
        f"{key} was {was!r} and is now {now!r}: the run goes on, but its bits may differ from an undisturbed run's"
        for key, (was, now) in differences(there, here).items()
    ]


def tell(line: str) -> None:
    """One line to the user, beside the progress line."""
    print(line, file=sys.stderr, flush=True)
