"""Rollouts: what a policy writes while it is trained, with what that is worth.

A step's rollouts are a file, which grows by what is generated together. A run that was stopped
reads back what is there, and draws what is missing: a token is drawn by a number that follows from
seed, question, step and sample alone.

Shapes: B rollouts of a step, P tokens of the longest prompt, T of the longest rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from residual_saes.analyze.kept import grow, read_lines
from residual_saes.analyze.language_model import (
    Prediction,
    Sampling,
    batch_tokens,
    blocks,
    generate,
    logits,
)
from residual_saes.analyze.questions.answering import Asking, graded, numbers, require_room
from residual_saes.analyze.questions.problems import Problem
from residual_saes.analyze.questions.prompts import IN_TURNS
from residual_saes.analyze.studies.stage_gate_2.advantages import of_tokens, of_trajectories
from residual_saes.analyze.studies.stage_gate_2.arms import ALONE, TOKEN, Arm, Options
from residual_saes.analyze.studies.stage_gate_2.rewards import Rewards
from residual_saes.analyze.studies.stage_gate_2.watching import repetition
from residual_saes.data.errors import StopRequest
from residual_saes.harvest.model import LanguageModel

_ALIKE = 1e-9  # below it an advantage is 0 but for rounding


class Rollout(NamedTuple):
    """A completion, its grade and its worth."""

    question: str  # id
    sample: int
    ids: list[int]  # without the token that ended it
    end: int | None  # that token; None: a stop string ended it, or the limit
    finished: bool
    correct: bool
    feature: float  # see `rewards.Worth`
    z: float
    tokens: list[float]

    @property
    def written(self) -> list[int]:
        """All tokens that the policy chose."""
        return self.ids if self.end is None else [*self.ids, self.end]


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of an arm, step by step."""

    arm: Arm
    options: Options
    asking: Asking
    rewards: Rewards
    problems: Sequence[Problem]
    prompts: Mapping[str, list[int]]  # ids, by the question's id
    folder: Path  # a file for each step
    stop: StopRequest

    def of(self, step: int, policy: LanguageModel) -> list[Rollout]:
        """A step's rollouts, question by question: read back, and written by the policy."""
        path = self.folder / f"{step:06d}.jsonl"
        asked = []
        for question in asked_in(self.problems, self.arm.seed, step, self.options.batch):
            asked += [(question, sample) for sample in range(self.options.rollouts)]

        def make(rows: slice) -> list[dict[str, Any]]:
            self.stop.check()
            return [rollout._asdict() for rollout in self._written(step, policy, asked[rows])]

        self.folder.mkdir(exist_ok=True)
        grow(path, len(asked), self.asking.batch, make)
        return [Rollout(**line) for line in read_lines(path)]

    def _written(
        self, step: int, policy: LanguageModel, asked: Sequence[tuple[Problem, int]]
    ) -> list[Rollout]:
        """Rollouts of some questions and samples, generated together."""
        asking = self.asking
        prompts = [self.prompts[question.id] for question, _ in asked]
        require_room(max(map(len, prompts)), asking, policy.max_context)
        uniform = []
        for question, sample in asked:
            drawn = numbers(asking.new_tokens, self.arm.seed, question.id, step, sample)
            uniform.append(torch.from_numpy(drawn))
        sampling = Sampling(asking.temperature, torch.stack(uniform))
        in_turns = asking.prompt in IN_TURNS
        limits = (asking.new_tokens, asking.stops)
        written = generate(policy, prompts, *limits, sampling, in_turns=in_turns)
        found = []
        for (question, sample), prompt, own in zip(asked, prompts, written, strict=True):
            self.stop.check()
            answer = graded(policy.tokenizer, question, prompt, own, asking)
            worth = self.rewards.worth(self.arm, prompt, own.ids)
            about = (question.id, sample, own.ids, own.end, own.finished, answer.correct)
            found.append(Rollout(*about, *worth))
        return found

    def advantages(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Of each rollout of a step (t,), one for each of its `written` tokens."""
        weight = self.arm.weight(self.options)
        found: list[Tensor] = []
        for start in range(0, len(rollouts), self.options.rollouts):
            own = rollouts[start : start + self.options.rollouts]
            outcomes = torch.tensor([float(rollout.correct) for rollout in own])
            if self.arm.level == TOKEN:
                z = [_padded(rollout) for rollout in own]
                found += of_tokens(None if self.arm.reward == ALONE else outcomes, z, weight)
                continue
            added = weight * torch.tensor([rollout.z for rollout in own])
            rewards = added if self.arm.reward == ALONE else outcomes + added
            pairs = zip(of_trajectories(rewards), own, strict=True)
            found += [value.expand(len(rollout.written)) for value, rollout in pairs]
        return found

    def inputs(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """What the loss of TRL's GRPOTrainer takes, on the CPU.

        prompt_ids and prompt_mask (B, P), padded on the left; completion_ids, completion_mask,
        advantages and ref_per_token_logps (B, T), padded on the right; num_items_in_batch ().
        """
        prompts = [torch.tensor(self.prompts[rollout.question]) for rollout in rollouts]
        completions = [torch.tensor(rollout.written) for rollout in rollouts]
        reference = log_probabilities(
            self.rewards.study.lm,
            [
                (prompt.tolist(), own.tolist())
                for prompt, own in zip(prompts, completions, strict=True)
            ],
            self.asking.temperature,
            self.stop,
        )
        mask = _right([torch.ones_like(ids) for ids in completions])
        return {
            "prompt_ids": _left(prompts),
            "prompt_mask": _left([torch.ones_like(ids) for ids in prompts]),
            "completion_ids": _right(completions),
            "completion_mask": mask,
            "advantages": _right(self.advantages(rollouts)),
            "ref_per_token_logps": _right(reference),
            "num_items_in_batch": mask.sum(),
        }

    def figures(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """A step's line of the curve, but for what the trainer measures."""
        weight = self.arm.weight(self.options)
        outcome = float(np.mean([rollout.correct for rollout in rollouts]))
        z = float(np.mean([rollout.z for rollout in rollouts]))
        largest = [float(values.abs().max()) for values in self.advantages(rollouts)]
        by_question = np.reshape(largest, (-1, self.options.rollouts)).max(1)
        return {
            "step": step,
            "rollouts": len(rollouts),
            "outcome": outcome,
            "reward": (0.0 if self.arm.reward == ALONE else outcome) + weight * z,
            "feature": float(np.mean([rollout.feature for rollout in rollouts])),
            "z": z,
            "length": float(np.mean([len(rollout.ids) for rollout in rollouts])),
            "repetition": float(np.mean([repetition(rollout.ids) for rollout in rollouts])),
            "finished": float(np.mean([rollout.finished for rollout in rollouts])),
            "still": float(np.mean(by_question < _ALIKE)),
        }


def asked_in(problems: Sequence[Problem], seed: int, step: int, batch: int) -> list[Problem]:
    """A step's questions, the same for all arms of a seed.

    All problems are asked in a random order before any is asked again, in another one.
    """
    found = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(place, len(problems))
        order = np.random.default_rng([seed, epoch]).permutation(len(problems))
        found.append(problems[order[index]])
    return found


def _padded(rollout: Rollout) -> list[float]:
    """z of each written token; NaN of the one that ends it."""
    return rollout.tokens + [float("nan")] * (rollout.end is not None)


def log_probabilities(
    lm: LanguageModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float,
    stop: StopRequest,
) -> list[Tensor]:
    """Of each completion (t,) float32 on the CPU: what the model gives its tokens, in nats.

    Args:
        texts: prompt and completion, as ids.
        temperature: that the logits are divided by.
    """
    found = [torch.zeros(0)] * len(texts)
    sequences = [[*prompt, *completion] for prompt, completion in texts]
    for number, behind in logits(lm, sequences, batch_tokens(lm)):
        prompt, completion = texts[number]
        predicting = behind[len(prompt) - 1 : -1]  # the logits behind each token before
        losses = []
        for part in blocks(lm, len(completion)):
            stop.check()
            ids = torch.tensor(completion[part], device=behind.device)
            of_part = Prediction.of_logits(predicting[part].float() / temperature)
            losses.append(of_part.cross_entropy(ids).cpu())
        found[number] = -torch.cat(losses)
    return found


def _left(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")


def _right(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
