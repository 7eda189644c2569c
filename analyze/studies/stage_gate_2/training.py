"""A policy trained by GRPO, one arm of stage gate 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analyze.problems import Problem
from analyze.studies.stage_gate_2.arms import Arm, Options
from analyze.studies.stage_gate_2.rewards import Rewards
from analyze.study import Study
from data.errors import StopRequest
from harvest.model import LanguageModel


class Trained(NamedTuple):
    """A policy on the disk."""

    arm: Arm
    folder: Path
    # A line for each step: {step, rollouts, outcome, reward, feature, z, kl, length, repetition,
    # finished, still, gradient_norm}.
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
    """
    raise NotImplementedError


def policy(study: Study, done: Trained) -> LanguageModel:
    """The trained policy, whole, with its head."""
    raise NotImplementedError
