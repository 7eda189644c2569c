"""What answers look like inside the model: residuals and SAE features, averaged over each answer.

The model reads prompt and completion (analyze/latents/pooling.py). Residuals at all layers, and the
SAE's features, are averaged over the tokens of the completion.

Shapes: n answers, d d_model, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from residual_saes.analyze.latents.pooling import MEAN, Reading, Span, pooled
from residual_saes.analyze.memory import Needed, of_sae
from residual_saes.analyze.questions.answering import Answer, asking_of, model_key, number_of
from residual_saes.analyze.results import digest_of
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.study import Study
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.site import HookPoint

VERSION = 1  # of the kept means: raise it when the same answers give other ones


class Means(NamedTuple):
    """What is known of n answers, each averaged over its own tokens, the prompt left out.

    An answer without tokens has the values at its prompt's last token, so that rows stay those of
    the answers.
    """

    hidden: NDArray[np.float32]  # (n, layers, d) resid_post of every layer
    features: Any  # scipy.sparse.csr_array (n, F) float32, at the SAE's layer
    length: NDArray[np.int64]  # (n,) tokens
    finished: NDArray[np.bool_]  # (n,)
    correct: NDArray[np.bool_]  # (n,)
    question: NDArray[np.str_]  # (n,) ids
    source: NDArray[np.str_] | None = None  # (n,) who wrote each; None: one writer
    part: NDArray[np.str_] | None = None  # (n,) of the problems; None: they have no parts
    # (n,) the number by which each is graded, "" where there is none; None: not known.
    number: NDArray[np.str_] | None = None
    firings: Any | None = None  # (n, F) sparse: tokens of each answer on which a latent fires


def answer_means(study: Study, answers: Sequence[Answer], stop: StopRequest) -> Means:
    """The means of `answers`, in their order; read back if the same were asked for before.

    Raises:
        SettingError: there is no answer, or one does not fit in the model's context.
        NonFiniteError: a residual is NaN or infinite.
    """
    if not answers:
        raise SettingError("there is no answer to average over; give more with answers.questions=")

    spans = []
    for answer in answers:
        # Of an answer without tokens the prompt's last one is taken.
        first = len(answer.prompt_ids) - (0 if answer.ids else 1)
        spans.append(Span(answer.sequence, first))
    texts = [(answer.prompt_ids, answer.ids) for answer in answers]
    model = {**study.identity, **model_key(study)}
    key = {"version": VERSION, **model, "texts": digest_of({"ids": texts})}
    layers = [HookPoint(layer) for layer in range(study.n_layers)]
    reading = Reading(layers, [study.subject.sae], MEAN, "answer")
    found = pooled(study, "means", key, spans, reading, stop)
    by_strict = asking_of(study).grading == "strict"
    numbers = [answer.strict if by_strict else answer.flexible for answer in answers]
    return Means(
        hidden=found.hidden,
        features=found.features[0],
        firings=found.firings[0],
        number=np.array([number or "" for number in numbers]),
        length=np.array([len(answer.ids) for answer in answers]),
        finished=np.array([answer.finished for answer in answers]),
        correct=np.array([answer.correct for answer in answers]),
        question=np.array([answer.problem.id for answer in answers]),
        source=np.array([answer.source for answer in answers]),
        part=_parts(answers),
    )


def _parts(answers: Sequence[Answer]) -> NDArray[np.str_] | None:
    parts = [answer.problem.part or "" for answer in answers]
    return np.array(parts) if any(parts) else None


def memory(study: Study) -> Needed:
    """The SAE, and while answers are read their means at all layers, a byte more of each number."""
    layers = int(study.subject.store.manifest["model"]["n_layers"])
    hidden = 5 * layers * number_of(study) * study.subject.store.d_model
    return Needed(of_sae(study.subject) + hidden, "answers.questions")


def caa(hidden: ArrayLike, correct: NDArray[np.bool_]) -> Floats:
    """(d,) unit direction from wrong to right answers.

    It is mean(h | correct) - mean(h | wrong), scaled (Rimsky et al., arXiv 2312.06681).

    Args:
        hidden: (n, d) one layer's means.
        correct: (n,); both values occur.

    Raises:
        StoreError: the means are equal.
    """
    x = np.asarray(hidden, np.float64)
    difference = x[correct].mean(0) - x[~correct].mean(0)
    length = np.linalg.norm(difference)
    if not length:
        raise StoreError(
            "right and wrong answers have the same mean, so no direction tells them apart; more "
            "problems="
        )
    return np.asarray(difference / length, np.float64)
