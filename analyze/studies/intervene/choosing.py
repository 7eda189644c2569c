"""Which latents are changed, by train questions alone: listed, by contrast, by gate, by confidence.

`contrast`      the largest Hedges' g between right and wrong answers, as study=contrast and
                study=stage_gate choose
`gate`          those that the run's study=stage_gate chose; the questions that chose them are then
                neither dev nor test
`confidence`    those that change the log-probability of right answers most when their mean
                activation is added

The last is a form of Delta token confidence (Wang et al., arXiv 2510.03659, appendix D). There, the
change of -ln p of the most probable token behind the fixed prefix "From my experience,", with the
latent's code times 10 and all other codes at 0. Here, the change of ln p of the tokens of right
answers to train questions; the other latents and the SAE's error stay. Latents are screened by
first order.

Shapes: F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from residual_saes.analyze.changes.intervention import LatentChange
from residual_saes.analyze.latents.chosen import GATE, ChosenFeatures
from residual_saes.analyze.parts import Arrays
from residual_saes.analyze.questions.answering import Answer, model_key
from residual_saes.analyze.results import FOLDER, digest_of
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.contrast.means import answer_means
from residual_saes.analyze.studies.contrast.study import comparable
from residual_saes.analyze.studies.intervene.probability import (
    Firing,
    first_order,
    log_probabilities,
    whole,
)
from residual_saes.analyze.studies.stage_gate.features import choose
from residual_saes.analyze.study import Study
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import note

SELECTIONS = ("contrast", "gate", "confidence")
SIDES = ("helpful", "harmful")
VERSION = 1  # of the kept confidences: raise it when the same settings give other ones


class Choice(NamedTuple):
    """The latents that are changed together."""

    features: tuple[int, ...]
    scores: tuple[float, ...] | None  # by which they were chosen, in their order; None: listed
    of: int  # latents among which they were chosen
    gate: str | None = None  # the verdict of the stage gate that chose them


def gate_of(study: Study) -> ChosenFeatures:
    """The features that the run's stage gate chose.

    Raises:
        StoreError: there is no result of one.
        MismatchError: it is of another SAE or model.
    """
    chosen = ChosenFeatures.read(gate_path(study))
    chosen.require_layer(study.subject.layer)
    chosen.require_sae(study.subject.run)
    return chosen


def gate_path(study: Study) -> Path:
    return study.subject.run / FOLDER / GATE / f"{GATE}.json"


def by_gate(study: Study, side: str, count: int) -> Choice:
    """The first latents of the gate's list."""
    chosen = gate_of(study)
    chosen.require_model(study.lm)
    features = chosen.helpful if side == "helpful" else chosen.harmful
    _require_some(features, side)
    return Choice(tuple(features[:count]), None, len(features), chosen.verdict)


def by_contrast(
    study: Study, train: Sequence[Answer], side: str, count: int, min_firing: int, stop: StopRequest
) -> Choice:
    """The latents that differ most between right and wrong train answers.

    Several answers to a question are compared within it.
    """
    means = answer_means(study, train, stop)
    rows, paired = comparable(means)
    correct = means.correct[rows]
    if correct.all() or not correct.any():
        raise SettingError(
            f"{int(correct.sum())} of the {len(rows)} train answers that can be compared are "
            "right, and a contrast needs right and wrong ones; raise answers.questions or "
            "study.train"
        )
    question = means.question[rows] if paired else None
    chosen = choose(means.features[rows], correct, min_firing, question)
    features = (chosen.helpful if side == "helpful" else chosen.harmful)[:count].tolist()
    _require_some(features, side)
    return Choice(tuple(features), tuple(chosen.g[features].tolist()), len(chosen.eligible))


def by_confidence(
    study: Study,
    train: Sequence[Answer],
    fires: Firing,
    positions: str,
    side: str,
    count: int,
    candidates: int,
    stop: StopRequest,
) -> Choice:
    """The latents whose addition raises (`helpful`) or lowers (`harmful`) right answers most.

    Args:
        candidates: latents that are measured: those of the largest effect to first order.
    """
    lm, sae, layer = study.lm, study.subject.sae, study.subject.layer
    texts = [whole(answer.prompt_ids, answer.ids) for answer in train if answer.correct]
    if not texts:
        raise SettingError(
            "no train answer is right, and study.select=confidence reads right ones; raise "
            "answers.questions or study.train"
        )

    def estimated() -> Arrays:
        return {"adding": first_order(lm, sae, layer, texts, positions, stop).adding}

    def measured(feature: int) -> Arrays:
        change = LatentChange(sae, "add", (feature,), float(fires.mean[feature]), positions)
        return {"log_p": log_probabilities(lm, texts, layer, change, stop)}

    key = {"version": VERSION, **study.identity, **model_key(study), "positions": positions}
    key["texts"] = digest_of({"ids": texts})
    parts = study.subject.parts("confidence", key)
    slope = parts.of(0, estimated)["adding"] * fires.mean
    tried = np.argsort(-np.abs(slope), kind="stable")[:candidates]
    unchanged = parts.of(1, lambda: {"log_p": log_probabilities(lm, texts, layer, None, stop)})
    gains: Floats = np.empty(len(tried))
    for done, feature in enumerate(tried.tolist()):
        note(f"{done}/{len(tried)} latents' effects on {len(texts)} right answers")
        found = parts.of(2 + feature, partial(measured, feature))
        gains[done] = (found["log_p"] - unchanged["log_p"]).mean()
    sign = 1 if side == "helpful" else -1
    best = np.argsort(-sign * gains, kind="stable")[:count]
    best = best[sign * gains[best] > 0]
    features = tuple(tried[best].tolist())
    _require_some(features, side)
    return Choice(features, tuple(gains[best].tolist()), len(tried))


def _require_some(features: Sequence[Any], side: str) -> None:
    if not len(features):
        raise SettingError(
            f"no latent is {side} by this selection; give study.side=, another study.select=, or "
            "study.features="
        )
