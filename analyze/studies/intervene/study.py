"""Latents that are ablated, clamped or added to while the model answers: does it answer otherwise?

Train questions choose the latents (choosing.py) and say how strongly each fires. Dev questions
choose the dose, test questions judge. Everything else stays: the SAE's error, the other latents,
the batches of questions.

Each dose of the chosen latents stands beside two controls. Random latents of equal density get the
same change: the same values where values are given. Random directions are as long at every position
as what the change adds there. Few of either are measured at every dose, `n_random` at the dose that
dev questions chose.

Beside it attribution: what ablating each latent alone does to the log-probability of the answer's
number, to first order and measured (probability.py).

Shapes: F latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
from scipy.stats import rankdata

from residual_saes.analyze import refusals
from residual_saes.analyze.changes.intervention import (
    CHANGES,
    EqualNorm,
    LatentChange,
    require_features,
    require_positions,
)
from residual_saes.analyze.changes.replies import Reply
from residual_saes.analyze.changes.sweeps import Sweeps, greedy
from residual_saes.analyze.latents.chosen import GATE
from residual_saes.analyze.latents.matched import random_directions, random_latents
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.questions.answering import Answer, answers, asking_of, inputs, model_key
from residual_saes.analyze.questions.split import Split, require_shares, split_of
from residual_saes.analyze.results import digest_of
from residual_saes.analyze.stats import Floats, bootstrap, permutation_p, spearman
from residual_saes.analyze.studies.contrast.means import memory
from residual_saes.analyze.studies.intervene import choosing, words
from residual_saes.analyze.studies.intervene.choosing import SELECTIONS, SIDES, Choice
from residual_saes.analyze.studies.intervene.outcomes import (
    CHOSEN,
    CONTROLS,
    DIRECTIONS,
    LATENTS,
    NOTHING,
    Attribution,
    Dose,
    Findings,
    Measured,
    Trial,
    best_of,
    share_kept,
)
from residual_saes.analyze.studies.intervene.probability import (
    Firing,
    Text,
    firing,
    first_order,
    log_probabilities,
    of_number,
)
from residual_saes.analyze.study import Definition, Study, at_least
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress, note
from residual_saes.data.settings import build, number

SEED = 0  # of random latents, random directions and permutations
_FEW = 2  # controls of each kind at every dose: some on test questions, others on dev questions
_SINGLE = 40  # random latents whose ablation is measured beside their attribution
_ANSWERS = 64  # right ones whose number that is done for, at most
_DRAWS = 1000


@dataclass(frozen=True)
class Options:
    """The settings of conf/study/intervene.yaml: which latents, which change, beside what."""

    select: str = "contrast"  # see choosing.py
    features: Sequence[int] | None = None  # latents by number, in place of a selection
    side: str = "helpful"  # or harmful: which end of the selection
    n_features: int = 5  # latents that are changed together
    changes: Sequence[str] = CHANGES
    doses: Sequence[float] = (0.3, 1, 3)  # times each latent's mean activation where it fires
    positions: str = "all"  # see analyze/changes/intervention.py
    n_random: int = 20
    candidates: int = 50  # latents that select=confidence measures
    min_firing: int = 5  # train answers in which a latent fires, for select=contrast to choose it
    train: float = 0.3  # share of the questions
    dev: float = 0.2  # likewise; the rest are test questions

    def __post_init__(self) -> None:
        require_positions(self.positions)
        require_shares(self.train, self.dev)
        for name, allowed in (("select", SELECTIONS), ("side", SIDES)):
            value = getattr(self, name)
            if value not in allowed:
                raise SettingError(f"study.{name}={value} must be one of {', '.join(allowed)}")
        for name in ("n_features", "n_random", "candidates", "min_firing"):
            at_least(f"study.{name}", getattr(self, name), 1)
        given = self.changes
        if not _is_list(given) or not given or set(given) - {*CHANGES}:
            raise SettingError(
                f"study.changes={given} must be a list of some of {', '.join(CHANGES)}, such as "
                "[ablate,add]"
            )
        doses = _numbers("study.doses", self.doses)
        if not all(dose and isfinite(dose) for dose in doses) or len(set(doses)) < len(doses):
            raise SettingError(
                f"study.doses={doses} must be different numbers other than 0, such as [1,3,-1]"
            )
        if self.features is not None:
            features = _numbers("study.features", self.features)
            if any(feature != int(feature) for feature in features):
                raise SettingError(f"study.features={features} must be whole numbers")

    @property
    def rows(self) -> list[Dose]:
        """All doses: the weaker first, so that equals are decided for it."""
        found = [Dose("ablate", 0.0)] if "ablate" in self.changes else []
        for scale in sorted(map(float, self.doses), key=abs):
            found += [Dose(change, scale) for change in CHANGES[1:] if change in self.changes]
        return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _numbers(name: str, given: Any) -> list[float]:
    if not _is_list(given) or not given:
        raise SettingError(f"{name}={given} must be a list of numbers, such as [1,3]")
    return [number(name, value) for value in given]


# -- the study -------------------------------------------------------------------------------------


def intervene(study: Study) -> Outcome:
    """Accuracy on test questions with the chosen latents changed, at each dose, beside controls.

    Labelled solutions, where the problems come with such, only choose. What is changed is the
    model's own answering.

    Raises:
        SettingError: the questions are too few, or no latent is chosen.
    """
    options = build(Options, "study", study.options)
    with StopRequest() as stop:
        # The latents and their controls, by the train questions.
        answered = answers(study, stop)
        split = _without_choosers(study, options, split_of(answered, options.train, options.dev))
        in_train = {*split.train}
        train = [answer for answer in answered if answer.problem.id in in_train and answer.ids]
        fires = _firing(study, train, stop)
        choice = _choice(study, options, train, fires, stop)
        sets = _sets(study, options, choice, fires)

        # The dose, by the dev questions.
        sweeps = Sweeps(
            study, study.subject.layer, greedy(asking_of(study)), stop, Progress(), "intervened"
        )
        dev_right, dev = _on_dev(sweeps, sets, options.rows, split.dev)

        # Every dose with a few controls, and the best with all, on the test questions.
        best = best_of({dose: share_kept(right, dev_right) for dose, right in dev.items()})
        trials = _trials(sets, options.rows, best, options.n_random)
        unsteered, *rows = sweeps.rows(trials, split.test, "test")
        replies = sweeps.run(split.test, None, "test, unsteered")
        attribution = _attribution(study, sets, split.test, replies, stop)
    findings = Findings(
        unsteered=unsteered,
        measured=list(map(Measured.of, trials, rows)),
        dev=dev,
        dev_right=dev_right,
        latents=_described(choice, fires),
        controls=sets.latents,
        attribution=attribution,
        selection=_selection(options, choice),
        ids={"train": split.train, "dev": _ids(split.dev), "test": _ids(split.test)},
        layer=study.subject.layer,
        seed=SEED,
    )
    return words.outcome(findings)


def _ids(asked: Sequence[Answer]) -> list[str]:
    return [answer.problem.id for answer in asked]


def _without_choosers(study: Study, options: Options, split: Split) -> Split:
    """The split without dev and test questions by which the stage gate chose its latents."""
    if options.features is not None or options.select != "gate":
        return split
    chose = choosing.gate_of(study).questions

    def left(part: Sequence[Answer]) -> list[Answer]:
        return [answer for answer in part if answer.problem.id not in chose]

    dev = left(split.dev)
    test = left(split.test)
    if not dev or not test:
        raise SettingError(
            f"the stage gate chose its features by all but {len(dev)} dev and {len(test)} test "
            "questions; give more with answers.questions=, or another study.select="
        )
    return Split(split.train, dev, test)


def _firing(study: Study, train: Sequence[Answer], stop: StopRequest) -> Firing:
    """How latents fire in train questions and answers; kept."""
    sequences = [answer.sequence for answer in train]
    key = {"version": 1, **study.identity, **model_key(study)}
    key["texts"] = digest_of({"ids": sequences})

    def make() -> Mapping[str, Floats]:
        sae = study.subject.sae
        return firing(study.lm, sae, study.subject.layer, sequences, stop)._asdict()

    return Firing(**study.subject.parts("firing", key).of(0, make))


def _choice(
    study: Study, options: Options, train: Sequence[Answer], fires: Firing, stop: StopRequest
) -> Choice:
    if options.features is not None:
        features = tuple(map(int, options.features))
        require_features(features, study.subject.sae.d_sae)
        return Choice(features, None, len(features))
    side, count = options.side, options.n_features
    if options.select == "gate":
        return choosing.by_gate(study, side, count)
    if options.select == "contrast":
        return choosing.by_contrast(study, train, side, count, options.min_firing, stop)
    return choosing.by_confidence(
        study, train, fires, options.positions, side, count, options.candidates, stop
    )


def _selection(options: Options, choice: Choice) -> dict[str, Any]:
    listed = options.features is not None
    return {
        "by": "list" if listed else options.select,
        "side": None if listed else options.side,
        "of": choice.of,
        "gate": choice.gate,
        "positions": options.positions,
    }


def _described(choice: Choice, fires: Firing) -> list[dict[str, Any]]:
    found = []
    for place, feature in enumerate(choice.features):
        found.append(
            {
                "feature": feature,
                "score": choice.scores[place] if choice.scores else None,
                "density": float(fires.density[feature]),
                "mean": float(fires.mean[feature]),
            }
        )
    return found


# -- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """The chosen latents and what stands beside them."""

    study: Study
    positions: str
    chosen: tuple[int, ...]
    mean: Floats  # (chosen,) activation where each fires
    # Sets of random latents, place by place as dense, and directions; the last few are for dev.
    latents: Sequence[tuple[int, ...]]
    directions: Sequence[Floats]
    single: tuple[int, ...]  # random latents for attribution

    def trial(self, kind: str, dose: Dose, place: int = 0) -> Trial:
        """A dose of the chosen latents, or of the control at a place."""
        features = self.latents[place] if kind == LATENTS else self.chosen
        value = tuple((dose.scale * self.mean).tolist())
        sae = self.study.subject.sae
        change = LatentChange(sae, dose.change, features, value, self.positions)
        across = EqualNorm(change, self.directions[place]) if kind == DIRECTIONS else change
        return Trial(kind, dose, across, self.study.subject.digest)


def _sets(study: Study, options: Options, choice: Choice, fires: Firing) -> Sets:
    silent = [feature for feature in choice.features if not fires.density[feature]]
    if silent:
        raise SettingError(
            f"features {silent} fire in no train question and no answer to one, so no dose of them "
            "is known; give others as study.features="
        )
    rng = np.random.default_rng(SEED)

    def drawn(count: int) -> list[tuple[int, ...]]:
        sets = [random_latents(fires.density, choice.features, rng) for _ in range(count)]
        return [tuple(features.tolist()) for features in sets]

    d_model = study.subject.sae.d_model
    latents = drawn(options.n_random)
    others = np.setdiff1d(np.flatnonzero(fires.density > 0), choice.features)
    single: list[int] = []
    while len(single) < min(_SINGLE, len(others) - len(choice.features)):
        single += random_latents(fires.density, choice.features, rng, never=single).tolist()
    return Sets(
        study=study,
        positions=options.positions,
        chosen=choice.features,
        mean=fires.mean[list(choice.features)],
        directions=random_directions(d_model, options.n_random + _FEW, rng),
        latents=latents + drawn(_FEW),
        single=tuple(single[:_SINGLE]),
    )


def _on_dev(
    sweeps: Sweeps, sets: Sets, doses: Sequence[Dose], asked: Sequence[Answer]
) -> tuple[int, dict[Dose, list[int]]]:
    """Right answers to the dev questions without a change, and at each dose of some controls."""
    right: dict[Dose, list[int]] = {dose: [] for dose in doses}
    for dose, counts in right.items():
        for kind in CONTROLS:
            for place in range(-_FEW, 0):
                trial = sets.trial(kind, dose, place)
                counts.append(sweeps.right(asked, trial, f"dev, {dose} of {kind}"))
    return sweeps.right(asked, None, "dev, unsteered"), right


def _trials(sets: Sets, doses: Sequence[Dose], best: Dose, n_random: int) -> list[Trial]:
    """Every sweep over the test questions but the unsteered one."""
    trials = [sets.trial(NOTHING, Dose("add", 0.0))]
    for dose in doses:
        trials.append(sets.trial(CHOSEN, dose))
        for kind in CONTROLS:
            count = n_random if dose == best else min(_FEW, n_random)
            trials += [sets.trial(kind, dose, place) for place in range(count)]
    return trials


# -- attribution -----------------------------------------------------------------------------------


def _attribution(
    study: Study,
    sets: Sets,
    asked: Sequence[Answer],
    replies: Sequence[Reply],
    stop: StopRequest,
) -> Attribution | None:
    """Of the right answers to the test questions that were given without a change; kept."""
    lm, subject = study.lm, study.subject
    texts: list[Text] = []
    for answer, reply in zip(asked, replies, strict=True):
        if reply.correct and len(texts) < _ANSWERS:
            text = of_number(lm.tokenizer, answer.prompt_ids, reply.ids)
            texts += [text] if text else []
    if not texts:
        return None
    features = [*sets.chosen, *sets.single]
    key = {"version": 1, **study.identity, **model_key(study), "positions": sets.positions}
    parts = subject.parts("attribution", {**key, "texts": digest_of({"ids": texts})})

    def estimated() -> Mapping[str, Floats]:
        found = first_order(lm, subject.sae, subject.layer, texts, sets.positions, stop)
        return found._asdict()

    def ablated(feature: int | None) -> Mapping[str, Floats]:
        change = None
        if feature is not None:
            change = LatentChange(subject.sae, "ablate", (feature,), 0.0, sets.positions)
        return {"log_p": log_probabilities(lm, texts, subject.layer, change, stop)}

    first = parts.of(0, estimated)["ablating"][features] / len(texts)
    before = parts.of(1, partial(ablated, None))["log_p"]
    measured = []
    for done, feature in enumerate(features):
        note(f"attribution: {done}/{len(features)} latents ablated")
        after = parts.of(2 + feature, partial(ablated, feature))["log_p"]
        measured.append(float((after - before).mean()))
    return correlated(features, first.tolist(), measured, len(texts))


def correlated(
    features: Sequence[int], estimated: Sequence[float], measured: Sequence[float], answers: int
) -> Attribution:
    """The figures of both effects, with their correlation and its null."""
    x = rankdata(estimated)
    y = rankdata(measured)
    rho = spearman(x, y)
    shuffled = np.random.default_rng(SEED).permuted(np.tile(y, (_DRAWS, 1)), axis=1)
    # Between permutations Spearman's rho differs by the product of the ranks alone.
    p = permutation_p(x @ y, shuffled @ x) if np.isfinite(rho) else 1.0
    interval, _ = bootstrap(lambda rows: spearman(x[rows], y[rows]), len(x), _DRAWS, SEED)
    return Attribution([*features], [*estimated], [*measured], answers, rho, interval, p)


# -- the definition --------------------------------------------------------------------------------


def _inputs(study: Study) -> dict[str, Any]:
    """What answers depend on, and the stage gate whose latents are changed."""
    options = build(Options, "study", study.options)
    found = inputs(study)
    if options.features is None and options.select == "gate":
        choosing.gate_of(study)
        found["gate"] = durable.digest(choosing.gate_path(study).read_bytes())
    return found


def _reads(study: Study) -> list[tuple[Any, str]]:
    options = build(Options, "study", study.options)
    by_gate = options.features is None and options.select == "gate"
    return [(study.subject.run, GATE)] if by_gate else []


DEFINITION = Definition(
    intervene,
    options=Options,
    refuses=refusals.all_but_of_streams,
    inputs=_inputs,
    reads=_reads,
    memory=memory,
    order=45,
)
