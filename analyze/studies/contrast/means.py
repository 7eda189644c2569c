"""What answers look like inside the model: residuals and SAE features, averaged over each answer.

Every answer is read once, prompt and completion. Its residuals at all layers, and its SAE features
at the SAE's layer, are averaged over the tokens of the completion. The means are kept for every
study that wants them.

Shapes: n answers, d d_model, F latents.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from torch import Tensor

from analyze.answering import Answer, model_key, number_of
from analyze.language_model import batch_tokens, batches, residuals
from analyze.memory import Needed, of_sae
from analyze.parts import Arrays, Parts
from analyze.results import digest_of
from analyze.stats import Floats
from analyze.study import Study
from data import durable
from data.errors import NonFiniteError, SettingError, StopRequest, StoreError
from data.journal import Progress
from data.site import HookPoint
from train.kernels import latent_sums

VERSION = 1  # of the kept means: raise it when the same answers give other ones
_HIDDEN = "hidden.npy"
_FEATURES = "features.npz"
_PARTS = "parts"  # of both, by batch, until all answers are read


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


def answer_means(study: Study, answers: Sequence[Answer], stop: StopRequest) -> Means:
    """The means of `answers`, in their order; read back if the same were asked for before.

    `hidden` is mapped from its file, which has it layer by layer: 2.3 GB for 5,276 answers at Gemma
    4 E4B's 42 x 2,560.

    Raises:
        SettingError: there is no answer, or one does not fit in the model's context.
        NonFiniteError: a residual is NaN or infinite.
    """
    if not answers:
        raise SettingError("there is no answer to average over; give more with answers.questions=")

    def fill(folder: Path) -> None:
        parts = Parts(folder / _PARTS)
        hidden, features = _measured(study, answers, parts, stop)
        _write(folder, hidden, features)
        parts.remove()

    texts = [(answer.prompt_ids, answer.ids) for answer in answers]
    model = {**study.identity, **model_key(study)}
    key = {"version": VERSION, **model, "texts": digest_of({"ids": texts})}
    hidden, features = _read(study.kept("means", key, fill))
    return Means(
        hidden=hidden,
        features=features,
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


# -- the pass --------------------------------------------------------------------------------------


def _measured(
    study: Study, answers: Sequence[Answer], parts: Parts, stop: StopRequest
) -> tuple[NDArray[np.float32], Any]:
    """Hidden (layers, n, d) and features (n, F), by one forward pass per answer."""
    lm = study.lm
    longest = max(len(answer.sequence) for answer in answers)
    if longest > lm.max_context:
        raise SettingError(
            f"an answer has {longest} tokens with its prompt, the model's context "
            f"{lm.max_context}; lower answers.new_tokens, or leave its question out"
        )
    hidden = np.empty((lm.n_layers, len(answers), lm.d_model), np.float32)
    features: dict[int, Any] = {}
    progress = Progress()
    sequences = [answer.sequence for answer in answers]
    for index, (numbers, _) in enumerate(batches(sequences, batch_tokens(lm))):
        stop.check()
        batch = [answers[number] for number in numbers]

        def make(batch: Sequence[Answer] = batch) -> Arrays:
            return _of_batch(study, batch)

        part = parts.of(index, make)
        hidden[:, numbers] = part["hidden"]
        rows = (part["data"], part["indices"], part["indptr"])
        matrix = sparse.csr_array(rows, shape=(len(numbers), study.subject.sae.d_sae))
        for row, number in enumerate(numbers):
            features[number] = matrix[[row]]
        done = len(features)
        progress.show(f"{done}/{len(answers)} answers read", last=done == len(answers))
    if not np.isfinite(hidden).all():
        raise NonFiniteError(
            "a residual is NaN or infinite; run the model in another dtype with model.dtype=float32"
        )
    in_order = [features[number] for number in range(len(answers))]
    return hidden, sparse.vstack(in_order, format="csr")


def _of_batch(study: Study, batch: Sequence[Answer]) -> Arrays:
    """Hidden (layers, b, d), and features (b, F) as CSR, of answers that are read together."""
    lm = study.lm
    layers = [HookPoint(layer) for layer in range(lm.n_layers)]
    points = [*layers, *(port.point for port in study.subject.ports.reads)]
    hidden = np.empty((lm.n_layers, len(batch), lm.d_model), np.float32)
    features: dict[int, Any] = {}
    for row, states in residuals(lm, [answer.sequence for answer in batch], points):
        first = len(batch[row].prompt_ids)
        if not batch[row].ids:
            first -= 1
        means = torch.stack([states[layer][first:].float().mean(0) for layer in layers])
        hidden[:, row] = means.cpu().numpy()  # device sync, once an answer
        features[row] = _mean_features(study, study.subject.states(states)[first:])
    matrix = sparse.vstack([features[row] for row in range(len(batch))], format="csr")
    csr = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr}
    return {"hidden": hidden, **csr}


def _mean_features(study: Study, rows: Tensor) -> Any:
    """(1, F) sparse mean of the SAE's latents over rows (t, d)."""
    sae = study.subject.sae
    firings = sae.encode(rows)
    sums = latent_sums(firings.values, firings.indices, sae.d_sae).cpu().numpy()
    return sparse.csr_array(sums[None] / len(rows))


# -- files -----------------------------------------------------------------------------------------


def _write(folder: Path, hidden: NDArray[np.float32], features: Any) -> None:
    """Write hidden (layers, n, d) and features (n, F) into a folder."""
    header = io.BytesIO()  # apart from the array, which is not copied
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(hidden))
    durable.write(folder / _HIDDEN, [header.getbuffer(), hidden.data.cast("B")])
    arrays = io.BytesIO()
    np.savez(
        arrays,
        data=features.data,
        indices=features.indices,
        indptr=features.indptr,
        shape=features.shape,
    )
    durable.write(folder / _FEATURES, [arrays.getbuffer()])


def _read(folder: Path) -> tuple[NDArray[np.float32], Any]:
    """Hidden (n, layers, d) and features (n, F) from a folder."""
    with np.load(folder / _FEATURES) as arrays:
        matrix = (arrays["data"], arrays["indices"], arrays["indptr"])
        features = sparse.csr_array(matrix, shape=tuple(arrays["shape"]))
    # Copy on write: torch warns of arrays that it may not write to.
    hidden = np.load(folder / _HIDDEN, mmap_mode="c")
    return hidden.transpose(1, 0, 2), features
