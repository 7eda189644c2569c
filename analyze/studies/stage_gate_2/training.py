"""A policy trained by GRPO, one arm of stage gate 2.

Rollouts are on the disk before the optimizer uses them (rollouts.py), and weights and optimizer in
a checkpoint every few steps. So a run that was stopped goes on from the last checkpoint, on the
rollouts that are there: no finished one is drawn again. On a CPU the weights are the same to the
last bit as those of a run that was not stopped.

The policy is trained in float32: bfloat16 would round most updates of a rate of 1e-6 away. With
study.lora= only adapters are trained, in float32, beside weights in the model's own dtype. The
untrained model reads rewards and is the KL's reference. So two models are in memory.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residual_saes.analyze.kept import read_lines
from residual_saes.analyze.questions.answering import asking_of, model_key, prompts_of
from residual_saes.analyze.questions.problems import Problem
from residual_saes.analyze.results import digest_of, seal
from residual_saes.analyze.studies.stage_gate_2.arms import Arm, Options, require_installed
from residual_saes.analyze.studies.stage_gate_2.rewards import Rewards
from residual_saes.analyze.studies.stage_gate_2.rollouts import Rollouts
from residual_saes.analyze.study import Study
from residual_saes.data import digests, durable, sealed
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress
from residual_saes.harvest import model as models
from residual_saes.harvest.model import LanguageModel

VERSION = 1  # raise it when the same settings train another policy
_POLICY = "policy.safetensors"
_CURVE = "curve.jsonl"
_STEPS = "steps"
_CHECKPOINTS = "checkpoints"
_AGAIN = "the policy is trained from an earlier checkpoint"


class Trained(NamedTuple):
    """A policy on the disk."""

    arm: Arm
    folder: Path
    # A line for each step: {step, rollouts, outcome, reward, feature, z, length, repetition,
    # finished, still, kl, gradient_norm}.
    curve: list[dict[str, Any]]


def trained(
    study: Study,
    arm: Arm,
    options: Options,
    rewards: Rewards,
    problems: Sequence[Problem],
    stop: StopRequest,
) -> Trained:
    """The arm's policy after its last step; trained once, and kept.

    Args:
        problems: that rollouts answer; none that judges.

    Raises:
        SettingError: TRL is not installed, or a prompt leaves no room for an answer.
    """
    require_installed(options)
    asking = asking_of(study)
    names = ("steps", "batch", "rollouts", "beta", "lora", "together")
    key = {
        "version": VERSION,
        **model_key(study),
        "arm": arm._asdict(),
        "weight": arm.weight(options),
        "options": {name: getattr(options, name) for name in names},
        "answers": {**asking.record(), "temperature": asking.temperature},
        "problems": digest_of({"problems": [problem.record() for problem in problems]}),
        "rewards": rewards.follows,
    }

    def fill(folder: Path) -> None:
        if not ((folder / _POLICY).exists() and sealed.read(folder / _CURVE)):
            prompts = prompts_of(study, problems, asking)
            steps = folder / _STEPS
            about = (arm, options, asking, rewards, problems, prompts, steps, stop)
            _train(study, Rollouts(*about), folder)
        shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)

    folder = study.kept("stage_gate_2_training", key, fill)
    return Trained(arm, folder, read_lines(folder / _CURVE))


def policy(study: Study, done: Trained) -> LanguageModel:
    """The trained policy, whole, with its head: in float32, or with its adapters in float32."""
    from safetensors.torch import load_file

    weights = load_file(done.folder / _POLICY)
    adapters = [weight for name, weight in weights.items() if ".lora_A." in name]
    lm, _ = _fresh(study, len(adapters[0]) if adapters else None)
    parameters = dict(lm.causal.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    lm.causal.requires_grad_(False)
    lm.identity["weights"] = durable.digest_file(done.folder / _POLICY).xxh3_128
    return lm


def _fresh(study: Study, lora: int | None) -> tuple[LanguageModel, Any]:
    """The untrained model, of which weights or adapters can be trained, and what TRL trains.

    Args:
        lora: rank of the adapters; None: all weights are trained.
    """
    config = study.model if lora else replace(study.model, dtype="float32")
    lm = models.load(config, head=True)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)  # adapters begin as 0, by two factors of which one is random
        shape = LoraConfig(r=lora, lora_alpha=lora, target_modules="all-linear")
        with _quiet():
            return lm, get_peft_model(lm.causal, shape)
    for parameter in lm.causal.parameters():
        parameter.data = parameter.data.clone()  # on a CPU, else, the model's file is mapped there
    return lm, lm.causal.requires_grad_(True)


def _train(study: Study, rollouts: Rollouts, folder: Path) -> None:
    """Train to the last step, from wherever it stands; write policy and curve."""
    arm, options, stop = rollouts.arm, rollouts.options, rollouts.stop
    lm, trains = _fresh(study, options.lora)
    progress = Progress()
    with _quiet():
        # Only here: it needs TRL, an extra, whose import takes seconds.
        trainers = import_module("residual_saes.analyze.studies.stage_gate_2.trainer")

        def inputs(step: int) -> dict[str, Tensor]:
            lm.causal.eval()  # else a model that saves memory by checkpoints has no cache
            with trainer.accelerator.autocast():
                own = rollouts.of(step, lm)
            trains.train()
            figures = rollouts.figures(step, own)
            line = f"step {step + 1}/{options.steps} | {figures['outcome']:.0%} right"
            progress.show(
                f"{line}, features {figures['feature']:.3g}", last=step + 1 == options.steps
            )
            return rollouts.inputs(own)

        checkpoints = folder / _CHECKPOINTS
        told = trainers.config(
            checkpoints, arm, options, rollouts.asking.temperature, study.model.device
        )
        trainer = trainers.Trainer(trains, lm.tokenizer.inner, told, inputs)
        trainer.add_callback(trainers.Stopping(stop.check, lambda made: seal(made, {}) and None))
        last = _last(checkpoints)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    _write(folder, lm, rollouts, trainer.state.log_history)


def _last(checkpoints: Path) -> Path | None:
    """The last checkpoint that is whole; later ones are removed."""
    there = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(there):
        recorded = digests.sound(path, _AGAIN)
        if recorded and not any(recorded.faults()):
            return path
        shutil.rmtree(path)
    return None


def _write(
    folder: Path, lm: LanguageModel, rollouts: Rollouts, logged: Sequence[dict[str, Any]]
) -> None:
    """The files of a trained policy.

    Args:
        logged: what the trainer measured in each step.
    """
    from safetensors.torch import save

    trains = (item for item in lm.causal.named_parameters() if item[1].requires_grad)
    weights = {name: weight.detach().contiguous().cpu() for name, weight in trains}
    durable.write(folder / _POLICY, [save(weights)])
    measured = {line["step"] - 1: line for line in logged if "kl" in line or "grad_norm" in line}
    lines = []
    for step in range(rollouts.options.steps):
        own = rollouts.figures(step, rollouts.of(step, lm))
        of_step = measured[step]
        own |= {"kl": of_step.get("kl", 0.0), "gradient_norm": of_step["grad_norm"]}
        lines.append(json.dumps(own) + "\n")
    sealed.write(folder / _CURVE, ["".join(lines).encode()])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and TRL say while they train."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
