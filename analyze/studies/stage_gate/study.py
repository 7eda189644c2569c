"""The stage gate: may a handful of SAE features serve as a reward?

    R = sum of 10 helpful - sum of 10 harmful features, each averaged over the answer's tokens

Features are chosen by Hedges' g on the discovery questions alone. Everything that is said of R is
measured on the validation questions. A question falls to one side by its id's hash, with all its
answers. Against yes/no labels Spearman's rho cannot pass sqrt(3 p (1 - p)), so AUROC stands first,
and rho beside its cap.

R stands beside what costs less: the answer's length, its mean log-probability, the raw direction
(CAA) and a logistic probe on the mean residual of the SAE's layer, all fitted on discovery too, and
sets of as many random features.

Intervals resample questions; the choice of features is held fixed. Permutations: see
discrimination.py.

Shapes: n answers, d d_model, F latents.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analyze.answering import Answer, answers, inputs, model_key
from analyze.language_model import Prediction, batch_tokens, batches, blocks, logits
from analyze.outcome import Outcome
from analyze.parts import Arrays, Parts
from analyze.results import digest_of
from analyze.stats import (
    Floats,
    auroc,
    hedges_g,
    percentiles,
    permutation_p,
    spearman,
    spearman_cap,
)
from analyze.studies.contrast.means import Means, answer_means, caa
from analyze.studies.stage_gate.discrimination import Scored, measured
from analyze.studies.stage_gate.probe import cross_validated
from analyze.studies.stage_gate.words import LENGTH, SCORE, picture, summary, tables
from analyze.study import Definition, Study
from data import durable
from data.errors import SettingError, StopRequest
from data.journal import Progress
from data.settings import build

VERSION = 1  # of the kept log-probabilities: raise it when the same answers give other ones
EACH = 10  # helpful features, and harmful ones
PASSING_RHO = 0.30  # the reference's pass mark
_LEVEL = 0.05
_LEAST = 5  # right answers, and wrong ones, on either side
_SEED = 0
_WIDTH = 4096  # features held dense at a time
_FILE = "log_probabilities.npy"
_PARTS = "parts"  # of them, by batch, until all answers are read
RULE = (
    f"pass if rho >= {PASSING_RHO:.2f}, its permutation p < {_LEVEL}, the AUROC's 95 % interval is "
    f"above 0.5, and that of rho given length above 0; weak if p < {_LEVEL} and not all of these; "
    "else fail"
)


@dataclass(frozen=True)
class Options:
    """The settings of conf/study/stage_gate.yaml."""

    discovery: float = 0.5  # share of the questions
    min_firing: int = 5  # discovery answers in which a feature fires, for it to be chosen
    draws: int = 1000  # permutations, resamplings, and sets of random features

    def __post_init__(self) -> None:
        if not 0 < self.discovery < 1:
            raise SettingError(
                f"study.discovery={self.discovery} must be above 0 and below 1, such as 0.5"
            )
        for name, least in (("min_firing", 1), ("draws", 20)):
            value = getattr(self, name)
            if value < least:
                raise SettingError(f"study.{name}={value} must be at least {least}")


def stage_gate(study: Study) -> Outcome:
    """The verdict by `RULE`, with the figures of R and its baselines on validation questions."""
    options = build(Options, "study", study.options)
    with StopRequest() as stop:
        answered = [answer for answer in answers(study, stop) if answer.ids]
        means = answer_means(study, answered, stop)
        log_probability = log_probabilities(study, answered, stop)
        figures = judge(means, log_probability, study.subject.layer, options, stop)
    return Outcome(figures, summary(figures), tables(figures), {"auroc": picture(figures)})


# -- features --------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """Features by their effect on the discovery answers, the largest first."""

    helpful: NDArray[np.int64]
    harmful: NDArray[np.int64]
    g: Floats  # (F,) Hedges', right minus wrong; 0 where a feature was not eligible
    eligible: NDArray[np.int64]  # those that fire in enough discovery answers

    def weights(self) -> Floats:
        """(F,) 1, -1 or 0."""
        weights = np.zeros(len(self.g))
        weights[self.helpful] = 1
        weights[self.harmful] = -1
        return weights


def in_discovery(question: NDArray[np.str_], share: float) -> NDArray[np.bool_]:
    """(n,) whether an answer's question is for discovery: a function of the question's id alone."""
    ids, number = np.unique(question, return_inverse=True)
    positions = []
    for name in ids:
        digest = durable.digest(f"stage gate {name}".encode())
        positions.append(int(digest[:13], 16) / 16**13)  # in [0, 1)
    return np.asarray(np.array(positions)[number] < share)


def choose(features: Any, correct: NDArray[np.bool_], min_firing: int) -> Chosen:
    """The features that differ most between right and wrong answers, at most EACH either way.

    Args:
        features: (n, F) scipy CSR of the discovery answers' means.
        min_firing: answers in which a feature must fire.
    """
    columns = features.tocsc()
    fired = np.diff(columns.indptr)
    eligible = np.flatnonzero(fired >= min_firing)
    g = np.zeros(features.shape[1])
    for start in range(0, len(eligible), _WIDTH):
        some = eligible[start : start + _WIDTH]
        g[some] = hedges_g(columns[:, some].toarray().astype(np.float64), correct)
    order = eligible[np.argsort(-g[eligible], kind="stable")]
    helpful = order[:EACH]
    harmful = order[::-1][:EACH]
    return Chosen(helpful[g[helpful] > 0], harmful[g[harmful] < 0], g, eligible)


def random_features(
    features: Any, correct: NDArray[np.bool_], chosen: Chosen, draws: int, stop: StopRequest
) -> Floats:
    """(draws,) AUROC of random features, as many added and as many subtracted as were chosen.

    Args:
        features: (n, F) of the validation answers.
    """
    rng = np.random.default_rng(_SEED)
    signs = np.array([1.0] * len(chosen.helpful) + [-1.0] * len(chosen.harmful))
    columns = features.tocsc()[:, chosen.eligible]
    aurocs = np.empty(draws)
    for draw in range(draws):
        stop.check()
        some = rng.choice(len(chosen.eligible), len(signs), replace=False)
        aurocs[draw] = auroc(np.asarray(columns[:, some] @ signs).ravel(), correct)
    return aurocs


# -- scores of answers -----------------------------------------------------------------------------

# Of inputs (n, d), labels (n,) and questions (n,) a function of inputs to scores (n,).
FitProbe = Callable[
    [Floats, NDArray[np.bool_], NDArray[np.str_]],
    Callable[[Floats], Floats],
]


def scores(
    means: Means,
    log_probability: Floats,
    layer: int,
    chosen: Chosen,
    discovery: NDArray[np.bool_],
    fit_probe: FitProbe = cross_validated,
) -> dict[str, Floats]:
    """By name (n,) scores of all answers, fitted on discovery: higher means right.

    Length and log-probability take the sign that their rank correlation has there.
    """
    hidden = np.asarray(means.hidden[:, layer], np.float64)
    correct = means.correct
    probe = fit_probe(hidden[discovery], correct[discovery], means.question[discovery])

    def signed(values: Floats) -> Floats:
        return values if spearman(values[discovery], correct[discovery]) >= 0 else -values

    return {
        SCORE: np.asarray(means.features @ chosen.weights(), np.float64).ravel(),
        LENGTH: signed(means.length.astype(np.float64)),
        "mean log-probability": signed(log_probability),
        "raw direction (CAA)": hidden @ caa(hidden[discovery], correct[discovery]),
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


# -- the judgement ---------------------------------------------------------------------------------


def verdict(own: dict[str, Any]) -> tuple[str, list[str]]:
    """`pass`, `weak` or `fail` by `RULE`, and the conditions of a pass that do not hold.

    Args:
        own: R's figures, see `discrimination.measured`.
    """
    conditions = {
        f"rho >= {PASSING_RHO:.2f}": own["rho"]["value"] >= PASSING_RHO,
        f"p < {_LEVEL}": own["p"] < _LEVEL,
        "AUROC above 0.5": own["auroc"]["interval"].low > 0.5,
        "rho given length above 0": own["rho_given_length"]["interval"].low > 0,
    }
    missing = [name for name, holds in conditions.items() if not holds]
    if not missing:
        return "pass", missing
    return ("weak" if own["p"] < _LEVEL else "fail"), missing


def judge(
    means: Means,
    log_probability: Floats,
    layer: int,
    options: Options,
    stop: StopRequest,
    fit_probe: FitProbe = cross_validated,
) -> dict[str, Any]:
    """Everything but words, of answers that have tokens.

    Args:
        log_probability: (n,) see `log_probabilities`.
        layer: of the direction and the probe.

    Raises:
        SettingError: too few right or wrong answers on one side, or no feature fires in enough of
            them.
    """
    # On discovery: the features and every score's parameters.
    discovery = in_discovery(means.question, options.discovery)
    _require_both("discovery", means.correct[discovery])
    _require_both("validation", means.correct[~discovery])
    chosen = choose(means.features[discovery], means.correct[discovery], options.min_firing)
    if not len(chosen.helpful) and not len(chosen.harmful):
        raise SettingError(
            f"no feature fires in {options.min_firing} discovery answers and differs between right "
            "and wrong; lower study.min_firing, or give more answers.questions"
        )
    every = scores(means, log_probability, layer, chosen, discovery, fit_probe)

    # On validation: how well the scores tell right from wrong.
    held = np.flatnonzero(~discovery)
    correct = means.correct[held]
    _, question = np.unique(means.question[held], return_inverse=True)
    of_held = {name: values[held] for name, values in every.items()}
    scored = Scored(of_held, correct, means.length[held], question)
    figures = measured(scored, SCORE, options.draws, _SEED, stop)
    by_chance = random_features(means.features[held], correct, chosen, options.draws, stop)

    word, missing = verdict(figures[SCORE])
    return {
        "verdict": word,
        "missing": missing,
        "rule": RULE,
        "seed": _SEED,
        "options": vars(options),
        "layer": layer,
        "helpful": _with_g(chosen, chosen.helpful),
        "harmful": _with_g(chosen, chosen.harmful),
        "eligible": len(chosen.eligible),
        "discovery": _side(means, discovery),
        "validation": _side(means, ~discovery),
        "cap": spearman_cap(float(correct.mean())),
        "scores": figures,
        "random_features": {
            "median": float(np.median(by_chance)),
            "interval": percentiles(by_chance),
            "p": permutation_p(figures[SCORE]["auroc"]["value"], by_chance),
        },
    }


def _require_both(side: str, correct: NDArray[np.bool_]) -> None:
    """Raise SettingError unless a side has enough right answers, and wrong ones."""
    right = int(correct.sum())
    wrong = len(correct) - right
    if min(right, wrong) < _LEAST:
        raise SettingError(
            f"the {side} questions have {right} right and {wrong} wrong answers, and {_LEAST} of "
            "each are needed; give more with answers.questions=, or another share with "
            "study.discovery="
        )


def _with_g(chosen: Chosen, features: NDArray[np.int64]) -> list[dict[str, Any]]:
    return [{"feature": int(feature), "g": chosen.g[feature]} for feature in features]


def _side(means: Means, mask: NDArray[np.bool_]) -> dict[str, Any]:
    correct = means.correct[mask]
    ids = np.unique(means.question[mask])
    return {"answers": len(correct), "right": int(correct.sum()), "questions": len(ids), "ids": ids}


DEFINITION = Definition(stage_gate, version=1, options=Options, inputs=inputs, order=50)
