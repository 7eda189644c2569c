"""What in the residuals, and which SAE features, tell right answers from wrong ones; at which
layer, and how surely.

Every answer is read once, prompt and completion, and its residuals at all layers and its SAE
features are averaged over the tokens of the completion. Those means are kept for every study that
wants them (`answer_means`).

d is Cohen's with Hedges' correction, right minus wrong. Where each question has one answer, its
null shuffles labels over all of them. Labelled solutions come several to a question, and are
compared within it: questions that have both a right and a wrong one take part, and labels are
shuffled within each. The adjusted d holds equal the length, whether the answer finished, who wrote
it if several did, and then the question (see `effects.Design.adjusted`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from analyze import answering
from analyze.answering import Answer
from analyze.language_model import residuals
from analyze.outcome import Outcome, dumped
from analyze.results import FEATURES, digest_of
from analyze.stats import Floats
from analyze.studies.contrast import effects
from analyze.studies.contrast.effects import Design
from analyze.studies.contrast.words import (
    TOP,
    Features,
    Findings,
    Layer,
    figures,
    lists,
    of_features,
    pictures,
    summary,
    tables,
)
from analyze.study import Column, Definition, Study, write_features
from data import durable
from data.errors import NonFiniteError, SettingError, StopRequest, StoreError
from data.journal import Progress, tell
from data.settings import build
from train.kernels import latent_sums

VERSION = 1  # of the means: raise it when the same answers give others
_HIDDEN, _FEATURES = "hidden.npy", "features.npz"
_LEAST = 5  # right answers, and wrong ones: with fewer no p value of 32,768 features can be small
_BOOTSTRAPS, _SPLITS = 1000, 100


# -- means -----------------------------------------------------------------------------------------


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


def answer_means(study: Study, answers: Sequence[Answer], stop: StopRequest) -> Means:
    """The means of `answers`, in their order, by one forward pass each; read back if the same were
    asked for before.

    They are kept for all studies of the run. `hidden` is mapped from its file, which has it layer
    by layer: 2.3 GB of 5,276 answers at Gemma 4 E4B's 42 x 2,560.

    Raises:
        SettingError: there is no answer, or one does not fit in the model's context.
        NonFiniteError: a residual is NaN or infinite.
    """
    if not answers:
        raise SettingError("there is no answer to average over; give more with answers.questions=")
    texts = [(one.prompt_ids, one.ids) for one in answers]
    key = {"version": VERSION, **study.identity, "texts": digest_of({"ids": texts})}
    folder = study.kept("means", key, lambda new: _write(new, *_measured(study, answers, stop)))
    return Means(
        *_read(folder),
        length=np.array([len(one.ids) for one in answers]),
        finished=np.array([one.finished for one in answers]),
        correct=np.array([one.correct for one in answers]),
        question=np.array([one.problem.id for one in answers]),
    )


def caa(hidden: ArrayLike, correct: NDArray[np.bool_]) -> Floats:
    """(d,) unit direction from wrong to right, mean(h | correct) - mean(h | wrong) (Rimsky et al.,
    arXiv 2312.06681).

    Args:
        hidden: (n, d) one layer's means.
        correct: (n,); both values occur.

    Raises:
        StoreError: the means are equal.
    """
    x = np.asarray(hidden, np.float64)
    difference = x[correct].mean(0) - x[~correct].mean(0)
    if not (length := np.linalg.norm(difference)):
        raise StoreError(
            "right and wrong answers have the same mean, so no direction tells them apart; more problems="
        )
    return np.asarray(difference / length, np.float64)


def _measured(
    study: Study, answers: Sequence[Answer], stop: StopRequest
) -> tuple[NDArray[np.float32], Any]:
    """(layers, n, d) and (n, F)."""
    lm, sae, at = study.lm, study.subject.sae, study.subject.layer
    if (longest := max(len(one.sequence) for one in answers)) > lm.max_context:
        raise SettingError(
            f"an answer has {longest} tokens with its prompt, the model's context {lm.max_context}; lower "
            "answers.new_tokens, or leave its question out"
        )
    hidden = np.empty((lm.n_layers, len(answers), lm.d_model), np.float32)
    rows: dict[int, Any] = {}
    progress = Progress()
    for number, states in residuals(lm, [one.sequence for one in answers], range(lm.n_layers)):
        stop.check()
        one = answers[number]
        inside = slice(len(one.prompt_ids) - (not one.ids), None)
        means = torch.stack([states[layer][inside].float().mean(0) for layer in range(lm.n_layers)])
        hidden[:, number] = means.cpu().numpy()  # device sync, once an answer
        kept = sae.encode(states[at][inside].float())
        sums = latent_sums(kept.values, kept.indices, sae.d_sae).cpu().numpy()
        rows[number] = sparse.csr_array(sums[None] / max(len(one.ids), 1))
        progress.show(f"{len(rows)}/{len(answers)} answers read", last=len(rows) == len(answers))
    if not np.isfinite(hidden).all():
        raise NonFiniteError(
            "a residual is NaN or infinite; run the model in another dtype with model.dtype=float32"
        )
    return hidden, sparse.vstack([rows[number] for number in range(len(answers))], format="csr")


def _write(folder: Path, hidden: NDArray[np.float32], features: Any) -> None:
    """Write means into a folder: `hidden` (layers, n, d) and `features` (n, F)."""
    header, parts = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(hidden))
    durable.write(folder / _HIDDEN, [header.getbuffer(), hidden.data.cast("B")])
    np.savez(
        parts,
        data=features.data,
        indices=features.indices,
        indptr=features.indptr,
        shape=features.shape,
    )
    durable.write(folder / _FEATURES, [parts.getbuffer()])


def _read(folder: Path) -> tuple[NDArray[np.float32], Any]:
    """Hidden (n, layers, d) and features (n, F) from a folder."""
    with np.load(folder / _FEATURES) as parts:
        matrix = (parts["data"], parts["indices"], parts["indptr"])
        features = sparse.csr_array(matrix, shape=tuple(parts["shape"]))
    # Copy on write: torch warns of arrays that it may not write to.
    hidden = np.load(folder / _HIDDEN, mmap_mode="c")
    return hidden.transpose(1, 0, 2), features


# -- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/contrast.yaml."""

    permutations: int = 1000
    min_firing: int = 5  # answers in which a feature fires, for it to be tested
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("permutations", 19), ("min_firing", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"study.{name}={getattr(self, name)} must be at least {least}")


def contrast(study: Study) -> Outcome:
    """Cohen's d of every dimension at every layer and of every feature, each against shuffled
    labels.

    Leaves cohens_d.npy (layers, d), of every layer steering_vec_L{layer}.pt (`caa` of the same
    answers), and contrastive_features_L{layer}.json, and features.parquet with the figures of every
    feature that was tested.
    """
    options = build(Options, "study", study.options)
    with StopRequest() as stop:
        answers = answering.answers(study, stop)
        found = compare(
            answer_means(study, answers, stop), [one.source for one in answers], options, stop
        )
    for layer, one in enumerate(found.layers):
        _save(study.folder / f"steering_vec_L{layer}.pt", one.caa)
    buffer, at = io.BytesIO(), study.subject.layer
    np.save(buffer, np.array([layer.raw.d for layer in found.layers], np.float32))
    durable.write(study.folder / "cohens_d.npy", [buffer.getbuffer()])
    chosen = {"layer": at, **lists(found), "options": vars(options)}
    durable.write(study.folder / f"contrastive_features_L{at}.json", [dumped(chosen).encode()])
    if of_all := of_features(found):
        write_features(study.folder / FEATURES, of_all)
    known = {**figures(found), "options": vars(options)}
    return Outcome(known, summary(known), tables(known), pictures(found))


def compare(means: Means, sources: Sequence[str], options: Options, stop: StopRequest) -> Findings:
    """Right answers against wrong ones, layer by layer, so that one layer's effects are in memory
    at a time.

    Args:
        sources: (n,) who wrote each.
    """
    kept, paired = comparable(means)
    correct, question = means.correct[kept], means.question[kept]
    covariates = _covariates(means, np.array(sources), kept)
    design = Design.of(
        correct,
        question,
        np.array([*covariates.values()]).reshape(len(covariates), len(kept)).T,
        paired=paired,
        shuffles=options.permutations,
        seed=options.seed,
    )
    splits = effects.split(design, _SPLITS, np.random.default_rng([options.seed, 1]))
    times = effects.drawn(design.cluster, _BOOTSTRAPS, np.random.default_rng([options.seed, 2]))
    layers: list[Layer] = []
    progress, total = Progress(), means.hidden.shape[1]
    for layer in range(total):
        stop.check()
        x = means.hidden[kept, layer]
        layers.append(
            Layer(
                raw=effects.tested(x, design.raw, TOP),
                adjusted=effects.tested(x, design.adjusted, TOP) if design.adjusted else None,
                drawn=effects.drawn_top(x, correct, times, TOP),
                halves=effects.halves(x, splits, TOP),
                caa=caa(x, correct),
            )
        )
        progress.show(f"{layer + 1}/{total} layers compared", last=layer + 1 == total)
    stop.check()
    tell("comparing features")
    features = _features(means.features[kept].tocsc(), design, splits, options.min_firing)
    return Findings(design, question, covariates, layers, features)


def comparable(means: Means) -> tuple[NDArray[np.int64], bool]:
    """Which answers are compared, and whether within questions. Answers without a token are left
    out.

    Raises:
        SettingError: too few of them are right, or wrong.
    """
    there = means.length > 0
    _, question = np.unique(means.question, return_inverse=True)
    paired = bool(np.bincount(question[there]).max(initial=0) > 1)
    if paired:
        right, wrong = (
            np.bincount(question[there & label], minlength=question.max() + 1)
            for label in _both(means)
        )
        there &= ((right > 0) & (wrong > 0))[question]
    counts = [int((there & label).sum()) for label in _both(means)]
    if min(counts) < _LEAST:
        among = " of questions that have both" if paired else ""
        raise SettingError(
            f"{counts[0]} right and {counts[1]} wrong answers{among} are too few to tell apart, at least {_LEAST} of "
            "each are needed; ask more with answers.questions=, or harder or easier ones with problems="
        )
    return np.flatnonzero(there), paired


def _both(means: Means) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    return means.correct, ~means.correct


def _covariates(
    means: Means, sources: NDArray[np.str_], kept: NDArray[np.int64]
) -> dict[str, Floats]:
    """What else answers differ by, (n,) each: those that do differ."""
    known = {"log length": np.log(means.length[kept]), "finished": means.finished[kept]}
    writers = np.unique(sources[kept])[1:]  # the first is who none of the others is
    known |= {f"by {writer}": sources[kept] == writer for writer in writers}
    return {
        name: values.astype(np.float64)
        for name, values in known.items()
        if np.ptp(values.astype(np.float64))
    }


def _features(every: Any, design: Design, splits: effects.Splits, least: int) -> Features:
    """Of the csc_array (n, F)."""
    ids = np.flatnonzero(np.diff(every.indptr) >= least)
    x = every[:, ids]
    fired = np.diff(x.indptr)
    if not len(ids):
        return Features(ids, fired)
    adjusted = None
    if design.adjusted:
        adjusted = (
            effects.tested(x, design.adjusted, TOP),
            effects.rank_p(x, fired, design.correct, design.adjusted),
        )
    right, wrong = (
        np.asarray(x[label].mean(axis=0), np.float64) for label in (design.correct, ~design.correct)
    )
    raw = (
        effects.tested(x, design.raw, TOP),
        effects.rank_p(x, fired, design.correct, design.within),
    )
    return Features(ids, fired, (right, wrong), raw, adjusted, effects.halves(x, splits, TOP))


def _save(path: Path, direction: Floats) -> None:
    """A plain float32 tensor (d,) that opens with weights_only."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(direction).float(), buffer)
    durable.write(path, [buffer.getbuffer()])


DEFINITION = Definition(
    contrast,
    options=Options,
    inputs=answering.inputs,
    order=30,
    columns=(
        Column(
            "d", "d", "contrast d", "Hedges' d of right answers over wrong ones (study=contrast)"
        ),
        Column("q", "d_q", "its q", "false discovery rate of d by a rank test"),
    ),
)
