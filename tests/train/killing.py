"""A small run that uses every part of the state, and ways to kill it."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.train.planted import Planted, planted_stream
from train.arm import Arm
from train.loop import train
from train.optim import OptimConfig
from train.run import CHECKPOINTS, METRICS
from train.sae import SAEConfig
from train.trainer import TrainConfig

STEPS, BATCH = 20, 16
SYSTEM_CALLS = ("fsync", "replace", "link", "unlink")
CPU = torch.device("cpu")


def config(**changes: Any) -> TrainConfig:
    """20 steps with deaths, AuxK, projections, logging, evaluations and checkpoints out of step
    with one another.
    """
    small = SAEConfig(
        d_sae=48, k=2, aux_coef=0.5, k_aux=8, aux_norm="variance", dead_after=3 * BATCH
    )
    rates = OptimConfig(lr=0.02, lr_floor=0.002, project_every=3)
    fixed: dict[str, Any] = {
        "log_every": 3,
        "eval_every": 7,
        "eval_rows": 100,
        "checkpoint_every": 4,
    }
    settings = {
        "layer": 0,
        "tokens": STEPS * BATCH,
        "batch": BATCH,
        **fixed,
        "sae": small,
        "optim": rates,
    }
    return TrainConfig(**{**settings, **changes})


def planted(**changes: Any) -> Planted:
    return Planted(**{"d": 8, "latents": 12, "batch": BATCH, "rows": 1000, **changes})


def run(folder: Path, reader: Planted | None = None, **changes: Any) -> dict[str, Any]:
    """Train the small run in `folder`, or go on with it."""
    return train(Arm(config(**changes), planted_stream(reader or planted()), folder), CPU)


def bits(folder: Path) -> dict[str, bytes]:
    """All that must be equal: the exported file, the last checkpoint (weights, Adam, counters) and
    the metrics.
    """
    newest = max((folder / CHECKPOINTS).glob("*.safetensors"))
    return {
        path.name: path.read_bytes() for path in (folder / "sae_final.pt", newest, folder / METRICS)
    }


def in_child(body: Callable[[], object]) -> int:
    """Start `body` in a forked child; its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # 3.12 warns of threads; none runs at this point
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        body()
        code = 0
    finally:
        os._exit(code)


def outcome(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def armed(at: int, body: Callable[[], object]) -> Callable[[], object]:
    """`body`, killed around its `at`-th system call that makes something last: even before it, odd
    after it.
    """

    def arm() -> None:
        calls = iter(range(10**9))
        for name in SYSTEM_CALLS:
            setattr(os, name, _killer(getattr(os, name), calls, at))
        body()

    return arm


def _killer(call: Callable[..., Any], calls: Any, at: int) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        if 2 * number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args, **kwargs)
        finally:  # also after a call that failed, as unlinking what is not there
            if 2 * number + 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


def kill_after(seconds: float, body: Callable[[], object]) -> int:
    """Start `body` in a child, kill it that much later; its outcome."""
    child = in_child(body)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return outcome(child)
