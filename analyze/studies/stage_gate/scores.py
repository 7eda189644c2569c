"""Scores of answers: R, and what costs less.

Everything is fitted on discovery answers, within questions where these have both right and wrong
answers.

Shapes: n answers, d d_model, F latents.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.analyze.language_model import Prediction, batch_tokens, batches, blocks, logits
from residual_saes.analyze.parts import Arrays, Parts
from residual_saes.analyze.probe import cross_validated
from residual_saes.analyze.questions.answering import Answer, model_key
from residual_saes.analyze.results import digest_of
from residual_saes.analyze.stats import Floats, spearman
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.analyze.studies.stage_gate.features import Chosen
from residual_saes.analyze.studies.stage_gate.within import Groups, centred
from residual_saes.analyze.studies.stage_gate.words import LENGTH, LOG_PROBABILITY, SCORE
from residual_saes.analyze.study import Study
from residual_saes.data import durable
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress

VERSION = 1  # of the kept log-probabilities: raise it when the same answers give other ones
_FILE = "log_probabilities.npy"
_PARTS = "parts"  # of them, by batch, until all answers are read

# Of inputs (n, d), labels (n,) and questions (n,) a function of inputs to scores (n,).
FitProbe = Callable[
    [Floats, NDArray[np.bool_], NDArray[np.str_]],
    Callable[[Floats], Floats],
]


class Fitting(NamedTuple):
    """The answers on which scores are fitted."""

    rows: NDArray[np.int64]  # (n,) of all answers
    groups: Groups | None  # the same answers, where they are compared within questions


def scores(
    means: Means,
    log_probability: Floats,
    layer: int,
    chosen: Chosen,
    fitting: Fitting,
    fit_probe: FitProbe = cross_validated,
) -> dict[str, Floats]:
    """By name (n,) scores of all answers: higher means right.

    Length and log-probability take the sign that they have among the fitted answers.

    Args:
        layer: of the direction and the probe.
    """
    hidden = np.asarray(means.hidden[:, layer], np.float64)
    x = hidden[fitting.rows]
    correct = means.correct[fitting.rows]
    question = means.question[fitting.rows]
    if fitting.groups:
        x = centred(x, question)
    probe = fit_probe(x, correct, question)
    direction = x[correct].mean(0) - x[~correct].mean(0)
    direction = direction / (np.linalg.norm(direction) or 1.0)
    along = hidden @ direction

    def signed(values: Floats) -> Floats:
        own = values[fitting.rows]
        ahead = fitting.groups.auroc(own) - 0.5 if fitting.groups else spearman(own, correct)
        return values if ahead >= 0 else -values

    return {
        SCORE: np.asarray(means.features @ chosen.weights(), np.float64).ravel(),
        LENGTH: signed(means.length.astype(np.float64)),
        LOG_PROBABILITY: signed(log_probability),
        "raw direction (CAA)": along,
        "raw direction, cosine": along / np.maximum(np.linalg.norm(hidden, axis=1), 1e-30),
        "logistic probe": probe(hidden),
    }


def log_probabilities(study: Study, answered: Sequence[Answer], stop: StopRequest) -> Floats:
    """(n,) mean log-probability in nats of each answer's tokens, NaN of one without; kept."""
    key = {
        "version": VERSION,
        **model_key(study),
        "texts": digest_of({"ids": [(answer.prompt_ids, answer.ids) for answer in answered]}),
    }

    def fill(folder: Path) -> None:
        content = io.BytesIO()
        parts = Parts(folder / _PARTS)
        np.save(content, _log_probabilities(study, answered, parts, stop))
        durable.write(folder / _FILE, [content.getbuffer()])
        parts.remove()

    folder = study.kept("log_probabilities", key, fill)
    return np.asarray(np.load(folder / _FILE), np.float64)


def _log_probabilities(
    study: Study, answered: Sequence[Answer], parts: Parts, stop: StopRequest
) -> Floats:
    means = np.full(len(answered), np.nan)
    done = 0
    progress = Progress()
    sequences = [answer.sequence for answer in answered]
    for index, (numbers, _) in enumerate(batches(sequences, batch_tokens(study.lm))):
        batch = [answered[number] for number in numbers]

        def make(batch: Sequence[Answer] = batch) -> Arrays:
            return {"means": _mean_log_probabilities(study, batch, stop)}

        means[numbers] = parts.of(index, make)["means"]
        done += len(numbers)
        line = f"{done}/{len(answered)} answers' probabilities"
        progress.show(line, last=done == len(answered))
    return means


def _mean_log_probabilities(study: Study, batch: Sequence[Answer], stop: StopRequest) -> Floats:
    """(b,) of answers that are read together."""
    means = np.full(len(batch), np.nan)
    for row, behind in logits(study.lm, [answer.sequence for answer in batch]):
        answer = batch[row]
        predicting = behind[len(answer.prompt_ids) - 1 : -1]  # the logits behind each one before
        total = 0.0
        for part in blocks(study.lm, len(answer.ids)):
            stop.check()
            ids = torch.tensor(answer.ids[part], device=behind.device)
            losses = Prediction.of_logits(predicting[part]).cross_entropy(ids)
            total -= float(losses.sum())
        if answer.ids:
            means[row] = total / len(answer.ids)
    return means
