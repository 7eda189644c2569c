"""The arms of stage gate 2: which policies are trained, each with its own reward.

    R0  outcome                               R3  outcome + weight * z(random latents)
    R1  outcome + weight * z(features)        R4  z(features)
    R2  outcome + weight * z(raw direction)

The outcome is 1 for a right answer and 0 for a wrong one. z is in rewards.py. `trajectory`: a
completion has one reward, as GRPO has it. `token`: what is added to the outcome is given to each
token for itself, as the reference's third gate has it. The outcome is known of a whole completion
alone, so R0 has no arm of tokens: the other arms of both levels stand beside the same R0.

Every arm has all learning rates and all seeds. The arms of a seed have the same questions in the
same order, and as many rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from typing import Any, NamedTuple

from residual_saes.analyze.questions.split import require_share
from residual_saes.analyze.study import at_least
from residual_saes.data.errors import SettingError
from residual_saes.data.settings import number

OUTCOME, FEATURES, DIRECTION, RANDOM, ALONE = REWARDS = ("R0", "R1", "R2", "R3", "R4")
TRAJECTORY, TOKEN = LEVELS = ("trajectory", "token")


@dataclass(frozen=True)
class Options:
    """The settings of conf/study/stage_gate_2.yaml."""

    rewards: Sequence[str] = REWARDS
    levels: Sequence[str] = LEVELS
    lr: Sequence[float] = (1e-6, 3e-6)
    seeds: int = 3
    steps: int = 100  # of the optimizer
    batch: int = 5  # questions a step
    rollouts: int = 4  # completions of a question
    weight: float = 0.1  # lambda, of what is added to the outcome
    beta: float = 0.05  # of the KL to the untrained model
    features: str | None = None  # file of them; by default what the run's stage gate chose
    lora: int | None = None  # rank of what is trained; by default all weights are
    together: int | None = None  # rollouts in one backward pass; by default those of a step
    checkpoint: int = 10  # optimizer steps between two
    processes: int = 1  # that train at a time, each a policy, with all in memory that one needs
    # What judges.
    discovery: float = 0.5  # share of the questions that train, where problems have no parts
    other: str | None = None  # problems of another kind: a .jsonl; None: see study.LEFT_OUT
    samples: int = 1  # answers to each question that judges, drawn; 1: the greedy one
    canaries: int = 100  # questions that are asked with a wrong hint too, and other problems
    text: int = 20_000  # held-out tokens at most, in whole pieces

    def __post_init__(self) -> None:
        for name, known in (("rewards", REWARDS), ("levels", LEVELS)):
            _require_some(name, getattr(self, name), known)
        _require_rates(self.lr)
        require_share(self.discovery)
        least = {
            "seeds": 1,
            "steps": 1,
            "batch": 1,
            "rollouts": 2,
            "samples": 1,
            "processes": 1,
            "canaries": 2,
            "text": 2,
        }
        for name, value in least.items():
            at_least(f"study.{name}", getattr(self, name), value)
        for name in ("lora", "together", "checkpoint"):
            if (value := getattr(self, name)) is not None:
                at_least(f"study.{name}", value, 1)
        for name in ("weight", "beta"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise SettingError(f"study.{name}={value} must be a number from 0 on, such as 0.1")
        if self.together and self.of_step % self.together:
            raise SettingError(
                f"study.together={self.together} must divide the {self.of_step} rollouts of a step "
                f"(study.batch={self.batch} times study.rollouts={self.rollouts})"
            )

    @property
    def of_step(self) -> int:
        """Rollouts of an optimizer step."""
        return self.batch * self.rollouts


class Arm(NamedTuple):
    """A policy that is trained."""

    reward: str  # one of REWARDS
    level: str  # one of LEVELS
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """As files and tables name it: `R1-token-lr3e-06-seed0`."""
        return f"{self.reward}-{self.level}-lr{self.lr:g}-seed{self.seed}"

    def weight(self, options: Options) -> float:
        """Of what is added to the outcome."""
        return {OUTCOME: 0.0, ALONE: 1.0}.get(self.reward, options.weight)


def arms(options: Options) -> list[Arm]:
    """All arms, a seed after the other, so that a stopped table has whole seeds."""
    found = []
    for seed in range(options.seeds):
        for lr in options.lr:
            for reward in options.rewards:
                levels = (TRAJECTORY,) if reward == OUTCOME else options.levels
                found += [Arm(reward, level, float(lr), seed) for level in levels]
    return found


def require_installed(options: Options) -> None:
    """Raise SettingError unless the libraries are there that train these arms."""
    if find_spec("trl") is None:
        raise SettingError(
            "study=stage_gate_2 trains by TRL, and trl is not installed; run pip install "
            "'trl>=1.16,<2'"
        )
    if options.lora and find_spec("peft") is None:
        raise SettingError(
            f"study.lora={options.lora} needs peft, which is not installed; run pip install peft"
        )


def _require_some(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise SettingError unless a value is a list of different names among `known`."""
    listed = isinstance(value, list | tuple) and len(value) > 0
    if not listed or not set(value) <= set(known) or len(set(value)) < len(value):
        raise SettingError(
            f"study.{name}={value} must be a list of different ones of {', '.join(known)}, such as "
            f"[{','.join(known[:2])}]"
        )


def _require_rates(rates: Any) -> None:
    """Raise SettingError unless `rates` are different learning rates."""
    if not isinstance(rates, list | tuple):
        raise SettingError(f"study.lr={rates} must be a list, such as [1e-6,3e-6]")
    values = [number("study.lr", rate) for rate in rates]
    usable = all(isfinite(value) and value > 0 for value in values)
    if not values or not usable or len(set(values)) < len(values):
        raise SettingError(
            f"study.lr={list(rates)} must be different numbers above 0, such as [1e-6,3e-6]"
        )
