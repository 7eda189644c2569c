"""Contrastive activation addition: does a direction from wrong to right answers make more right?

The vector v is mean(h | right) - mean(h | wrong) of the train questions' answers, at unit norm
(Rimsky et al., arXiv 2312.06681). The scale is chosen on dev questions, where 0, to do nothing,
competes. Everything is reported on test questions. Each sweep over the test questions is paired
with an unsteered one in the same batches, so that nothing but the vector differs. Controls: the
hook at scale 0, the opposite scale, other positions, vectors from shuffled labels, and directions
by chance.

Shapes: n answers, d d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze import refusals
from residual_saes.analyze.changes.intervention import (
    POSITIONS,
    Steer,
    prompt_inert_from,
    require_positions,
)
from residual_saes.analyze.changes.sweeps import Sweeps, greedy
from residual_saes.analyze.latents.matched import random_directions, unit
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.questions.answering import Answer, answers, asking_of, inputs
from residual_saes.analyze.questions.split import require_shares, split_of
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.contrast.means import answer_means, caa, memory
from residual_saes.analyze.studies.steering import vector, words
from residual_saes.analyze.studies.steering.outcomes import Findings
from residual_saes.analyze.study import Definition, Study
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress
from residual_saes.data.settings import build, number
from residual_saes.data.site import RESID_POST
from residual_saes.harvest.model import LanguageModel

SEED = 0  # of random directions and shuffled labels


@dataclass(frozen=True)
class Options:
    """The settings of conf/study/steering.yaml: what is steered, and against what."""

    layer: int | None = None  # null: the run's own
    scales: Sequence[float] = (2, 5, 10, 15, -5)  # times the unit vector
    positions: str = "all"  # see analyze/changes/intervention.py
    n_random: int = 20
    n_shuffled: int = 5
    train: float = 0.3  # share of the questions
    dev: float = 0.2  # likewise; the rest are test questions

    def __post_init__(self) -> None:
        require_positions(self.positions)
        if not isinstance(self.scales, list | tuple):
            raise SettingError(f"study.scales={self.scales} must be a list, such as [2,5,-5]")
        scales = [number("study.scales", scale) for scale in self.scales]
        usable = all(scale and isfinite(scale) for scale in scales)
        if not scales or not usable or len(set(scales)) < len(scales):
            raise SettingError(
                f"study.scales={scales} must be different numbers other than 0, such as [2,5,-5]"
            )
        for name in ("n_random", "n_shuffled"):
            value = getattr(self, name)
            if value < 1:
                raise SettingError(f"study.{name}={value} must be at least 1")
        require_shares(self.train, self.dev)


# -- the study -------------------------------------------------------------------------------------


def steering(study: Study) -> Outcome:
    """Accuracy on test questions, steered and not, at each scale and under each control.

    Labelled solutions, where the problems come with such, only make the vector. What is steered is
    the model's own answering.

    Raises:
        SettingError: the layer is none of the model's, or the questions are too few for the split.
    """
    options = build(Options, "study", study.options)
    layer = study.subject.layer if options.layer is None else options.layer
    if not 0 <= layer < study.n_layers:
        raise SettingError(
            f"study.layer={layer} must be one of the model's layers, 0 to {study.n_layers - 1}"
        )
    asking = asking_of(study)
    with StopRequest() as stop:
        # The vector and its controls, from the answers to the train questions.
        answered = answers(study, stop)
        split = split_of(answered, options.train, options.dev)
        # Those that contrast reads too: of one file all, of a folder those to train questions.
        read = [answer for answer in answered if answer.problem.part != "test"]
        means = answer_means(study, read, stop)
        in_train = np.isin(means.question, split.train)
        hidden = means.hidden[in_train, layer]
        correct = means.correct[in_train]
        _require_both(correct, len(split.train))
        vectors = directions(hidden, correct, options)
        v = vectors["v"][0]

        # The scale, by the dev questions.
        tried = [Steer("v", v, float(scale), options.positions) for scale in options.scales]
        sweeps = Sweeps(study, layer, greedy(asking), stop, Progress())
        dev = _right_on_dev(sweeps, tried, split.dev)
        best = best_of(tried, dev)

        # Every scale and every control, on the test questions.
        rows = sweeps.rows(steers(tried, best, vectors), split.test, "test")
    findings = Findings(
        rows=rows,
        best=best.scale,
        dev=dev,
        ids={"train": split.train, "dev": _ids(split.dev), "test": _ids(split.test)},
        answers=(int(correct.sum()), int((~correct).sum())),
        layer=layer,
        inert_from=prompt_inert_from(study.lm),
        seed=SEED,
        samples=asking.samples,
    )
    vector.write(study.folder, layer, v, provenance(study, findings, options))
    return words.outcome(findings)


def provenance(study: Study, findings: Findings, options: Options) -> dict[str, Any]:
    """What the vector follows from, for the file beside it."""
    right, wrong = findings.answers
    return {
        "layer": findings.layer,
        "site": RESID_POST,
        "module": _name_of(study.lm, findings.layer),
        "positions": options.positions,
        "chosen_scale": findings.chosen,
        "best_scale_but_0": findings.best,
        "mean_norm": findings.norm,
        "questions": findings.ids["train"],
        "answers": {"right": right, "wrong": wrong, "settings": inputs(study)},
        "model": study.subject.store.manifest["model"]["id"],
        "weights": study.identity["weights"],
    }


def _name_of(lm: LanguageModel, layer: int) -> str:
    """The name of the layer's module in the model, as `get_submodule` takes it."""
    named = lm.causal.named_modules()
    return str(next(name for name, module in named if module is lm.blocks[layer]))


def _require_both(correct: NDArray[np.bool_], questions: int) -> None:
    """Raise SettingError unless the train answers are right and wrong ones."""
    if correct.all() or not correct.any():
        label = "right" if correct.any() else "wrong"
        raise SettingError(
            f"all {len(correct)} answers to the {questions} train questions are {label}, and a "
            "contrast needs both; raise answers.questions or study.train"
        )


def _right_on_dev(
    sweeps: Sweeps, tried: Sequence[Steer], asked: Sequence[Answer]
) -> dict[float, int]:
    """Right answers to the dev questions by scale; 0 is unsteered."""
    right = {0.0: sweeps.right(asked, None, "dev, unsteered")}
    for steer in tried:
        right[steer.scale] = sweeps.right(asked, steer, f"dev, v {steer.scale:+g}")
    return right


def _ids(asked: Sequence[Answer]) -> list[str]:
    return [answer.problem.id for answer in asked]


# -- what is compared ------------------------------------------------------------------------------


def directions(
    hidden: Floats, correct: NDArray[np.bool_], options: Options
) -> dict[str, list[Floats]]:
    """Unit vectors (d,) by kind.

    Args:
        hidden: (n, d) means of the train answers at the steered layer.
        correct: (n,).
    """
    v = vector.as_shipped(caa(hidden, correct))
    rng = np.random.default_rng(SEED)
    random = random_directions(len(v), options.n_random, rng)
    shuffled = [caa(hidden, rng.permutation(correct)) for _ in range(options.n_shuffled)]
    orthogonal = unit(random[0] - (random[0] @ v) / (v @ v) * v)
    return {"v": [v], "orthogonal": [orthogonal], "shuffled": shuffled, "random": random}


def best_of(tried: Sequence[Steer], right: Mapping[float, int]) -> Steer:
    """The scale with most right dev answers; of equals the smallest, and the positive one.

    It need not have more than 0 has, see `Findings.chosen`.
    """
    return max(tried, key=lambda steer: (right[steer.scale], -abs(steer.scale), steer.scale))


def steers(
    tried: Sequence[Steer], best: Steer, vectors: Mapping[str, Sequence[Floats]]
) -> list[Steer]:
    """Every sweep over the test questions but the unsteered one.

    First the hook at scale 0, then the scales, then the controls at the best scale.
    """
    sweeps = [best._replace(kind="scale 0", scale=0.0), *tried]
    if all(steer.scale != -best.scale for steer in tried):
        sweeps.append(best._replace(kind="opposite", scale=-best.scale))
    for positions in POSITIONS:
        if positions != best.positions:
            sweeps.append(best._replace(kind="positions", positions=positions))
    for kind in ("orthogonal", "shuffled", "random"):
        for direction in vectors[kind]:
            sweeps.append(best._replace(kind=kind, vector=direction))
    return sweeps


DEFINITION = Definition(
    steering,
    version=3,
    options=Options,
    refuses=refusals.no_layer,
    inputs=inputs,
    memory=memory,
    order=40,
)
