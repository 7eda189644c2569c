"""What stage gate 2 says: verdict, tables and page, from the figures of `study.figures_of`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from residual_saes.analyze.outcome import Outcome, Table
from residual_saes.analyze.pages.template import rendered
from residual_saes.analyze.stats import formatted
from residual_saes.analyze.studies.stage_gate_2.arms import Options
from residual_saes.analyze.studies.stage_gate_2.verdict import (
    ACCURACY,
    DISAGREEMENT,
    LENIENT,
    POWER,
    RULE,
    SEED_SPREAD,
    is_above,
    planned,
)
from residual_saes.analyze.studies.stage_gate_2.watching import (
    HARMS,
    HINTED,
    UNHINTED,
    reward_name,
)
from residual_saes.data.neutral import neutral

_SIGNED = "+.3f"
_WATCHED = {harm.name: harm.form for harm in HARMS} | {HINTED: ".3f", UNHINTED: ".3f"}


# -- before the run --------------------------------------------------------------------------------


def before(options: Options, trainings: int, questions: int) -> list[str]:
    """The rule, the work, and what could be shown."""
    lines = [
        f"The rule: {RULE}",
        f"{trainings} trainings of {options.steps * options.of_step:,} rollouts each, judged by "
        f"{questions} questions",
    ]
    if options.seeds > 1:
        lines.append(
            f"with {options.seeds} seeds the least difference that is found with probability "
            f"{POWER} is {planned(options.seeds, questions):.3f} of the answers, if two trainings "
            f"differ in {DISAGREEMENT:.0%} of the questions and the seeds of an arm by a standard "
            f"deviation of {SEED_SPREAD}"
        )
    return lines


# -- sentences -------------------------------------------------------------------------------------


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The verdict with its rule, then what it rests on."""
    levels = figures["levels"]
    because = "; ".join(map(_reason, levels.values())) or "no R1 was trained"
    lines = [f"Verdict: {figures['verdict']} ({because}).", f"The rule: {figures['rule']}"]
    lines += list(map(_beside, levels.values()))
    lines.append(_untrained(figures))
    lines += list(map(_harms, levels.values()))
    lines.append(_changes(figures["changes"]))
    lines.append(
        "Brackets are 95% intervals over questions and seeds. What would have been found is the "
        f"least true difference that the test finds with probability {POWER}. What R1 does worse, "
        "and what raises a reward, is not adjusted for the number of figures watched: it warns, "
        "and decides nothing."
    )
    return lines


def _reason(entry: Mapping[str, Any]) -> str:
    """Why a level has its verdict, with what was lost."""
    where = f"{entry['level']}, lr {entry['lr']:g}"
    why = entry["undecided"] or entry["missing"]
    missing = "" if entry["undecided"] else "it lacks "
    said = [f"{where}: {entry['verdict']}" + (f", {missing}{'; '.join(why)}" if why else "")]
    if entry["verdict"] == "pass" and "R2" in entry["beside"]:
        beats = is_above(entry["beside"]["R2"][ACCURACY])
        said.append("R2 beaten" if beats else "not shown to be better than a raw direction, R2")
    if entry["alarms"]:
        said.append("R1 is worse in " + ", ".join(_names(entry)))
    return ", ".join(said)


def _names(entry: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(alarm["what"] for alarm in entry["alarms"]))


def _beside(entry: Mapping[str, Any]) -> str:
    parts = []
    for reward, gaps in entry["beside"].items():
        gap = gaps[ACCURACY]
        part = f"R1 - {reward} = {formatted(gap, _SIGNED)}"
        if gap["interval"] is not None:
            part += f" (p = {gap['p']:.2g}; {gap['detectable']:.3f} would have been found)"
        parts.append(part)
    said = ", ".join(parts) or "nothing stands beside it"
    if entry["p_holm"] is not None:
        said += f"; adjusted p = {entry['p_holm']:.2g}"
    return (
        f"By {entry['level']}, at lr {entry['lr']:g}, R1 has {entry['accuracy']:.3f} right "
        f"answers: {said}."
    )


def _untrained(figures: Mapping[str, Any]) -> str:
    best = max(figures["arms"], key=lambda row: row[ACCURACY]["value"])
    return (
        f"The untrained model has {formatted(figures['untrained'][ACCURACY], '.3f')} right answers "
        f"to {figures['questions']['judged']} questions. The arm with most is {_name(best)}, with "
        f"{best[ACCURACY]['value']:.3f}; the difference is "
        f"{formatted(best['less_untrained'], _SIGNED)}."
    )


def _harms(entry: Mapping[str, Any]) -> str:
    said = []
    for alarm in entry["alarms"]:
        by = formatted(alarm["by"], f"+{alarm['form']}")
        said.append(f"{alarm['what']} ({by} beside {alarm['than']})")
    watched = ", ".join(harm.name for harm in HARMS)
    if not said:
        return f"By {entry['level']}, no interval says that R1 is worse in any of: {watched}."
    return f"By {entry['level']}, R1 is worse in: {'; '.join(said)}."


def _changes(changes: Mapping[str, Mapping[str, Any]]) -> str:
    raised = []
    for reward, by_change in changes.items():
        for change, raise_ in by_change.items():
            if raise_["exploitable"]:
                raised.append(f"{reward} by {change} ({formatted(raise_, '+.2f')})")
    if not raised:
        return "No change that makes an answer no better raises the mean reward of an answer."
    return (
        "Changes that make an answer no better raise rewards, in standard deviations over answers: "
        f"{'; '.join(raised)}."
    )


def _name(row: Mapping[str, Any]) -> str:
    level = "" if row["reward"] == "R0" else f" {row['level']}"
    return f"{row['reward']}{level}, lr {row['lr']:g}"


# -- tables ----------------------------------------------------------------------------------------


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """All arms, what was watched in them, and the rewards under worthless changes."""
    return [*_of_arms(figures), *_of_changes(figures["changes"])]


def _of_arms(figures: Mapping[str, Any]) -> Iterator[Table]:
    untrained = figures["untrained"]
    rows = [("untrained", formatted(untrained[ACCURACY], ".3f"), "", "", "", "")]
    columns = _columns(figures)
    watched = [("untrained", *_values(untrained, columns))]
    for row in figures["arms"]:
        beside = row.get("less_r0")
        rows.append(
            (
                _name(row),
                f"{row[ACCURACY]['value']:.3f}",
                " ".join(f"{value:.3f}" for value in row[ACCURACY]["seeds"]),
                formatted(row["less_untrained"], _SIGNED),
                formatted(beside, _SIGNED) if beside else "-",
                f"{beside['p']:.2g}" if beside and beside["interval"] else "-",
            )
        )
        watched.append((_name(row), *_values(row, columns)))
    header = ("arm", "right", "by seed", "less untrained", "less R0 at its rate", "p")
    yield Table("Right answers of all arms", header, rows)
    names = [name for name, _ in columns]
    yield Table("What was watched, means over seeds", ("arm", *names), watched)


def _columns(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and forms of what was watched."""
    columns = [(LENIENT, ".3f"), *_WATCHED.items()]
    columns += [(reward_name(reward), ".3f") for reward in figures["changes"]]
    return [column for column in columns if column[0] in figures["untrained"]]


def _values(row: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{row[name]['value']:{form}}" for name, form in columns]


def _of_changes(changes: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    if not changes:
        return
    names = list(next(iter(changes.values())))
    rows = []
    for name in names:
        rows.append((name, *(formatted(by_change[name], "+.2f") for by_change in changes.values())))
    caption = (
        "How much a change that makes an answer no better raises each reward, in standard "
        "deviations over the untrained model's answers"
    )
    yield Table(caption, ("change", *changes), rows)


# -- the page --------------------------------------------------------------------------------------


def page(run: Path, outcome: Outcome) -> bytes:
    """One page that needs no network."""
    return rendered(
        "study.html",
        title="stage gate 2",
        name=neutral(run.absolute().name),
        summary=outcome.summary,
        pictures=list(outcome.pictures.values()),
        tables=outcome.tables,
    )
