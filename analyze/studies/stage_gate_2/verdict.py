"""Whether feature rewards help GRPO: arms compared over questions and seeds, and the rule.

A training is repeated with other seeds, and all trainings answer the same questions. The difference
of two arms is to hold for other seeds and for other questions, so both vary: the design of
multi-reader studies in radiology, with seeds as readers that belong to one arm each (Obuchowski and
Rockette 1995; Hillis 2014, "readers nested within test"). With y[s, q] the outcome of seed s on
question q, S seeds and Q questions, the variance of the difference of two arms' means is

    V = V_seed + max(V_question - V_rest, 0)

    V_seed      sum over arms of the variance of a seed's mean / S
    V_question  variance of the difference of a question's means over seeds / Q
    V_rest      sum over arms of the mean square of y[s, q] without its seed's and its question's
                mean / (S Q): it is in both of the others

Intervals and p are those of Student's t with the degrees of freedom of Satterthwaite, each arm's
seeds with a variance of their own (Welch): three seeds give 2 to 4 where seeds decide. A sign or
permutation test over seeds could not be significant at all: 3 + 3 seeds have 20 orders.

Shapes: S seeds, Q questions (or documents).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from residual_saes.analyze.stats import Floats, Interval, bootstrap_ratio, figure, holm, wilson

LEVEL = 0.05
POWER = 0.8
LEAST_SEEDS = 3
# What is assumed before the run, see `planned`.
DISAGREEMENT = 0.2
SEED_SPREAD = 0.01
ACCURACY = "right"
DECISIVE = ("R0", "R3")  # arms that R1 must beat
LENIENT = "right, whatever the form"  # an answer without `#### ` is graded by its last number
RULE = (
    "A level passes if at one learning rate R1 (outcome + features) has more right answers than R0 "
    "(outcome alone) and than R3 (outcome + random latents of equal density), both at that rate. "
    "Each difference must have its 95% interval over questions and seeds above 0, and the larger "
    f"of the two p be below {LEVEL} by Holm over all rates and levels. Both must hold too where an "
    "answer without '#### ' is graded by its last number, so that form alone does not pass. R0 may "
    f"have more at no other rate. Fewer than {LEAST_SEEDS} seeds an arm decide nothing. Beside it "
    "stands whether R1 beats R2 (outcome + raw direction), and what R1 does worse than R0 or than "
    "the untrained model, by any interval that excludes 0."
)


class Cell(NamedTuple):
    """What all seeds of an arm share."""

    reward: str  # R0 to R4
    level: str  # of the reward: trajectory or token
    lr: float


class Difference(NamedTuple):
    """The mean of one arm less another's, for other seeds and other questions."""

    value: float
    error: float  # standard error; NaN where an arm that was trained has one seed
    df: float
    p: float  # two-sided
    detectable: float  # the least true difference that is found with a probability of `POWER`
    seed_variance: float  # V_seed

    @property
    def interval(self) -> Interval | None:
        if math.isnan(self.error):
            return None
        half = stats.t.isf(LEVEL / 2, self.df) * self.error if self.error else 0.0
        return Interval(self.value - half, self.value + half)

    def record(self) -> dict[str, Any]:
        """As results keep it."""
        return {**self._asdict(), "interval": self.interval}


def difference(first: Floats, second: Floats) -> Difference:
    """The mean of `first` (S, Q) less that of `second` (S', Q), the same questions in both.

    An arm of one row is one policy that has no seeds, such as the untrained model, unless both are.
    """
    arms = (first, second)
    questions = first.shape[1]
    value = float(first.mean() - second.mean())
    if questions < 2 or max(len(first), len(second)) < 2:
        return Difference(value, math.nan, math.nan, math.nan, math.nan, math.nan)
    seed = list(map(_of_seeds, arms))
    question = float(np.var(first.mean(0) - second.mean(0), ddof=1)) / questions
    beyond = max(question - sum(map(_rest, arms)), 0.0)
    variance = sum(seed) + beyond
    if variance <= 0:
        return Difference(value, 0.0, 1.0, 1.0 if not value else 0.0, 0.0, 0.0)
    spread = beyond**2 / (questions - 1)
    for arm, part in zip(arms, seed, strict=True):
        spread += part**2 / (len(arm) - 1) if len(arm) > 1 else 0.0
    df = variance**2 / spread
    error = math.sqrt(variance)
    p = float(2 * stats.t.sf(abs(value) / error, df))
    return Difference(value, error, df, p, detectable(error, df), sum(seed))


def _of_seeds(arm: Floats) -> float:
    """Variance of an arm's mean from its seeds; 0 of an arm that has none."""
    if len(arm) < 2:
        return 0.0
    spread = float(np.var(arm.mean(1), ddof=1))
    return spread / len(arm)


def _rest(arm: Floats) -> float:
    """Variance of an arm's mean from what neither the seed nor the question explains."""
    seeds, questions = arm.shape
    if seeds < 2:
        return 0.0
    rest = arm - arm.mean(1, keepdims=True) - arm.mean(0) + arm.mean()
    squares = float(np.square(rest).sum())
    return squares / float((seeds - 1) * (questions - 1) * seeds * questions)


def detectable(error: float, df: float, power: float = POWER) -> float:
    """The least true difference that the two-sided test finds with probability `power`."""
    critical = stats.t.isf(LEVEL / 2, df)
    # The noncentrality at which Student's t stays below the critical value so rarely.
    return error * float(special.nctdtrinc(df, 1 - power, critical))


def planned(seeds: int, questions: int) -> float:
    """The least difference of two arms that would be found with probability `POWER`.

    It is assumed that two trainings differ in `DISAGREEMENT` of the questions, and that seeds move
    the accuracy of an arm by a standard deviation of `SEED_SPREAD`.
    """
    variance = 2 * SEED_SPREAD**2 / seeds + DISAGREEMENT / (seeds * questions)
    return detectable(math.sqrt(variance), 2 * (seeds - 1))


def share(values: Floats) -> dict[str, Any]:
    """The mean of one policy's outcomes (Q,), as a figure; Wilson's interval of yes and no."""
    if np.isin(values, (0, 1)).all():
        return figure(values.mean(), wilson(int(values.sum()), len(values)))
    return figure(values.mean(), bootstrap_ratio(values, np.ones(len(values))))


# -- the rule --------------------------------------------------------------------------------------


class Harm(NamedTuple):
    """A figure that must not get worse, by policy and question or document."""

    name: str
    sign: int  # 1: more is worse; -1: less is worse
    form: str  # of its numbers


Table = Mapping[str, Mapping[Cell, Floats]]  # figure -> arm -> (S, Q)


def judge(
    table: Table, untrained: Mapping[str, Floats], harms: Sequence[Harm], reward: str
) -> dict[str, Any]:
    """The verdict by `RULE`, of every level and rate at which R1 was trained.

    Args:
        table: ACCURACY, LENIENT, the harms' and the frozen reader's figures of every arm.
        untrained: the same of the untrained model, (1, Q) each.
        reward: name of the figure that is R1's own reward, by the frozen reader.
    """
    found: dict[Cell, dict[str, Any]] = {}
    for cell in table[ACCURACY]:
        if cell.reward == "R1":
            found[cell] = _candidate(table, cell)
    # One family: a pass at any rate and level would be called one.
    decided = [entry for entry in found.values() if not entry["undecided"]]
    for entry, p in zip(decided, holm(list(map(_p, decided))), strict=True):
        entry["p_holm"] = float(p)
    levels: dict[str, dict[str, Any]] = {}
    for cell, entry in found.items():
        entry["missing"] = _missing(entry)
        entry["alarms"] = _alarms(table, untrained, cell, harms, reward)
        word = "fail" if entry["missing"] else "pass"
        entry["verdict"] = "undecided" if entry["undecided"] else word
        # A level is judged by the rate that passes, else by that of the least p.
        if cell.level not in levels or _rank(entry) < _rank(levels[cell.level]):
            levels[cell.level] = entry
    best = min(levels.values(), key=_rank, default={"verdict": "undecided"})
    return {
        "verdict": best["verdict"],
        "rule": RULE,
        "levels": levels,
        "candidates": list(found.values()),
    }


def _p(entry: Mapping[str, Any]) -> float:
    return float(entry["p"])


def _rank(entry: Mapping[str, Any]) -> tuple[int, float]:
    return ("pass", "fail", "undecided").index(entry["verdict"]), entry["p"]


def _candidate(table: Table, cell: Cell) -> dict[str, Any]:
    """R1 at a level and rate beside R0, R3 and R2 at the same."""
    accuracy = table[ACCURACY]
    own = accuracy[cell]
    beside: dict[str, dict[str, Any]] = {}
    undecided: list[str] = []
    p = 0.0
    for reward in (*DECISIVE, "R2"):
        other = find(accuracy, reward, cell)
        if other is None:
            undecided += [f"there is no {reward} at this rate"] if reward in DECISIVE else []
            continue
        beside[reward] = {}
        for name in (ACCURACY, LENIENT):
            gap = difference(table[name][cell], table[name][other])
            beside[reward][name] = gap.record()
            p = max(p, gap.p) if reward in DECISIVE and not math.isnan(gap.p) else p
        seeds = min(len(own), len(accuracy[other]))
        if reward in DECISIVE and seeds < LEAST_SEEDS:
            undecided = [f"{LEAST_SEEDS} seeds of each arm are needed, and there are {seeds}"]
    better = []
    for other, values in accuracy.items():
        if other.reward == "R0" and other.lr != cell.lr and values.mean() > own.mean():
            better.append(other.lr)
    return {
        **cell._asdict(),
        "accuracy": float(own.mean()),
        "beside": beside,
        "better_r0": better,
        "undecided": undecided,
        "p": p,
        "p_holm": None,
    }


def find(cells: Iterable[Cell], reward: str, beside: Cell) -> Cell | None:
    """The arm of another reward at the same rate; R0 has no level of its own."""
    for cell in cells:
        if (cell.reward, cell.lr) == (reward, beside.lr) and (
            reward == "R0" or cell.level == beside.level
        ):
            return cell
    return None


def _missing(entry: Mapping[str, Any]) -> list[str]:
    """The conditions of a pass that do not hold."""
    missing = []
    for reward in DECISIVE:
        gaps = entry["beside"].get(reward)
        if gaps is None:
            continue
        if not is_above(gaps[ACCURACY]):
            missing.append(f"more right answers than {reward}")
        elif not is_above(gaps[LENIENT]):
            missing.append(f"more than {reward} whatever the form of the answer")
    if not missing and entry["p_holm"] is not None and entry["p_holm"] >= LEVEL:
        missing.append(f"p < {LEVEL} by Holm (it is {entry['p_holm']:.2g})")
    for lr in entry["better_r0"]:
        missing.append(f"no R0 with more right answers (at lr {lr:g} it has)")
    return missing


def is_above(gap: Mapping[str, Any]) -> bool:
    """Whether a difference's interval is above 0."""
    return gap["interval"] is not None and gap["interval"][0] > 0


def is_below(gap: Mapping[str, Any]) -> bool:
    """Whether it is below 0."""
    return gap["interval"] is not None and gap["interval"][1] < 0


def _alarms(
    table: Table,
    untrained: Mapping[str, Floats],
    cell: Cell,
    harms: Sequence[Harm],
    reward: str,
) -> list[dict[str, Any]]:
    """What R1 does worse than R0 at its rate, and than the untrained model."""
    found = []
    outcome_only = find(table[ACCURACY], "R0", cell)
    others = {"the untrained model": untrained}
    if outcome_only is not None:
        others["R0"] = {name: arms[outcome_only] for name, arms in table.items()}
    for noun, other in others.items():
        for harm in harms:
            if harm.name not in table:
                continue
            gap = difference(table[harm.name][cell], other[harm.name]).record()
            if is_above(gap) if harm.sign > 0 else is_below(gap):
                found.append({"what": harm.name, "form": harm.form, "than": noun, "by": gap})
    risen = difference(table[reward][cell], untrained[reward]).record()
    right = difference(table[ACCURACY][cell], untrained[ACCURACY]).record()
    if is_above(risen) and not is_above(right):
        word = "falls" if is_below(right) else "does not rise"
        said = f"its own reward rises while accuracy {word}"
        found.append({"what": said, "form": ".3f", "than": "the untrained model", "by": risen})
    return found
