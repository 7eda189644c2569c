"""Whether a few features order right and wrong answers to one question: the verdict.

`study=stage_gate` and `study=rollouts` show what `judge` finds. So they never disagree.

    R = sum of 10 helpful - sum of 10 harmful features, each averaged over the answer's tokens

Features are chosen by Hedges' g on the discovery questions alone, within questions where there are
several answers to each. Everything that is said of R is measured on the validation questions. A
question falls to one side with all its answers (analyze/questions/split.py).

R stands beside what costs less: the answer's length, its mean log-probability, the raw direction
(CAA), its cosine, and a logistic probe on the mean residual of a layer, all fitted on discovery
too, and sets of as many random latents of equal density with the signs that they have there.

Intervals resample questions; the choice of features is held fixed.

Shapes: n answers, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.probe import cross_validated
from residual_saes.analyze.questions.answering import GENERATED, Answer, answers, asking_of
from residual_saes.analyze.questions.split import in_discovery, require_share
from residual_saes.analyze.stats import Floats, auroc, percentiles, permutation_p, spearman_cap
from residual_saes.analyze.studies.contrast.means import Means, answer_means
from residual_saes.analyze.studies.stage_gate import best_of, within
from residual_saes.analyze.studies.stage_gate.best_of import Pool
from residual_saes.analyze.studies.stage_gate.discrimination import Scored, measured
from residual_saes.analyze.studies.stage_gate.features import Chosen, choose, density, random_scores
from residual_saes.analyze.studies.stage_gate.scores import (
    FitProbe,
    Fitting,
    log_probabilities,
    scores,
)
from residual_saes.analyze.studies.stage_gate.within import Groups
from residual_saes.analyze.studies.stage_gate.words import LOG_PROBABILITY, SCORE
from residual_saes.analyze.study import Study
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import note, tell
from residual_saes.data.settings import build

VERSION = 3  # of both studies' results: raise it when the same answers give others
SAMPLES = 8  # answers to each question, unless answers.samples= says otherwise
PASSING_RHO = 0.30  # the reference's pass mark
_LEVEL = 0.05
_LEAST = 5  # right answers, and wrong ones, on either side
LEAST_QUESTIONS = 10  # with both right and wrong answers, on either side
_SEED = 0
_MARK = f"rho >= {PASSING_RHO:.2f}"
_MARK_GIVEN = f"rho given length >= {PASSING_RHO:.2f}"  # else most of it may be the length's
_PICKED = "best of n above a random pick"
RULE = (
    f"pass if within questions {_MARK}; {_MARK_GIVEN}, and its 95% interval is above 0 (given "
    "also whether an answer is finished, who wrote it, and whether it gives a number); p of labels "
    f"permuted within questions < {_LEVEL}; the AUROC's 95% interval is above 0.5; and of all "
    "answers to a question the one of the highest R is right more often than a random one, with p "
    f"< {_LEVEL}. Weak if only a rho is too small. Else fail"
)


@dataclass(frozen=True)
class Options:
    """The settings of conf/study/stage_gate.yaml, and of conf/study/rollouts.yaml."""

    discovery: float = 0.5  # share of the questions, where problems have no parts
    min_firing: int = 5  # discovery answers in which a feature fires, for it to be chosen
    draws: int = 1000  # permutations, resamplings, and sets of random latents
    layer: int | None = None  # of the raw direction and the probe; by default the SAE's

    def __post_init__(self) -> None:
        require_share(self.discovery)
        for name, least in (("min_firing", 1), ("draws", 20)):
            value = getattr(self, name)
            if value < least:
                raise SettingError(f"study.{name}={value} must be at least {least}")


# -- what can be decided ---------------------------------------------------------------------------


def undecided(means: Means, discovery: NDArray[np.bool_]) -> str | None:
    """Why nothing can be decided within questions, with the way out; None if something can."""
    _, counts = np.unique(means.question, return_counts=True)
    if counts.max(initial=0) < 2:
        return (
            "each question has one answer, so nothing is known within a question; give "
            "answers.samples=8, or problems= with several labelled solutions of each"
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


def verdict(own: dict[str, Any], ahead: dict[str, Any]) -> tuple[str, list[str]]:
    """`pass`, `weak` or `fail` by `RULE`, and the conditions of a pass that do not hold.

    Args:
        own: R's figures, see `within.measured`.
        ahead: by how much the best answer of all by R is ahead of a random one, {value, p}.
    """
    conditions = {
        _MARK: own["rho"]["value"] >= PASSING_RHO,
        _MARK_GIVEN: own["rho_given_length"]["value"] >= PASSING_RHO,
        f"p < {_LEVEL}": own["p"] is not None and own["p"] < _LEVEL,
        "AUROC above 0.5": own["auroc"]["interval"].low > 0.5,
        "rho given length above 0": own["rho_given_length"]["interval"].low > 0,
        _PICKED: ahead["value"] > 0 and ahead["p"] < _LEVEL,
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


class Judgement(NamedTuple):
    """What was found, and of what."""

    figures: dict[str, Any]
    scores: dict[str, Floats]  # by name (n,) of all answers
    discovery: NDArray[np.bool_]  # (n,)


def judged(
    study: Study,
    stop: StopRequest,
    others: Callable[[set[str]], Mapping[str, Floats]] = lambda _: {},
) -> tuple[Judgement, list[Answer]]:
    """The judgement of a study's answers, and those answers.

    Args:
        others: given the ids of the validation questions, further features by name: (F,) weights.

    Raises:
        SettingError: study.layer is no layer of the model; or see `judge`.
    """
    options = build(Options, "study", study.options)
    layer = study.subject.layer if options.layer is None else options.layer
    if not 0 <= layer < study.n_layers:
        raise SettingError(
            f"study.layer={layer} must be one of the model's layers, 0 to {study.n_layers - 1}"
        )
    tell(f"the rule: {RULE}")
    note(f"study={study.name}")  # what a sign of life repeats
    every = answers(study, stop)
    answered = [answer for answer in every if answer.ids]
    means = answer_means(study, answered, stop)
    log_probability = log_probabilities(study, answered, stop)
    ids = means.question[~in_discovery(means.question, options.discovery, means.part)]
    judgement = judge(means, log_probability, layer, options, stop, others=others(set(ids)))
    judgement.figures["layer_of_features"] = study.subject.only_layer
    judgement.figures["empty"] = len(every) - len(answered)
    asking = asking_of(study)
    is_drawn = asking.temperature > 0 and any(answer.source == GENERATED for answer in every)
    drawn = {"samples": asking.samples, "temperature": asking.temperature, "seed": asking.seed}
    judgement.figures["drawn"] = drawn if is_drawn else None
    return judgement, answered


def judge(
    means: Means,
    log_probability: Floats,
    layer: int,
    options: Options,
    stop: StopRequest,
    fit_probe: FitProbe = cross_validated,
    others: Mapping[str, Floats] | None = None,
) -> Judgement:
    """Everything but words, of answers that have tokens.

    Args:
        log_probability: (n,) see `log_probabilities`.
        layer: of the direction and the probe.
        others: by name the weights (F,) of further features that stand beside R.

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
    chosen = _chosen(means, fitting, options)
    every = scores(means, log_probability, layer, chosen, fitting, fit_probe)
    for name, weights in (others or {}).items():
        every[name] = np.asarray(means.features @ weights, np.float64).ravel()

    # On validation: what the answers are worth that a score picks, and how well it tells right from
    # wrong, across questions and within them.
    held = np.flatnonzero(~discovery)
    pool = Pool.of(means, held)
    figures: dict[str, Any] = {
        "rule": RULE,
        "seed": _SEED,
        "options": vars(options),
        "layer": layer,
        "helpful": _with_g(chosen, chosen.helpful),
        "harmful": _with_g(chosen, chosen.harmful),
        "eligible": len(chosen.eligible),
        "discovery": _side(means, discovery),
        "validation": _side(means, ~discovery),
        "cap": spearman_cap(every[SCORE][held], means.correct[held]),
        "scores": _across(means, every, held, options, stop),
        "best_of": _picks(pool, every, options),
        "random_latents": None,
        **_NOTHING_WITHIN,
    }
    held_groups = None
    if why is None:
        held_groups = Groups.of(means, held)
        figures |= _within(held_groups, every, figures, options, stop)
    else:
        figures["notes"] = [why]
    if not len(chosen.helpful) + len(chosen.harmful):
        said = "no feature differs between right and wrong discovery answers, so R is 0"
        figures["notes"] = [*figures["notes"], said]
    densities = density(means, fitting.rows)
    if chance := random_scores(means.features, densities, chosen, options.draws, stop):
        figures["random_latents"] = _beside_chance(chance, figures, means, held, held_groups, pool)
    return Judgement(figures, every, discovery)


# What is said where nothing is known within questions.
_NOTHING_WITHIN: dict[str, Any] = {
    "verdict": "undecided",
    "missing": [],
    "notes": [],
    "within": None,
}


def _chosen(means: Means, fitting: Fitting, options: Options) -> Chosen:
    """The features of R."""
    question = means.question[fitting.rows] if fitting.groups else None
    features = means.features[fitting.rows]
    chosen = choose(features, means.correct[fitting.rows], options.min_firing, question)
    if not len(chosen.eligible):
        raise SettingError(
            f"no feature fires in {options.min_firing} discovery answers; lower study.min_firing, "
            "or give more answers.questions"
        )
    return chosen


def _within(
    groups: Groups,
    every: Mapping[str, Floats],
    figures: dict[str, Any],
    options: Options,
    stop: StopRequest,
) -> dict[str, Any]:
    """The verdict, with what it follows from; every score's figures within questions beside it."""
    found = within.measured(groups, every, SCORE, options.draws, _SEED, stop)
    of_scores = {}
    for name, across in figures["scores"].items():
        of_scores[name] = {**across, "within": found[name]}
    word, missing = verdict(found[SCORE], figures["best_of"]["ahead"][SCORE][best_of.RANDOM][-1])
    return {
        "verdict": word,
        "missing": missing,
        "notes": notes(found[SCORE], len(groups.sizes), groups.names),
        "within": {
            "questions": len(groups.sizes),
            "answers": len(groups.rows),
            "right": int(groups.correct.sum()),
            "covariates": groups.names,
        },
        "scores": of_scores,
    }


def _picks(pool: Pool, every: Mapping[str, Floats], options: Options) -> dict[str, Any]:
    """What the answers are worth that each score picks, beside other ways to take one."""
    pickers = {name: pool.picked(values) for name, values in every.items()}
    if (voted := pool.voted()) is not None:
        pickers[best_of.MAJORITY] = voted
    pickers[best_of.RANDOM] = pool.at_random()
    pickers[best_of.ORACLE] = pool.any_right()
    beside = (best_of.RANDOM, LOG_PROBABILITY, best_of.MAJORITY)
    return best_of.measured(pool, pickers, beside, options.draws, _SEED)


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


def _beside_chance(
    chance: Iterator[Floats],
    figures: dict[str, Any],
    means: Means,
    held: NDArray[np.int64],
    groups: Groups | None,
    pool: Pool,
) -> dict[str, Any]:
    """R's AUROC, and the accuracy of its picks at each n, among those of sets of random latents."""
    aurocs = []
    accuracies = []
    for values in chance:
        of_set = groups.auroc(values[groups.rows]) if groups else _auroc(means, values, held)
        aurocs.append(of_set)
        accuracies.append(pool.picked(values).mean(0))
    own = figures["scores"][SCORE]
    observed = (own["within"] or own)["auroc"]["value"]
    picked = [point["value"] for point in figures["best_of"]["accuracy"][SCORE]]
    pairs = zip(picked, np.array(accuracies).T, strict=True)
    return {
        "sets": len(aurocs),
        "auroc": _among(observed, np.array(aurocs)),
        "accuracy": [_among(value, column) for value, column in pairs],
    }


def _auroc(means: Means, values: Floats, rows: NDArray[np.int64]) -> float:
    return auroc(values[rows], means.correct[rows])


def _among(observed: float, drawn: Floats) -> dict[str, Any]:
    """The middle of what was drawn, and p of `observed` among it."""
    p = permutation_p(observed - 1e-12, drawn)
    return {"median": float(np.median(drawn)), "interval": percentiles(drawn), "p": p}


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
