"""A small run that uses every part of the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from residual_saes.train.arm import Arm
from residual_saes.train.loop import train
from residual_saes.train.optim import OptimConfig
from residual_saes.train.run import CHECKPOINTS, METRICS
from residual_saes.train.sae import SAEConfig
from residual_saes.train.trainer import TrainConfig
from tests.train.planted import Planted, planted_stream

STEPS, BATCH = 20, 16
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
