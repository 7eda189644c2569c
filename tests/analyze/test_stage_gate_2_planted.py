"""A planted feature reward improves a policy under GRPO, and random latents do not.

Planted is a label: where an answer's number is the true one, the residuals that the reader reads
have a direction added at every token of the answer. Latent 0 of the SAE reads that direction. So R1
pays for right answers through the SAE, its z-scores and GRPO; R3 pays for a random latent of nearly
the same density. What is added weighs as much as the outcome or more. All else is equal: questions,
draws, rollouts, rate.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residual_saes.analyze.latents.reward import read_alone
from residual_saes.analyze.questions.answering import (
    asking_of,
    completions,
    problems_of,
    prompts_of,
)
from residual_saes.analyze.questions.problems import Problem, strict
from residual_saes.analyze.studies.stage_gate_2 import rewards as rewards_module
from residual_saes.analyze.studies.stage_gate_2.arms import Arm, Options
from residual_saes.analyze.studies.stage_gate_2.rewards import Rewards
from residual_saes.analyze.studies.stage_gate_2.rollouts import log_probabilities
from residual_saes.analyze.studies.stage_gate_2.training import policy, trained
from residual_saes.analyze.study import Study
from residual_saes.data.errors import StopRequest
from residual_saes.harvest.model import LanguageModel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the extra `grpo` is not installed"
)
PLANTED = 0  # the latent
SIZE = 60.0  # of what is added, in units of activation; residuals are about 20 long


@pytest.fixture
def planted(
    tiny_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Study]:
    """Makes a study of the tiny run in which latent 0 reads whether an answer is right."""
    path = tmp_path / "features.json"
    path.write_text(json.dumps({"helpful": [{"feature": PLANTED}], "harmful": []}))

    def of(**answers: Any) -> Study:
        asked = {"temperature": 1, "samples": 4, "new_tokens": 64, **answers}
        study = tiny_study("stage_gate_2", answers=asked, features=str(path))
        sae = study.subject.sae
        direction = torch.randn(sae.d_model, generator=torch.Generator().manual_seed(1))
        direction /= direction.norm()
        sae.W_enc[:, PLANTED] = direction
        sae.W_dec[PLANTED] = direction
        asking = asking_of(study)
        problems = [item for item in problems_of(study, asking) if isinstance(item, Problem)]
        by_prompt = {tuple(ids): name for name, ids in prompts_of(study, problems, asking).items()}
        truth = {item.id: item for item in problems}
        tokenizer = study.description.tokenizer.inner

        def reading(
            lm: LanguageModel, layer: int, prompt: Sequence[int], completion: Sequence[int]
        ) -> torch.Tensor:
            rows = read_alone(lm, layer, prompt, completion).clone()
            number = strict(tokenizer.decode(completion))
            if truth[by_prompt[tuple(prompt)]].is_answer(number):
                rows += SIZE * direction
            return rows

        monkeypatch.setattr(rewards_module, "read_alone", reading)
        return study

    return of


def train(
    study: Study, options: Options, problems: list[Problem], reward: str, level: str, seed: int
) -> LanguageModel:
    with StopRequest() as stop:
        rewards = Rewards.of(study, options, problems, stop)
        (rate,) = options.lr
        done = trained(study, Arm(reward, level, rate, seed), options, rewards, problems, stop)
    made = policy(study, done)
    shutil.rmtree(done.folder)
    return made


@pytest.mark.long
def test_grpo_raises_what_the_planted_latent_pays(planted: Callable[..., Study]) -> None:
    """On the training questions: right answers become more probable than wrong ones."""
    study = planted(questions=6)
    asking = asking_of(study)
    problems = [item for item in problems_of(study, asking) if isinstance(item, Problem)]
    path = str(study.options["features"])
    options = Options(features=path, steps=2, batch=6, lr=[1e-3], seeds=1, weight=10.0)
    prompts = prompts_of(study, problems, asking)
    asked = [(item, prompts[item.id]) for item in problems for _ in range(4)]
    samples = [sample for _ in problems for sample in range(4)]
    own = completions(study.lm, asked, replace(asking, seed=7), samples)
    texts = [(answer.prompt_ids, answer.ids) for answer in own]
    right = np.array([answer.correct for answer in own])
    assert 4 <= right.sum() <= 20

    def gain(reward: str) -> float:
        made = train(study, options, problems, reward, "trajectory", 0)
        pairs = []
        for lm in (made, study.lm):
            found = log_probabilities(lm, texts, 1.0, StopRequest())
            pairs.append(np.array([float(values.sum()) for values in found]))
        change = pairs[0] - pairs[1]
        return float(change[right].mean() - change[~right].mean())

    of_planted, of_random = gain("R1"), gain("R3")
    assert of_planted > 0.2
    assert of_random < of_planted / 2


@pytest.mark.long
def test_a_planted_reward_makes_answers_right_and_random_latents_do_not(
    planted: Callable[..., Study],
) -> None:
    """On questions that trained none, sampled answers, two seeds of each."""
    study = planted(questions=300)
    asking = replace(asking_of(study), batch=128)
    every = [item for item in problems_of(study, asking) if isinstance(item, Problem)]
    training, judged = every[:150], every[150:]
    path = str(study.options["features"])
    options = Options(features=path, steps=30, batch=16, lr=[1e-4], seeds=2, weight=1.0)
    prompts = prompts_of(study, judged, asking)
    asked = [(item, prompts[item.id]) for item in judged for _ in range(4)]
    samples = [sample for _ in judged for sample in range(4)]

    def accuracy(lm: LanguageModel) -> float:
        right = []
        for start in range(0, len(asked), asking.batch):
            part = slice(start, start + asking.batch)
            right += [own.correct for own in completions(lm, asked[part], asking, samples[part])]
        return float(np.mean(right))

    before = accuracy(study.lm)
    after = {}
    for reward in ("R1", "R3"):
        after[reward] = []
        for seed in range(2):
            made = train(study, options, training, reward, "token", seed)
            after[reward].append(accuracy(made))
    # Draws are common to all policies; the standard error of an accuracy is 0.02.
    assert np.mean(after["R1"]) > before + 0.03
    assert np.mean(after["R3"]) < before + 0.02
    assert min(after["R1"]) > max(after["R3"])
