"""What a rollout is worth in each arm of stage gate 2, read by the frozen untrained model.

    R1  sum of helpful - sum of harmful features      R2  cosine of the residual and a direction
    R3  the same of random latents of nearly equal density, others for each seed

Each is a value of every token. Of a completion it is their mean. z is that less its mean over the
untrained model's answers to the training questions, in units of its spread there. So z is the same
function all through training, and no other rollout moves it. Tokens have a mean and a spread of
their own.

The direction leads from wrong to right answers to the same question, at the SAE's layer. It is
fitted on the training questions alone.

Shapes: n answers, t tokens of one, d d_model, F latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze.latents.chosen import GATE, ChosenFeatures
from residual_saes.analyze.latents.matched import random_latents
from residual_saes.analyze.latents.reward import (
    DenseReward,
    DirectionReward,
    ResidualReward,
    read_alone,
)
from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.questions.answering import Answer, answers, asking_of, model_key
from residual_saes.analyze.questions.problems import Problem
from residual_saes.analyze.results import FOLDER, digest_of
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.contrast.means import answer_means, caa
from residual_saes.analyze.studies.stage_gate.within import centred, has_both
from residual_saes.analyze.studies.stage_gate_2.arms import (
    DIRECTION,
    FEATURES,
    RANDOM,
    Arm,
    Options,
    require_installed,
)
from residual_saes.analyze.study import Study
from residual_saes.data import sealed
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress

VERSION = 1  # raise it when the same answers give other rewards
_READ = 400  # answers at most that give mean and spread
_FILE = "rewards.json"


class Scale(NamedTuple):
    """Mean and spread of a reward on the untrained model's answers."""

    mean: float
    sd: float

    def z(self, values: Tensor) -> Tensor:
        """Of values of any shape; 0 of a reward that is the same for all answers."""
        return (values - self.mean) / self.sd if self.sd else torch.zeros_like(values)


class Scaled(NamedTuple):
    """A reward with its units."""

    reward: ResidualReward
    completion: Scale
    token: Scale


class Worth(NamedTuple):
    """What a completion is worth, beside the outcome."""

    feature: float  # R of R1, not in units of z, in every arm
    z: float  # the arm's own; in R0, where it moves nothing, that of R1
    tokens: list[float]  # (t,) z of each token


def features_of(study: Study, options: Options) -> ChosenFeatures:
    """The features of R1: those of study.features, else of the run's stage gate.

    Raises:
        StoreError: they are not there.
        MismatchError: they were chosen with another layer or SAE.
    """
    gate = study.subject.run / FOLDER / GATE / f"{GATE}.json"
    chosen = ChosenFeatures.read(Path(options.features) if options.features else gate)
    chosen.require_layer(study.subject.layer)
    chosen.require_sae(study.subject.run)
    return chosen


@dataclass(frozen=True)
class Rewards:
    """The rewards of all arms. The reader is loaded on first use."""

    study: Study
    chosen: ChosenFeatures
    follows: dict[str, Any]  # all that they follow from
    fitted: dict[str, Any]  # {direction, random: latents by seed, scales: by reward and seed}

    @classmethod
    def of(
        cls, study: Study, options: Options, problems: Sequence[Problem], stop: StopRequest
    ) -> Rewards:
        """The rewards, fitted on the untrained model's answers to `problems`; kept.

        Raises:
            SettingError: answers are not drawn, all are right or all wrong, or no feature fires.
            StoreError: there are no features.
        """
        require_installed(options)
        if not asking_of(study).temperature:
            raise SettingError(
                "answers.temperature=0 would make all rollouts of a question equal; give "
                "answers.temperature=1 answers.samples=8, as for study=stage_gate"
            )
        chosen = features_of(study, options)
        written = [answer for answer in answers(study, stop, problems[0].part) if answer.ids]
        training = {item.id for item in problems}
        of_training = np.array([answer.problem.id in training for answer in written], bool)
        texts = [(answer.prompt_ids, answer.ids, answer.correct) for answer in written]
        follows = {
            "version": VERSION,
            **study.identity,
            **model_key(study),
            "helpful": chosen.helpful,
            "harmful": chosen.harmful,
            "answers": digest_of({"texts": texts, "training": of_training}),
        }

        def fill(folder: Path) -> None:
            fitted = _fitted(study, chosen, written, of_training, options.seeds, stop)
            sealed.write(folder / _FILE, [dumped(fitted).encode()])

        folder = study.kept("stage_gate_2_rewards", {**follows, "seeds": options.seeds}, fill)
        return cls(study, chosen, follows, json.loads(sealed.read(folder / _FILE) or b""))

    @cached_property
    def readers(self) -> dict[str, ResidualReward]:
        """R1, R2, and R3 of the first seed."""
        return {name: self._scaled(name).reward for name in (FEATURES, DIRECTION, RANDOM)}

    def of_arm(self, arm: Arm) -> Scaled:
        """What an arm adds to the outcome; of R0, which adds nothing, what R1 does."""
        return self._scaled(arm.reward if arm.reward in (DIRECTION, RANDOM) else FEATURES, arm.seed)

    def worth(self, arm: Arm, prompt: Sequence[int], completion: Sequence[int]) -> Worth:
        """Of a completion (t,), which is read alone. One without tokens has the mean: z is 0."""
        if not completion:
            return Worth(0.0, 0.0, [])
        own = self.of_arm(arm)
        rows = read_alone(own.reward.lm, own.reward.layer, prompt, completion)
        values = own.reward.worth(rows)
        is_other = arm.reward in (DIRECTION, RANDOM)
        features = self.readers[FEATURES].worth(rows) if is_other else values
        z = float(own.completion.z(values.mean()))
        return Worth(float(features.mean()), z, own.token.z(values).tolist())

    def _scaled(self, name: str, seed: int = 0) -> Scaled:
        key = _key(name, seed)
        reward = _reward(self.study, self.chosen, self.fitted, key)
        return Scaled(reward, *(Scale(*pair) for pair in self.fitted["scales"][key]))


def _key(name: str, seed: int) -> str:
    return f"{name} {seed}" if name == RANDOM else name


def _reward(
    study: Study, chosen: ChosenFeatures, fitted: Mapping[str, Any], key: str
) -> ResidualReward:
    """The reward of a key, see `_key`."""
    sae, layer = study.subject.sae, study.subject.layer
    if key == DIRECTION:
        direction = torch.tensor(fitted["direction"], dtype=torch.float32)
        return DirectionReward(study.lm, layer, direction, cosine=True)
    weights = chosen.weights(sae.d_sae)
    if key != FEATURES:
        signs = weights[chosen.helpful + chosen.harmful]
        weights = torch.zeros(sae.d_sae)
        weights[fitted["random"][int(key.split()[1])]] = signs
    return DenseReward(study.lm, sae, layer, weights)


# -- fitted on the training questions --------------------------------------------------------------


def _fitted(
    study: Study,
    chosen: ChosenFeatures,
    written: Sequence[Answer],
    of_training: NDArray[np.bool_],
    seeds: int,
    stop: StopRequest,
) -> dict[str, Any]:
    """`Rewards.fitted`.

    Args:
        written: the untrained model's answers, all of them: so the means are the stage gate's.
        of_training: (n,) which are to training questions.
    """
    fitted: dict[str, Any] = {"direction": _direction(study, written, of_training, stop).tolist()}
    own = [answer for answer, trains in zip(written, of_training, strict=True) if trains]
    # Every question's first answer before any second one.
    read = sorted(own, key=lambda answer: answer.sample)[:_READ]
    rows = list(_rows(study, read, stop))
    every = chosen.helpful + chosen.harmful
    density = _density(study, rows)
    draws = (np.random.default_rng([seed, len(every)]) for seed in range(seeds))
    fitted["random"] = [random_latents(density, every, rng).tolist() for rng in draws]
    fitted["scales"] = {}
    for key in (FEATURES, DIRECTION, *(_key(RANDOM, seed) for seed in range(seeds))):
        stop.check()
        reward = _reward(study, chosen, fitted, key)
        values = [reward.worth(some).double() for some in rows]
        means = torch.stack([value.mean() for value in values])
        fitted["scales"][key] = [_scale(means), _scale(torch.cat(values))]
    if not fitted["scales"][FEATURES][0].sd:
        raise SettingError(
            f"the features of {chosen.path} are worth the same in {len(read)} answers to training "
            "questions; choose others with study.features=, or give more answers"
        )
    return fitted


def _direction(
    study: Study, written: Sequence[Answer], of_training: NDArray[np.bool_], stop: StopRequest
) -> Floats:
    """(d,) from wrong to right answers to the same question, where questions have both."""
    means = answer_means(study, written, stop)
    if len(np.unique(means.correct[of_training])) < 2:
        raise SettingError(
            f"all {int(of_training.sum())} answers to training questions are right, or all wrong; "
            "give more answers.questions=, or problems= that are neither too easy nor too hard"
        )
    both = has_both(means.question, means.correct)
    rows = np.flatnonzero(of_training & both if (of_training & both).any() else of_training)
    hidden = np.asarray(means.hidden[rows, study.subject.layer], np.float64)
    if both[rows].all():
        hidden = centred(hidden, means.question[rows])
    return caa(hidden, means.correct[rows])


def _rows(study: Study, read: Sequence[Answer], stop: StopRequest) -> Iterator[Tensor]:
    """(t, d) residuals of each answer, at the SAE's layer."""
    progress = Progress()
    for number, answer in enumerate(read, 1):
        stop.check()
        yield read_alone(study.lm, study.subject.layer, answer.prompt_ids, answer.ids)
        progress.show(
            f"{number}/{len(read)} answers read for the rewards", last=number == len(read)
        )


def _density(study: Study, rows: Sequence[Tensor]) -> Floats:
    """(F,) share of the tokens on which each latent fires."""
    counts = torch.zeros(study.subject.sae.d_sae, dtype=torch.int64)
    for some in rows:
        kept = study.subject.sae.encode(some)
        counts += torch.bincount(kept.indices[kept.values > 0].cpu(), minlength=len(counts))
    return np.asarray(counts.double() / sum(map(len, rows)), np.float64)


def _scale(values: Tensor) -> Scale:
    """Of values (n,)."""
    return Scale(float(values.mean()), float(values.std()) if len(values) > 1 else 0.0)
