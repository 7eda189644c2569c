"""What a reward is worth among sampled answers to the same question.

Every candidate reward is fitted on discovery questions. On the others it orders right and wrong
answers to one question (AUROC), and picks one of n answers (best of n). Beside it stand answer
length, log-probability, the raw direction, its cosine, a probe, random latents of equal density,
the majority vote, a random pick, and the oracle. The verdict is the stage gate's, by the same
function of the same answers: see analyze/studies/stage_gate/judgement.py.

Leaves `rollouts.parquet`, a row per answer: its question, which sample it is, whether it is right,
the number that it gives, its tokens, and every score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from residual_saes.analyze import refusals, results
from residual_saes.analyze.latents.chosen import ChosenFeatures
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.questions.answering import Answer
from residual_saes.analyze.questions.answering import inputs as inputs_of_answers
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.contrast.means import memory
from residual_saes.analyze.studies.rollouts.words import CONTRAST, pictures, summary, tables
from residual_saes.analyze.studies.stage_gate.judgement import (
    SAMPLES,
    VERSION,
    Judgement,
    Options,
    judged,
)
from residual_saes.analyze.study import Definition, Study, write_table
from residual_saes.data import durable
from residual_saes.data.errors import PipelineError, StopRequest, first_line

_OTHER = "contrast"


def rollouts(study: Study) -> Outcome:
    """The stage gate's verdict, with AUROC and best of n of every candidate reward."""
    said: list[str] = []

    def others(judging: set[str]) -> Mapping[str, Floats]:
        try:
            return by_contrast(study, judging)
        except PipelineError as error:
            said.append(f"Features by contrast are left out: {first_line(error)}.")
            return {}

    with StopRequest() as stop:
        judgement, answered = judged(study, stop, others)
    write_table(study.folder / "rollouts.parquet", _rows(judgement, answered))
    figures = {**judgement.figures, "left_out": said}
    return Outcome(figures, summary(figures), tables(figures), pictures(figures))


def by_contrast(study: Study, judging: set[str]) -> dict[str, Floats]:
    """Weights (F,) of the features that study=contrast chose, if it has been done.

    Args:
        judging: ids of the questions that judge.

    Raises:
        PipelineError: they cannot stand beside the others, and why.
    """
    path = _contrast(study)
    if not path.exists():
        return {}
    chosen = ChosenFeatures.read(path)
    chosen.require_sae(study.subject.run)
    if shared := len(judging & chosen.questions):
        raise PipelineError(
            f"{shared} of the {len(judging)} questions that judge are among those that chose the "
            f"features of {path}; do study=contrast with the same problems= and study.discovery="
        )
    weights = chosen.weights(study.subject.sae.d_sae)
    return {CONTRAST: np.asarray(weights.numpy(), np.float64)}


def _contrast(study: Study) -> Path:
    name = f"contrastive_features_{study.subject.label}.json"
    return study.subject.run / results.FOLDER / _OTHER / name


def _rows(judgement: Judgement, answered: list[Answer]) -> dict[str, Any]:
    """A column per figure of an answer."""
    columns: dict[str, Any] = {}
    for answer, chose in zip(answered, judgement.discovery, strict=True):
        about = {
            "question": answer.problem.id,
            "side": "discovery" if chose else "validation",
            "source": answer.source,
            "sample": answer.sample,
            "correct": answer.correct,
            "strict": answer.strict,
            "flexible": answer.flexible,
            "finished": answer.finished,
            "tokens": len(answer.ids),
        }
        for name, value in about.items():
            columns.setdefault(name, []).append(value)
    return columns | judgement.scores


def inputs(study: Study) -> dict[str, Any]:
    """What the result depends on beside the model: answers, and the features by contrast."""
    path = _contrast(study)
    digest = durable.digest(path.read_bytes()) if path.exists() else None
    return {**inputs_of_answers(study), _OTHER: digest}


def reads(study: Study) -> Iterable[tuple[Path, str]]:
    """study=contrast, which is not done again meanwhile."""
    return [(study.subject.run, _OTHER)] if _contrast(study).exists() else []


DEFINITION = Definition(
    rollouts,
    version=VERSION,
    samples=SAMPLES,
    options=Options,
    refuses=refusals.no_layer,
    inputs=inputs,
    reads=reads,
    memory=memory,
    order=51,
)
