"""What training says of a run before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from residual_saes.data import rank
from residual_saes.data.journal import size, tell, tell_header
from residual_saes.train.arm import Arm
from residual_saes.train.columns import widths_of
from residual_saes.train.memory import arm_bytes
from residual_saes.train.trainer import Trainer


def tell_run(arm: Arm, trainer: Trainer, step: int) -> None:
    """Tell of one run, alone, that it begins, or goes on at a step from 1 on."""
    config = arm.config
    tokens = trainer.steps * config.batch
    lines = {
        **_of_store([arm]),
        "sae": _dictionary(arm),
        "tokens": f"{tokens:,} in {trainer.steps:,} steps of {config.batch:,}",
        "lr": _rate(arm, trainer),
        "device": _device(trainer.device, config.matmul),
        "run": str(arm.folder),
    }
    if step:
        lines["goes on"] = _place(trainer, step)
    tell_header(lines)


def tell_arm(arm: Arm, trainer: Trainer, step: int) -> None:
    """Tell of an arm of a sweep what its header does not."""
    if arm.config.optim.lr == "auto":
        tell(f"{arm.folder}: lr {_rate(arm, trainer)}")
    if step:
        tell(f"{arm.folder} goes on {_place(trainer, step)}")


def tell_sweep(arms: Sequence[Arm], reads: str, where: torch.device) -> None:
    """Tell what a sweep is about to do.

    Args:
        reads: how many arms are trained together.
    """
    dictionaries = dict.fromkeys(map(_dictionary, arms))
    folders = dict.fromkeys(str(arm.folder.parent) for arm in arms)
    states = sorted(map(arm_bytes, arms))
    most = f" to {size(states[-1])}" if states[-1] > states[0] else ""
    tell_header(
        {
            **_of_store(arms),
            "sae": "; ".join(dictionaries),
            "arms": reads,
            "memory": f"{size(states[0])}{most} of state an arm",
            "device": _device(where, arms[0].config.matmul),
            "runs": ", ".join(folders),
        }
    )


def _rate(arm: Arm, trainer: Trainer) -> str:
    rate = f"{float(trainer.optim.lr):.3g}"
    if arm.config.optim.lr != "auto":
        return rate
    return f"{rate}: optim.lr=auto for {arm.config.sae.d_sae:,} latents and {trainer.steps:,} steps"


def _place(trainer: Trainer, step: int) -> str:
    return f"at step {step:,} of {trainer.steps:,}"


def _device(where: torch.device, matmul: str) -> str:
    """A device by its name, and what its products are taken in."""
    name = f" ({torch.cuda.get_device_name(where)})" if where.type == "cuda" else ""
    world = rank.processes().world
    processes = f", {world} processes" if world > 1 else ""
    return f"{where}{name}{processes}, matmul {matmul}"


def _of_store(arms: Sequence[Arm]) -> dict[str, str]:
    """Model, hook points and stores of all arms."""
    lines: dict[str, list[Any]] = {"model": [], "read": [], "store": []}
    for arm in arms:
        facts = arm.facts
        lines["model"].append(facts.get("source", {}).get("model"))
        ports = arm.config.ports
        read = ", ".join(map(str, ports.reads))
        writes = "" if ports.writes == ports.reads else f", to {', '.join(map(str, ports.writes))}"
        lines["read"].append(f"{read}{writes}")
        lines["store"].extend(facts.get("store_paths") or [facts.get("store_path")])
    told = {name: dict.fromkeys(map(str, filter(None, values))) for name, values in lines.items()}
    return {name: "; ".join(values) for name, values in told.items() if values}


def _dictionary(arm: Arm) -> str:
    sae = arm.config.sae
    width, _ = widths_of(arm.config.ports, arm.stream.reader)
    kind = "" if sae.kind == "sae" else f"{sae.kind} of "
    return (
        f"{kind}{sae.d_sae:,} latents ({sae.d_sae / width:.3g} times d_model {width:,}), "
        f"k {sae.k}, {sae.activation}"
    )
