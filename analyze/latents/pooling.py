"""What texts look like inside the model: residuals and latents, pooled over each text's tokens.

Every text is read once. Its states at some hook points, and the latents of some dictionaries of the
run's kind, become one row each: their mean, their maximum, or those of the last token. The rows are
kept for every study that asks for the same.

Shapes: n texts, P hook points, t tokens of a text, d d_model, F latents.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from residual_saes.analyze.language_model import batch_tokens, batches, residuals
from residual_saes.analyze.parts import Arrays, Parts
from residual_saes.analyze.study import Study
from residual_saes.data import durable
from residual_saes.data.errors import NonFiniteError, SettingError, StopRequest
from residual_saes.data.journal import Progress
from residual_saes.data.site import HookPoint
from residual_saes.train.kernels import latent_sums
from residual_saes.train.sae import SAE

MEAN, LAST, MAX = "mean", "last", "max"
POOLINGS = (MEAN, LAST, MAX)
_VERSION = 2  # of what is kept: raise it when the same texts give other rows
_HIDDEN = "hidden.npy"
_PARTS = "parts"  # of all files, by batch, until all texts are read


class Span(NamedTuple):
    """A text, and what of it is pooled."""

    ids: list[int]  # with BOS: what the model reads
    first: int  # the pooled tokens are ids[first:], at least one


class Reading(NamedTuple):
    """What is taken of every text."""

    points: Sequence[HookPoint]
    saes: Sequence[SAE]  # at least one; each reads what the run's own reads
    pooling: str  # one of POOLINGS
    noun: str  # what messages call a text


class Pooled(NamedTuple):
    """What is known of n texts."""

    hidden: NDArray[np.float32]  # (n, P, d)
    features: list[Any]  # of each dictionary a scipy.sparse.csr_array (n, F) float32
    firings: list[Any]  # likewise, int32: on how many of a text's pooled tokens a latent fires


def pooled(
    study: Study,
    name: str,
    key: Mapping[str, Any],
    spans: Sequence[Span],
    reading: Reading,
    stop: StopRequest,
) -> Pooled:
    """The rows of the texts, in their order; kept as NAME under `key`, see `Study.kept`.

    `hidden` is mapped from its file, which has it point by point: 2.3 GB for 5,276 texts at Gemma 4
    E4B's 42 layers of 2,560.

    Args:
        key: all that they follow from, with the version of the code that asks.

    Raises:
        SettingError: a text does not fit in the model's context.
        NonFiniteError: a residual is NaN or infinite.
    """

    def fill(folder: Path) -> None:
        parts = Parts(folder / _PARTS)
        _write(folder, _measured(study, spans, reading, parts, stop))
        parts.remove()

    return _read(study.kept(name, {**key, "pooled": _VERSION}, fill), len(reading.saes))


# -- the pass --------------------------------------------------------------------------------------


def _measured(
    study: Study, spans: Sequence[Span], reading: Reading, parts: Parts, stop: StopRequest
) -> Pooled:
    """The rows, by one forward pass per text."""
    lm = study.lm
    noun = reading.noun
    longest = max(len(span.ids) for span in spans)
    if longest > lm.max_context:
        raise SettingError(
            f"one {noun} has {longest} tokens with what is before it, and the model's context is "
            f"{lm.max_context}; lower answers.new_tokens, or leave it out"
        )
    hidden = np.empty((len(reading.points), len(spans), lm.d_model), np.float32)
    rows: list[dict[int, Any]] = [{} for _ in reading.saes]
    counts: list[dict[int, Any]] = [{} for _ in reading.saes]
    progress = Progress()
    sequences = [span.ids for span in spans]
    for index, (numbers, _) in enumerate(batches(sequences, batch_tokens(lm))):
        stop.check()
        batch = [spans[number] for number in numbers]
        part = parts.of(index, partial(_of_batch, study, batch, reading))
        hidden[:, numbers] = part["hidden"]
        for into, array in ((rows, "data"), (counts, "firings")):
            for of_sae, (sae, suffix) in zip(into, _suffixes(reading.saes), strict=True):
                csr = (part[array + suffix], part[f"indices{suffix}"], part[f"indptr{suffix}"])
                matrix = sparse.csr_array(csr, shape=(len(numbers), sae.d_sae))
                for row, number in enumerate(numbers):
                    of_sae[number] = matrix[[row]]
        done = len(rows[0])
        progress.show(f"{done}/{len(spans)} {noun}s read", last=done == len(spans))
    if not np.isfinite(hidden).all():
        raise NonFiniteError(
            "a residual is NaN or infinite; run the model in another dtype with model.dtype=float32"
        )
    stacked = []
    for of_sae in (*rows, *counts):
        in_order = [of_sae[number] for number in range(len(spans))]
        stacked.append(sparse.vstack(in_order, format="csr"))
    return Pooled(hidden.transpose(1, 0, 2), stacked[: len(rows)], stacked[len(rows) :])


def _of_batch(study: Study, batch: Sequence[Span], reading: Reading) -> Arrays:
    """Of texts that are read together: hidden (P, b, d), and features (b, F) as CSR.

    `firings` are those of the features that `data` has, in the same order.
    """
    points = [*reading.points, *(port.point for port in study.subject.ports.reads)]
    hidden = np.empty((len(reading.points), len(batch), study.lm.d_model), np.float32)
    rows: list[list[Any]] = [[None] * len(batch) for _ in reading.saes]
    counts: list[list[Any]] = [[None] * len(batch) for _ in reading.saes]
    for row, states in residuals(study.lm, [span.ids for span in batch], points):
        first = batch[row].first
        taken = [_pool(states[point][first:].float(), reading.pooling) for point in reading.points]
        if taken:
            hidden[:, row] = torch.stack(taken).cpu().numpy()  # device sync, once a text
        read = study.subject.states(states)[first:]
        for number, sae in enumerate(reading.saes):
            rows[number][row], counts[number][row] = _latents(sae, read, reading.pooling)
    arrays = {"hidden": hidden}
    for number, (_, suffix) in enumerate(_suffixes(reading.saes)):
        matrix = sparse.vstack(rows[number], format="csr")
        for name in ("data", "indices", "indptr"):
            arrays[name + suffix] = getattr(matrix, name)
        arrays[f"firings{suffix}"] = np.concatenate(counts[number])
    return arrays


def _suffixes(saes: Sequence[SAE]) -> list[tuple[SAE, str]]:
    """What names of files and arrays of each dictionary end with; nothing for the first."""
    return [(sae, f"_{number}" if number else "") for number, sae in enumerate(saes)]


def _pool(rows: Tensor, pooling: str) -> Tensor:
    """(d,) of rows (t, d)."""
    if pooling == MEAN:
        return rows.mean(0)
    return rows[-1] if pooling == LAST else rows.amax(0)


def _latents(sae: SAE, rows: Tensor, pooling: str) -> tuple[Any, NDArray[np.int32]]:
    """(1, F) sparse, of the latents of rows (t, d); and in how many rows each of these fires."""
    rows = rows[-1:] if pooling == LAST else rows
    firings = sae.encode(rows)
    if pooling == MAX:
        most = firings.values.new_zeros(sae.d_sae)
        found = most.scatter_reduce_(0, firings.indices, firings.values, "amax")
    else:
        found = latent_sums(firings.values, firings.indices, sae.d_sae)
    fires = (firings.values > 0).float()
    counts = latent_sums(fires, firings.indices, sae.d_sae).cpu().numpy().astype(np.int32)
    values = found.cpu().numpy()
    matrix = sparse.csr_array(values[None] / (len(rows) if pooling == MEAN else 1))
    return matrix, counts[matrix.indices]


# -- files -----------------------------------------------------------------------------------------


def _write(folder: Path, made: Pooled) -> None:
    """Write the rows into a folder, hidden as (P, n, d)."""
    hidden = made.hidden.transpose(1, 0, 2)
    header = io.BytesIO()  # apart from the array, which is not copied
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(hidden))
    durable.write(folder / _HIDDEN, [header.getbuffer(), hidden.data.cast("B")])
    pairs = zip(made.features, made.firings, strict=True)
    for number, (matrix, firings) in enumerate(pairs):
        arrays = io.BytesIO()
        np.savez(
            arrays,
            data=matrix.data,
            firings=firings.data,
            indices=matrix.indices,
            indptr=matrix.indptr,
            shape=matrix.shape,
        )
        durable.write(folder / _file(number), [arrays.getbuffer()])


def _read(folder: Path, dictionaries: int) -> Pooled:
    features: list[Any] = []
    firings: list[Any] = []
    for number in range(dictionaries):
        with np.load(folder / _file(number)) as arrays:
            for into, name in ((features, "data"), (firings, "firings")):
                matrix = (arrays[name], arrays["indices"], arrays["indptr"])
                into.append(sparse.csr_array(matrix, shape=tuple(arrays["shape"])))
    # Copy on write: torch warns of arrays that it may not write to.
    hidden = np.load(folder / _HIDDEN, mmap_mode="c")
    return Pooled(hidden.transpose(1, 0, 2), features, firings)


def _file(number: int) -> str:
    return f"features_{number}.npz" if number else "features.npz"
