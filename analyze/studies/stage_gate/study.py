"""The stage gate: may a handful of SAE features serve as a reward?

    R = sum of 10 helpful - sum of 10 harmful features, each averaged over the answer's tokens

Features are chosen by Hedges' g on the discovery questions alone; everything that is said of R is
measured on the validation questions. A question falls to one side by its id's hash, with all its
answers. Against yes/no labels Spearman's rho cannot pass sqrt(3 p (1 - p)), so AUROC stands first
and rho beside its cap. R stands beside what costs less: the answer's length, its mean
log-probability, the raw direction (CAA) and a logistic probe on the mean residual of the SAE's
layer, all fitted on discovery too, and sets of as many random features.

Intervals resample questions; the choice of features is held fixed. Permutations give whole
questions' labels to other questions with as many answers, so answers to one question need not be
independent.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

from analyze import answering, language_model
from analyze.answering import Answer
from analyze.drawing import STYLE, empty, svg
from analyze.language_model import Prediction, logits
from analyze.outcome import Outcome, Picture, Table
from analyze.results import digest_of
from analyze.stats import (
    Floats,
    auroc,
    formatted,
    hedges_g,
    percentiles,
    permutation_p,
    spearman,
    spearman_cap,
)
from analyze.studies.contrast.study import Means, answer_means, caa
from analyze.studies.stage_gate.discrimination import Scored, measured
from analyze.studies.stage_gate.probe import cross_validated
from analyze.study import Definition, Study
from data import durable
from data.errors import SettingError, StopRequest
from data.journal import Progress
from data.settings import build

EACH = 10  # helpful features, and harmful ones
PASSING_RHO = 0.30  # the reference's
_LEVEL = 0.05
_LEAST = 5  # right answers, and wrong ones, on either side
_SEED = 0
_BLOCK = 4096  # features held dense at a time
RULE = (
    f"pass if rho >= {PASSING_RHO:.2f}, its permutation p < {_LEVEL}, the AUROC's 95 % interval is above 0.5, and that "
    f"of rho given length above 0; weak if p < {_LEVEL} and not all of these; else fail"
)
SCORE, LENGTH = "R", "length"


VERSION = 1  # of the log-probabilities
_FILE = "log_probabilities.npy"


@dataclass(frozen=True)
class Options:
    """See conf/study/stage_gate.yaml."""

    discovery: float = 0.5  # share of the questions
    min_firing: int = 5  # answers
    draws: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.discovery < 1:
            raise SettingError(
                f"study.discovery={self.discovery} must be above 0 and below 1, such as 0.5"
            )
        for name, least in (("min_firing", 1), ("draws", 20)):
            if getattr(self, name) < least:
                raise SettingError(f"study.{name}={getattr(self, name)} must be at least {least}")


# -- scores of answers -----------------------------------------------------------------------------


class Chosen(NamedTuple):
    """Features by their effect on the discovery answers, the largest first."""

    helpful: NDArray[np.int64]
    harmful: NDArray[np.int64]
    g: Floats  # (F,) Hedges', right minus wrong; 0 where a feature was not eligible
    eligible: NDArray[np.int64]  # those that fire in enough discovery answers

    def weights(self) -> Floats:
        """(F,) 1, -1 or 0."""
        found = np.zeros(len(self.g))
        found[self.helpful], found[self.harmful] = 1, -1
        return found


def in_discovery(question: NDArray[np.str_], share: float) -> NDArray[np.bool_]:
    """(n,) whether an answer's question is for discovery: a function of the question's id alone."""
    ids, back = np.unique(question, return_inverse=True)
    digests = [int(durable.digest(f"stage gate {one}".encode())[:13], 16) / 16**13 for one in ids]
    return np.asarray(np.array(digests)[back] < share)


def choose(features: Any, correct: NDArray[np.bool_], min_firing: int) -> Chosen:
    """The features that differ most between right and wrong answers, at most EACH either way.

    Args:
        features: (n, F) scipy CSR of the discovery answers' means.
    """
    columns = features.tocsc()
    fired = np.diff(columns.indptr)
    eligible = np.flatnonzero(fired >= min_firing)
    g = np.zeros(features.shape[1])
    for at in range(0, len(eligible), _BLOCK):
        block = eligible[at : at + _BLOCK]
        g[block] = hedges_g(columns[:, block].toarray().astype(np.float64), correct)
    order = eligible[np.argsort(-g[eligible], kind="stable")]
    helpful, harmful = order[:EACH], order[::-1][:EACH]
    return Chosen(helpful[g[helpful] > 0], harmful[g[harmful] < 0], g, eligible)


def scores(
    means: Means, log_probability: Floats, layer: int, chosen: Chosen, discovery: NDArray[np.bool_]
) -> dict[str, Floats]:
    """By name (n,) scores of all answers, fitted on discovery: higher means right.

    Length and log-probability take the sign that their rank correlation has there.
    """
    hidden, correct = np.asarray(means.hidden[:, layer], np.float64), means.correct
    probe = cross_validated(hidden[discovery], correct[discovery], means.question[discovery], _SEED)

    def signed(values: Floats) -> Floats:
        return values if spearman(values[discovery], correct[discovery]) >= 0 else -values

    return {
        SCORE: np.asarray(means.features @ chosen.weights(), np.float64).ravel(),
        LENGTH: signed(means.length.astype(np.float64)),
        "mean log-probability": signed(log_probability),
        "raw direction (CAA)": hidden @ caa(hidden[discovery], correct[discovery]),
        "logistic probe": probe(hidden),
    }


def log_probabilities(study: Study, answers: Sequence[Answer], stop: StopRequest) -> Floats:
    """(n,) mean log-probability in nats of each answer's tokens, NaN of one without; kept in the
    study's folder.
    """
    key = {
        "version": VERSION,
        "weights": study.identity["weights"],
        "dtype": study.model.dtype,
        "texts": digest_of({"ids": [(answer.prompt_ids, answer.ids) for answer in answers]}),
    }

    def write(folder: Path) -> None:
        content = io.BytesIO()
        np.save(content, _log_probabilities(study, answers, stop))
        durable.write(folder / _FILE, [content.getbuffer()])

    folder = study.kept("log_probabilities", key, write)
    return np.asarray(np.load(folder / _FILE), np.float64)


def _log_probabilities(study: Study, answers: Sequence[Answer], stop: StopRequest) -> Floats:
    found, done, progress = np.full(len(answers), np.nan), 0, Progress()
    for number, behind in logits(study.lm, [one.sequence for one in answers]):
        stop.check()
        one, done = answers[number], done + 1
        total = 0.0
        predicting = behind[len(one.prompt_ids) - 1 : -1]
        for part in language_model.blocks(study.lm, len(one.ids)):
            ids = torch.tensor(one.ids[part], device=behind.device)
            total -= float(Prediction.of_logits(predicting[part]).cross_entropy(ids).sum())
        found[number] = total / len(one.ids) if one.ids else np.nan
        progress.show(f"{done}/{len(answers)} answers' probabilities", last=done == len(answers))
    return found


# -- the judgement ---------------------------------------------------------------------------------


def random_features(
    features: Any, correct: NDArray[np.bool_], chosen: Chosen, draws: int, stop: StopRequest
) -> Floats:
    """(draws,) AUROC of as many random features as were chosen, each with a sign by chance.

    Args:
        features: (n, F) of the validation answers.
    """
    rng = np.random.default_rng(_SEED)
    plus, minus = len(chosen.helpful), len(chosen.harmful)
    columns, found = features.tocsc()[:, chosen.eligible], np.empty(draws)
    signs = np.array([1.0] * plus + [-1.0] * minus)
    for draw in range(draws):
        stop.check()
        some = rng.choice(len(chosen.eligible), plus + minus, replace=False)
        found[draw] = auroc(np.asarray(columns[:, some] @ signs).ravel(), correct)
    return found


def verdict(found: dict[str, Any]) -> tuple[str, list[str]]:
    """`pass`, `weak` or `fail` by RULE, and the conditions of a pass that do not hold."""
    conditions = {
        f"rho >= {PASSING_RHO:.2f}": found["rho"]["value"] >= PASSING_RHO,
        f"p < {_LEVEL}": found["p"] < _LEVEL,
        "AUROC above 0.5": found["auroc"]["interval"].low > 0.5,
        "rho given length above 0": found["rho_given_length"]["interval"].low > 0,
    }
    missing = [name for name, holds in conditions.items() if not holds]
    return ("pass" if not missing else "weak" if found["p"] < _LEVEL else "fail"), missing


def judge(
    means: Means, log_probability: Floats, layer: int, options: Options, stop: StopRequest
) -> dict[str, Any]:
    """Everything but words, of answers that have tokens.

    Raises:
        SettingError: too few right or wrong answers on one side, or no feature fires in enough of
            them.
    """
    discovery = in_discovery(means.question, options.discovery)
    for side, mask in (("discovery", discovery), ("validation", ~discovery)):
        right, wrong = int((means.correct & mask).sum()), int((~means.correct & mask).sum())
        if min(right, wrong) < _LEAST:
            raise SettingError(
                f"the {side} questions have {right} right and {wrong} wrong answers, and {_LEAST} of each are needed; "
                "give more with answers.questions=, or another share with study.discovery="
            )
    chosen = choose(means.features[discovery], means.correct[discovery], options.min_firing)
    if not len(chosen.helpful) and not len(chosen.harmful):
        raise SettingError(
            f"no feature fires in {options.min_firing} discovery answers and differs between right and wrong; lower "
            "study.min_firing, or give more answers.questions"
        )
    held = np.flatnonzero(~discovery)
    every = scores(means, log_probability, layer, chosen, discovery)
    correct = means.correct[held]
    _, number = np.unique(means.question[held], return_inverse=True)
    of = Scored(
        {name: values[held] for name, values in every.items()}, correct, means.length[held], number
    )
    found = measured(of, SCORE, options.draws, _SEED, stop)
    by_chance = random_features(means.features[held], correct, chosen, options.draws, stop)
    what, missing = verdict(found[SCORE])
    return {
        "verdict": what,
        "missing": missing,
        "rule": RULE,
        "seed": _SEED,
        "options": vars(options),
        "layer": layer,
        "helpful": _features(chosen, chosen.helpful),
        "harmful": _features(chosen, chosen.harmful),
        "eligible": len(chosen.eligible),
        "discovery": _side(means, discovery),
        "validation": _side(means, ~discovery),
        "cap": spearman_cap(float(correct.mean())),
        "scores": found,
        "random_features": {
            "median": float(np.median(by_chance)),
            "interval": percentiles(by_chance),
            "p": permutation_p(found[SCORE]["auroc"]["value"], by_chance),
        },
    }


def _features(chosen: Chosen, ids: NDArray[np.int64]) -> list[dict[str, Any]]:
    return [{"feature": int(one), "g": chosen.g[one]} for one in ids]


def _side(means: Means, mask: NDArray[np.bool_]) -> dict[str, Any]:
    correct = means.correct[mask]
    ids = np.unique(means.question[mask])
    return {"answers": len(correct), "right": int(correct.sum()), "questions": len(ids), "ids": ids}


# -- the study -------------------------------------------------------------------------------------


def stage_gate(study: Study) -> Outcome:
    """The verdict, by a rule that is printed, with R's figures and its baselines' on questions that
    chose nothing.
    """
    options = build(Options, "study", study.options)
    with StopRequest() as stop:
        answers = [one for one in answering.answers(study, stop) if one.ids]
        means = answer_means(study, answers, stop)
        figures = judge(
            means, log_probabilities(study, answers, stop), study.subject.layer, options, stop
        )
    picture = Picture("AUROC on the validation questions, with 95 % intervals", _picture(figures))
    return Outcome(figures, _summary(figures), _tables(figures), {"auroc": picture})


def _summary(figures: dict[str, Any]) -> list[str]:
    own, held, chance = figures["scores"][SCORE], figures["validation"], figures["random_features"]
    others = {
        name: one["auroc"]["value"] for name, one in figures["scores"].items() if name != SCORE
    }
    better = ", ".join(name for name, value in others.items() if value >= own["auroc"]["value"])
    failing = f" Does not hold: {'; '.join(figures['missing'])}." if figures["missing"] else ""
    return [
        f"Verdict: {figures['verdict']}.{failing} The rule: {figures['rule']}.",
        f"R tells right answers from wrong ones with an AUROC of {formatted(own['auroc'], '.3f')} on {held['answers']} "
        f"validation answers, {held['right']} of them right.",
        f"Its rank correlation with being right is {formatted(own['rho'], '.3f')}, where {figures['cap']:.3f} is the most "
        f"that can be (permutation p = {own['p']:.2g}); given length it is {formatted(own['rho_given_length'], '.3f')}.",
        f"As many random features have an AUROC of {chance['median']:.3f}, 95 % of them {chance['interval'].low:.3f} "
        f"to {chance['interval'].high:.3f} (p = {chance['p']:.2g}).",
        f"At least as good as R: {better}." if better else "None of the baselines is as good as R.",
    ]


def _tables(figures: dict[str, Any]) -> list[Table]:
    rows = [
        (
            name,
            formatted(one["auroc"], ".3f"),
            formatted(one["rho"], ".3f"),
            formatted(one["rho_given_length"], ".3f") if name != LENGTH else "-",
            f"{one['p']:.2g}",
            formatted(one["behind"], ".3f") if name != SCORE else "-",
        )
        for name, one in figures["scores"].items()
    ]
    header = ("score", "AUROC", "rho", "rho given length", "p", "R's AUROC less its own")
    sides = [
        (side, *(f"{figures[side][key]:,}" for key in ("questions", "answers", "right")))
        for side in ("discovery", "validation")
    ]
    chosen = [
        (sign, str(one["feature"]), f"{one['g']:.2f}")
        for sign in ("helpful", "harmful")
        for one in figures[sign]
    ]
    return [
        Table(f"On the validation questions; rho is at most {figures['cap']:.3f}", header, rows),
        Table("The split", ("", "questions", "answers", "right"), sides),
        Table(
            "Features, chosen on the discovery questions",
            ("", "feature", "Hedges' g there"),
            chosen,
        ),
    ]


def _picture(figures: dict[str, Any]) -> str:
    with mpl.rc_context(STYLE):
        figure, axes = empty("AUROC", "")
        names = [*figures["scores"], "random features"]
        chance = figures["random_features"]
        points = [one["auroc"] for one in figures["scores"].values()]
        points.append({"value": chance["median"], "interval": chance["interval"]})
        for at, point in enumerate(points):
            axes.plot(point["interval"], [at, at], color="#2563eb", linewidth=1.5)
            axes.plot(point["value"], at, "o", color="#2563eb", markersize=4)
        axes.axvline(0.5, color="#6b7280", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        return svg(figure)


DEFINITION = Definition(stage_gate, options=Options, inputs=answering.inputs, order=50)
