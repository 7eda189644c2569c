"""Stage gate 2: does a reward of SAE features make GRPO better than GRPO without it?

Policies are trained from the model that the store was harvested with, an arm for each reward, level
of reward, learning rate and seed (arms.py): R1 outcome + features, beside R0 outcome alone at every
rate that R1 has, R2 outcome + raw direction, R3 outcome + random latents of equal density, and R4
features alone. All arms have as many rollouts. Each policy then answers questions that trained
none, and is watched for reward hacking and lost skills (watching.py). The verdict is by a rule that
is printed before the first training (verdict.py).

Questions fall to one side by a digest of their text, or by the file of a folder of problems: they
train, or they judge. Those that chose the features judge nothing. Of the embedded model's problems
the kinds `LEFT_OUT` train nothing, and are the problems of another kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from residual_saes.analyze import losses, refusals
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.questions import answering, problems
from residual_saes.analyze.questions.answering import Asking, asking_of, problems_of
from residual_saes.analyze.questions.problems import Problem
from residual_saes.analyze.questions.split import in_discovery
from residual_saes.analyze.results import PAGE
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.stage_gate_2 import beside, plot, watching, words
from residual_saes.analyze.studies.stage_gate_2.arms import FEATURES, OUTCOME, Arm, Options, arms
from residual_saes.analyze.studies.stage_gate_2.rewards import Rewards, features_of
from residual_saes.analyze.studies.stage_gate_2.training import policy, trained
from residual_saes.analyze.studies.stage_gate_2.verdict import (
    ACCURACY,
    Cell,
    difference,
    find,
    judge,
    share,
)
from residual_saes.analyze.studies.stage_gate_2.watching import (
    HARMS,
    JUDGED,
    Asked,
    canary,
    provoked,
    reward_name,
)
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import tell
from residual_saes.data.settings import build
from residual_saes.data.site import RESID_POST

LEFT_OUT = ("multiply_subtract", "three_steps")  # kinds of the embedded problems
LEAST_QUESTIONS = 10  # on either side
_POINTS = 20  # of a curve: steps are averaged


class Sides(NamedTuple):
    """Problems by what they are for."""

    training: list[Problem]
    judged: list[Problem]
    others: list[Problem]  # of another kind; none trains


def inputs(study: Study) -> dict[str, Any]:
    """What the result depends on beside its settings.

    Raises:
        SettingError: there are too few questions, or some that judge chose the features.
        StoreError: there are no features.
    """
    options = build(Options, "study", study.options)
    chosen = features_of(study, options)
    sides = sides_of(study, options)
    chosen.require_other_questions(set(_ids(sides.judged)))
    return {
        **answering.inputs(study),
        "features": {"helpful": chosen.helpful, "harmful": chosen.harmful},
        "others": durable.digest(repr(sides.others).encode()),
    }


def sides_of(study: Study, options: Options) -> Sides:
    """The problems that train, that judge, and those of another kind.

    Raises:
        SettingError: the problems are labelled solutions, or too few on one side.
    """
    asked: list[Problem] = []
    for item in problems_of(study, asking_of(study)):
        if not isinstance(item, Problem):
            raise SettingError(
                f"problems={study.problems} holds labelled solutions, and a policy writes its own; "
                "give problems without solutions"
            )
        asked.append(item)
    plain, others = _apart(study, options, asked)
    ids = np.array(_ids(plain))
    parts = np.array([item.part or "" for item in plain])
    trains = in_discovery(ids, options.discovery, parts if parts.any() else None)
    training = list(compress(plain, trains))
    judged = list(compress(plain, ~trains))
    for noun, side in (("train", training), ("judge", judged)):
        if len(side) < LEAST_QUESTIONS:
            raise SettingError(
                f"{len(side)} questions are left to {noun}, and {LEAST_QUESTIONS} are needed; give "
                "more with answers.questions="
            )
    return Sides(training, judged, others)


def _ids(asked: Sequence[Problem]) -> list[str]:
    return [item.id for item in asked]


def _apart(
    study: Study, options: Options, asked: Sequence[Problem]
) -> tuple[list[Problem], list[Problem]]:
    """The problems without those of another kind, and these."""
    plain: list[Problem] = []
    others: list[Problem] = []
    if options.other is not None:
        for item in problems.read(options.other, options.canaries):
            others.append(item if isinstance(item, Problem) else item.problem)
        taken = set(_ids(others))
        return [item for item in asked if item.id not in taken], others
    if study.problems not in (None, problems.TINY):
        return list(asked), []
    kinds = problems.embedded_kinds(asking_of(study).questions)
    for item in asked:
        (others if kinds[item.id] in LEFT_OUT else plain).append(item)
    return plain, others[: options.canaries]


def judging(study: Study, options: Options) -> Asking:
    """How policies answer what judges them: greedily, or so many samples of each question."""
    asking = asking_of(study)
    if options.samples == 1:
        return replace(asking, samples=1, temperature=0.0)
    return replace(asking, samples=options.samples)


# -- the table -------------------------------------------------------------------------------------


class Policies(NamedTuple):
    """All policies, trained and watched."""

    untrained: dict[str, Floats]  # by figure, (n,)
    trained: dict[Arm, dict[str, Floats]]
    curves: dict[Arm, list[dict[str, Any]]]
    provoked: dict[str, dict[str, Any]]


class Table(NamedTuple):
    """All arms, and what each policy is asked."""

    study: Study
    options: Options
    training: list[Problem]
    arms: list[Arm]
    asked: Asked

    @classmethod
    def of(cls, study: Study) -> Table:
        options = build(Options, "study", study.options)
        sides = sides_of(study, options)
        text = losses.choose([study.subject], options.text)
        canaries = list(map(canary, sides.judged[: options.canaries]))
        asked = Asked(judging(study, options), sides.judged, canaries, sides.others, text)
        return cls(study, options, sides.training, arms(options), asked)

    def share(self, number: int) -> list[Arm]:
        """The arms that process `number` does."""
        return self.arms[number :: self.options.processes]

    def do(
        self, arm: Arm, rewards: Rewards, stop: StopRequest
    ) -> tuple[dict[str, Floats], list[dict[str, Any]]]:
        """Train an arm and watch its policy: figures and curve. What is there is not done again."""
        done = trained(self.study, arm, self.options, rewards, self.training, stop)
        load = partial(policy, self.study, done)
        name = done.folder.name
        folder = watching.watch(self.study, load, name, self.asked, rewards, stop)
        return watching.figures(folder, self.asked), done.curve


def stage_gate_2(study: Study) -> Outcome:
    """The verdict by `verdict.RULE`, with all that is watched in every arm."""
    table = Table.of(study)
    tell(*words.before(table.options, len(table.arms), len(table.asked.judged)))
    with StopRequest() as stop:
        policies = _policies(table, stop)
    figures = figures_of(policies, table.options)
    sizes = (len(table.training), len(table.asked.judged), len(table.asked.others))
    figures["questions"] = dict(zip(Sides._fields, sizes, strict=True))
    figures["ids"] = {"judged": _ids(table.asked.judged)}
    outcome = Outcome(
        figures, words.summary(figures), words.tables(figures), plot.pictures(figures)
    )
    durable.write(study.folder / PAGE, [words.page(study.subject.run, outcome)])
    return outcome


def do_share(study: Study, number: int) -> None:
    """Do the arms of process `number`, for a command that has done what is before them."""
    table = Table.of(study)
    with StopRequest() as stop:
        rewards = Rewards.of(study, table.options, table.training, stop)
        for arm in table.share(number):
            table.do(arm, rewards, stop)


def _policies(table: Table, stop: StopRequest) -> Policies:
    """Train every arm and watch its policy."""
    study, asked = table.study, table.asked
    rewards = Rewards.of(study, table.options, table.training, stop)
    name = f"untrained {study.identity['weights']}"
    folder = watching.watch(study, lambda: study.lm, name, asked, rewards, stop)
    untrained = watching.figures(folder, asked)
    first = [answer for answer in watching.answers_in(folder, JUDGED) if not answer.sample]
    changes = provoked(study, first[: table.options.canaries], rewards, stop)

    # This process does its share, then what the others could not do, and reads what they did.
    with beside.others(study, table.options.processes) as running:
        for arm in table.share(0):
            tell(f"arm {table.arms.index(arm) + 1} of {len(table.arms)}: {arm.name}")
            table.do(arm, rewards, stop)
        beside.wait(running, stop)
    figures: dict[Arm, dict[str, Floats]] = {}
    curves: dict[Arm, list[dict[str, Any]]] = {}
    for arm in table.arms:
        figures[arm], curves[arm] = table.do(arm, rewards, stop)
    return Policies(untrained, figures, curves, changes)


# -- figures ---------------------------------------------------------------------------------------


def figures_of(policies: Policies, options: Options) -> dict[str, Any]:
    """Everything but words, as plain JSON."""
    cells: dict[Cell, list[Arm]] = {}
    for arm in policies.trained:
        cells.setdefault(Cell(arm.reward, arm.level, arm.lr), []).append(arm)
    table: dict[str, dict[Cell, Floats]] = {}
    untrained = {}
    for name, values in policies.untrained.items():
        untrained[name] = values[None]
        table[name] = {}
        for cell, own in cells.items():
            table[name][cell] = np.stack([policies.trained[arm][name] for arm in own])
    judged = judge(table, untrained, HARMS, reward_name(FEATURES))
    rows = []
    for cell, own in cells.items():
        row: dict[str, Any] = cell._asdict()
        for name, stacked in table.items():
            seeds = stacked[cell].mean(1)
            row[name] = {"value": float(seeds.mean()), "seeds": seeds.tolist()}
        accuracy = table[ACCURACY]
        row["less_untrained"] = difference(accuracy[cell], untrained[ACCURACY]).record()
        outcome_only = None if cell.reward == OUTCOME else find(accuracy, OUTCOME, cell)
        if outcome_only is not None:
            row["less_r0"] = difference(accuracy[cell], accuracy[outcome_only]).record()
        row["curve"] = _curve(list(map(policies.curves.__getitem__, own)))
        rows.append(row)
    return {
        **judged,
        "options": vars(options),
        "untrained": {name: share(values) for name, values in policies.untrained.items()},
        "arms": rows,
        "changes": policies.provoked,
    }


def _curve(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """An arm's curves over training: {step, NAME: {mean, low, high}}, the range over its seeds.

    Steps are averaged in at most `_POINTS` groups.
    """
    steps = min(map(len, seeds))
    if not steps:
        return {}
    edges = np.unique(np.linspace(0, steps, min(_POINTS, steps) + 1).astype(int))
    found: dict[str, Any] = {"step": edges[1:].tolist()}
    for name, first in seeds[0][0].items():
        if name == "step" or not isinstance(first, int | float):
            continue
        values = np.array([_column(curve[:steps], name) for curve in seeds])
        points = np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)
        found[name] = {
            "mean": points.mean(0).tolist(),
            "low": points.min(0).tolist(),
            "high": points.max(0).tolist(),
        }
    return found


def _column(curve: Sequence[Mapping[str, Any]], name: str) -> Floats:
    return np.array([line[name] for line in curve], np.float64)


def refuses(subject: Subject, options: Mapping[str, Any]) -> str | None:
    """A reward reads the residual stream alone, see analyze/latents/reward.py."""
    if reason := refusals.all_but_saes(subject, options):
        return reason
    if subject.ports.reads[0].point.site == RESID_POST:
        return None
    return f"a reward reads resid_post, and {subject.run} is an SAE of {subject.where}"


DEFINITION = Definition(
    stage_gate_2,
    samples=8,
    options=Options,
    refuses=refuses,
    inputs=inputs,
    order=55,
)
