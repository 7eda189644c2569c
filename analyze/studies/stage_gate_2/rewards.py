"""What a rollout is worth in each arm of stage gate 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analyze.problems import Problem
from analyze.reward import ResidualReward
from analyze.studies.stage_gate_2.arms import Options
from analyze.study import Study
from data.errors import StopRequest


@dataclass(frozen=True)
class Rewards:
    """The rewards of all arms, by a frozen reader."""

    readers: Mapping[str, ResidualReward]  # of answers, for R1, R2 and R3
    follows: Mapping[str, Any]  # all that they follow from, for keys of what they read

    @classmethod
    def of(
        cls, study: Study, options: Options, problems: Sequence[Problem], stop: StopRequest
    ) -> Rewards:
        """The rewards with their mean and spread on the untrained model's answers to `problems`."""
        raise NotImplementedError
