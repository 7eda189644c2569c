"""The stage gate: may a handful of SAE features serve as a reward?

    R = sum of 10 helpful - sum of 10 harmful features, each averaged over the answer's tokens

GRPO compares the answers to one question with each other. A reward that reads how hard the question
is tells right from wrong across questions, and moves GRPO by nothing. So the verdict is of answers
to the same question (within.py): sampled ones, or labelled solutions. The reference has one answer
to a question, and compares questions. Its figures stand beside ours. They decide nothing.

Features are chosen by Hedges' g on the discovery questions alone, within questions where there are
several answers to each. Everything that is said of R is measured on the validation questions. A
question falls to one side with all its answers (analyze/split.py).

R stands beside what costs less: the answer's length, its mean log-probability, the raw direction
(CAA), its cosine, and a logistic probe on the mean residual of a layer, all fitted on discovery
too, and sets of as many random features with the signs that they have there.

Intervals resample questions; the choice of features is held fixed.

Shapes: n answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze import refusals
from analyze.answering import answers, inputs
from analyze.outcome import Outcome
from analyze.probe import cross_validated
from analyze.split import in_discovery, require_share
from analyze.stats import Floats, percentiles, permutation_p, spearman_cap
from analyze.studies.contrast.means import Means, answer_means, memory
from analyze.studies.stage_gate import within
from analyze.studies.stage_gate.discrimination import Scored, measured
from analyze.studies.stage_gate.features import Chosen, choose, random_features
from analyze.studies.stage_gate.scores import FitProbe, Fitting, log_probabilities, scores
from analyze.studies.stage_gate.within import Groups
from analyze.studies.stage_gate.words import SCORE, picture, summary, tables
from analyze.study import Definition, Study
from data.errors import SettingError, StopRequest
from data.settings import build

PASSING_RHO = 0.30  # the reference's pass mark
_LEVEL = 0.05
_LEAST = 5  # right answers, and wrong ones, on either side
LEAST_QUESTIONS = 10  # with both right and wrong answers, on either side
_SEED = 0
_MARK = f"rho >= {PASSING_RHO:.2f}"
_MARK_GIVEN = f"rho given length >= {PASSING_RHO:.2f}"  # else most of it may be the length's
RULE = (
    f"within questions, pass if {_MARK}, also given length (whether it is finished, who wrote it), "
    f"its permutation p < {_LEVEL}, the AUROC's 95 % interval is above 0.5, and that of rho given "
    "length above 0; weak if only rho is too small; else fail"
)


@dataclass(frozen=True)
class Options:
    """The settings of conf/study/stage_gate.yaml."""

    discovery: float = 0.5  # share of the questions, where problems have no parts
    min_firing: int = 5  # discovery answers in which a feature fires, for it to be chosen
    draws: int = 1000  # permutations, resamplings, and sets of random features
    layer: int | None = None  # of the raw direction and the probe; by default the SAE's

    def __post_init__(self) -> None:
        require_share(self.discovery)
        for name, least in (("min_firing", 1), ("draws", 20)):
            value = getattr(self, name)
            if value < least:
                raise SettingError(f"study.{name}={value} must be at least {least}")


def stage_gate(study: Study) -> Outcome:
    """The verdict by `RULE`, with the figures of R and its baselines on validation questions."""
    options = build(Options, "study", study.options)
    layer = study.subject.layer if options.layer is None else options.layer
    if not 0 <= layer < study.n_layers:
        raise SettingError(
            f"study.layer={layer} must be one of the model's layers, 0 to {study.n_layers - 1}"
        )
    with StopRequest() as stop:
        answered = [answer for answer in answers(study, stop) if answer.ids]
        means = answer_means(study, answered, stop)
        log_probability = log_probabilities(study, answered, stop)
        figures = judge(means, log_probability, layer, options, stop)
    figures["layer_of_features"] = study.subject.only_layer
    return Outcome(figures, summary(figures), tables(figures), {"auroc": picture(figures)})


# -- what can be decided ---------------------------------------------------------------------------


def undecided(means: Means, discovery: NDArray[np.bool_]) -> str | None:
    """Why nothing can be decided within questions, with the way out; None if something can."""
    _, counts = np.unique(means.question, return_counts=True)
    if counts.max(initial=0) < 2:
        return (
            "each question has one answer, so nothing is known within a question; give "
            "answers.samples=8 answers.temperature=1, or labelled solutions as problems="
        )
    both = within.has_both(means.question, means.correct)
    for side, mask in (("discovery", discovery), ("validation", ~discovery)):
        questions = len(np.unique(means.question[mask]))
        with_both = len(np.unique(means.question[mask & both]))
        if with_both < LEAST_QUESTIONS:
            return (
                f"{with_both} of {questions} {side} questions have both right and wrong answers, "
                f"and {LEAST_QUESTIONS} are needed; give more with answers.questions= or "
                "answers.samples=, another answers.temperature=, or problems= that are neither too "
                "easy nor too hard"
            )
    return None


def verdict(own: dict[str, Any]) -> tuple[str, list[str]]:
    """`pass`, `weak` or `fail` by `RULE`, and the conditions of a pass that do not hold.

    Args:
        own: R's figures, see `within.measured`.
    """
    conditions = {
        _MARK: own["rho"]["value"] >= PASSING_RHO,
        _MARK_GIVEN: own["rho_given_length"]["value"] >= PASSING_RHO,
        f"p < {_LEVEL}": own["p"] is not None and own["p"] < _LEVEL,
        "AUROC above 0.5": own["auroc"]["interval"].low > 0.5,
        "rho given length above 0": own["rho_given_length"]["interval"].low > 0,
    }
    missing = [name for name, holds in conditions.items() if not holds]
    if not missing:
        return "pass", missing
    return ("weak" if set(missing) <= {_MARK, _MARK_GIVEN} else "fail"), missing


def notes(own: dict[str, Any], questions: int, covariates: list[str]) -> list[str]:
    """What keeps R's figures from saying anything, in words.

    Args:
        own: R's figures, see `within.measured`.
        questions: those with both right and wrong answers.
        covariates: their names.
    """
    if not own["questions"]:
        return ["R is the same for all answers to each question, so GRPO's advantages are all 0"]
    said = []
    if own["least_p"] >= _LEVEL:
        said.append(
            f"R differs within {own['questions']} of {questions} questions alone, so that p cannot "
            f"be below {own['least_p']:.2g}"
        )
    if np.isnan(own["rho_given_length"]["value"]):
        said.append(f"nothing is left of R, or of being right, given {', '.join(covariates)}")
    return said


# -- the judgement ---------------------------------------------------------------------------------


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
    discovery = in_discovery(means.question, options.discovery, means.part)
    _require_both("discovery", means.correct[discovery])
    _require_both("validation", means.correct[~discovery])
    why = undecided(means, discovery)
    fitting = Fitting(np.flatnonzero(discovery), None)
    if why is None:
        groups = Groups.of(means, fitting.rows)
        fitting = Fitting(groups.rows, groups)
    question = means.question[fitting.rows] if fitting.groups else None
    features = means.features[fitting.rows]
    chosen = choose(features, means.correct[fitting.rows], options.min_firing, question)
    if not len(chosen.eligible):
        raise SettingError(
            f"no feature fires in {options.min_firing} discovery answers; lower study.min_firing, "
            "or give more answers.questions"
        )
    every = scores(means, log_probability, layer, chosen, fitting, fit_probe)

    # On validation: how well the scores tell right from wrong, across questions and within them.
    held = np.flatnonzero(~discovery)
    figures = _across(means, every, held, options, stop)
    inside: dict[str, Any] | None = None
    judged = None
    word = "undecided"
    missing: list[str] = []
    said = [why] if why else []
    if why is None:
        judged = Groups.of(means, held)
        found = within.measured(judged, every, SCORE, options.draws, _SEED, stop)
        inside = {
            "questions": len(judged.sizes),
            "answers": len(judged.rows),
            "right": int(judged.correct.sum()),
            "covariates": judged.names,
        }
        for name, own in found.items():
            figures[name]["within"] = own
        word, missing = verdict(found[SCORE])
        said = notes(found[SCORE], len(judged.sizes), judged.names)
    if not len(chosen.helpful) + len(chosen.harmful):
        said.append("no feature differs between right and wrong discovery answers, so R is 0")
    return {
        "verdict": word,
        "missing": missing,
        "notes": said,
        "rule": RULE,
        "seed": _SEED,
        "options": vars(options),
        "layer": layer,
        "helpful": _with_g(chosen, chosen.helpful),
        "harmful": _with_g(chosen, chosen.harmful),
        "eligible": len(chosen.eligible),
        "discovery": _side(means, discovery),
        "validation": _side(means, ~discovery),
        "within": inside,
        "cap": spearman_cap(every[SCORE][held], means.correct[held]),
        "scores": figures,
        "random_features": _by_chance(means, held, chosen, judged, figures[SCORE], options, stop),
    }


def _across(
    means: Means,
    every: dict[str, Floats],
    held: NDArray[np.int64],
    options: Options,
    stop: StopRequest,
) -> dict[str, dict[str, Any]]:
    """Figures across questions by score, as the reference has them; `within` is still None."""
    _, question = np.unique(means.question[held], return_inverse=True)
    of_held = {name: values[held] for name, values in every.items()}
    scored = Scored(of_held, means.correct[held], means.length[held], question)
    figures = measured(scored, SCORE, options.draws, _SEED, stop)
    return {name: {**own, "within": None} for name, own in figures.items()}


def _by_chance(
    means: Means,
    held: NDArray[np.int64],
    chosen: Chosen,
    groups: Groups | None,
    own: dict[str, Any],
    options: Options,
    stop: StopRequest,
) -> dict[str, Any] | None:
    """R's AUROC among those of random features; None where no feature was chosen."""
    if not len(chosen.helpful) + len(chosen.harmful):
        return None
    rows = groups.rows if groups else held
    features = means.features[rows]
    aurocs = random_features(features, means.correct[rows], chosen, options.draws, stop, groups)
    of_r = (own["within"] or own)["auroc"]["value"]
    return {
        "median": float(np.median(aurocs)),
        "interval": percentiles(aurocs),
        "p": permutation_p(of_r, aurocs),
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


DEFINITION = Definition(
    stage_gate,
    version=2,
    options=Options,
    refuses=refusals.no_layer,
    inputs=inputs,
    memory=memory,
    order=50,
)
