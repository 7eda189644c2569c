"""What the study `steering` says: its verdict, its sentences and its tables."""

from __future__ import annotations

import numpy as np

from residual_saes.analyze.changes.replies import (
    CHANGES,
    OUTCOMES,
    Row,
    change_cells,
    outcome_cells,
)
from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.stats import detectable_change, figure, formatted
from residual_saes.analyze.studies.steering.outcomes import DISCORDANT, Findings, Null, Overlap
from residual_saes.analyze.studies.steering.plot import over_scales

LEVEL = 0.05


def outcome(findings: Findings) -> Outcome:
    """The whole result."""
    caption = (
        f"Accuracy on {findings.unsteered.questions} test questions against the scale of v at "
        f"layer {findings.layer}, with Wilson's 95% intervals. Grey: other directions at "
        f"{findings.best:+g}, beside it. Dashed: unsteered."
    )
    picture = Picture(caption, over_scales(findings))
    tables = [
        _scale_table(findings),
        _recovery_table(findings),
        _control_table(findings),
        _overlap_table(findings),
        _dev_table(findings),
    ]
    figures = {"verdict": verdict(findings), **findings.figures()}
    return Outcome(figures, summary(findings), tables, {"steering": picture})


# -- sentences -------------------------------------------------------------------------------------


def summary(findings: Findings) -> list[str]:
    """The verdict first, then what it rests on."""
    lines = [_verdict(findings)]
    if verdict(findings) == "do nothing":
        lines.append(_effect(findings))
    return [
        *lines,
        _best_scale(findings),
        _other_scales(findings),
        _against_chance(findings),
        *_null_tests(findings),
        _power(findings),
        _vector(findings),
    ]


def verdict(findings: Findings) -> str:
    """What comes of steering by v.

    Returns:
        `broken` (a null test failed), `do nothing` (the dev questions chose no scale), or the
            `effect` at the scale that they chose.
    """
    if not all(test.held for test in findings.nulls):
        return "broken"
    return effect(findings) if findings.chosen else "do nothing"


def effect(findings: Findings) -> str:
    """What v does to accuracy at the best scale other than 0.

    Returns:
        `no effect`, `not shown` (a change that directions by chance make too, to either side),
            `raises` or `lowers`.
    """
    best = findings.best_row
    if best.p >= LEVEL:
        return "no effect"
    if findings.ranks["random"].p >= LEVEL:
        return "not shown"
    return "raises" if best.net > 0 else "lowers"


def _verdict(findings: Findings) -> str:
    word = verdict(findings)
    if word == "broken":
        return (
            "Nothing here is to be trusted: a sweep that must equal the unsteered one does not "
            "(see below)."
        )
    if word == "do nothing":
        return (
            f"Do nothing: of {len(findings.ids['dev'])} dev questions {findings.dev[0.0]} are "
            f"right unsteered, and at no scale more. {findings.best:+g} looks best of the others "
            f"({findings.dev[findings.best]} right); the controls are measured there."
        )
    return _effect(findings)


def _effect(findings: Findings) -> str:
    best = findings.best_row
    word = effect(findings)
    where = f"Steering layer {findings.layer} by {best.scale:+g} v ({best.positions} positions)"
    if word == "no effect":
        return f"{where} has no effect on accuracy that {best.questions} questions could show."
    if word in ("raises", "lowers"):
        return f"{where} {word} accuracy, and more than directions by chance do."
    # Even the smallest p that so few directions can give is too large.
    few = ""
    if 1 / (1 + findings.ranks["random"].of) >= LEVEL:
        few = "; too few were tried to tell more"
    change = "raises" if best.net > 0 else "lowers"
    return (
        f"{where} {change} accuracy, but not shown to be more than what directions by chance "
        f"do{few}."
    )


def _best_scale(findings: Findings) -> str:
    best = findings.best_row
    tried = len(findings.holm)
    source = ""
    if findings.chosen:
        source = (
            f"The scale {best.scale:+g} is the best of {tried} on {len(findings.ids['dev'])} dev "
            f"questions ({findings.dev[findings.best]} right, {findings.dev[0.0]} unsteered). "
        )
    form = ""
    if best.mended:
        form = (
            f" {best.mended} of the gained had no number behind #### unsteered: there the answer's "
            "form may be all that changed."
        )
    return (
        f"{source}At {best.scale:+g}, of {best.questions} test questions {_accuracy(best)} are "
        f"right, unsteered {_accuracy(findings.unsteered)}: "
        f"{len(best.gained)} gained, {len(best.lost)} lost, exact McNemar p = {_p(best.p)}, by "
        f"Holm over the {tried} scales {_p(findings.holm[findings.best])}.{form}"
    )


def _other_scales(findings: Findings) -> str:
    shown = []
    uncontrolled = False
    for row in findings.of("v"):
        p = findings.holm[row.scale]
        if p < LEVEL:
            shown.append(f"{row.scale:+g} ({row.net:+d} net, p = {_p(p)})")
            uncontrolled |= row.scale != findings.best
    if not shown:
        return "At no scale does accuracy differ from unsteered by Holm's p < 0.05."
    caveat = f" Other directions were tried at {findings.best:+g} alone." if uncontrolled else ""
    return f"By Holm's p < 0.05, accuracy differs from unsteered at {', '.join(shown)}.{caveat}"


def _against_chance(findings: Findings) -> str:
    directions = {"random": "directions by chance", "shuffled": "vectors from shuffled labels"}
    parts = []
    for kind, words in directions.items():
        rank = findings.ranks[kind]
        parts.append(
            f"{rank.as_far} of {rank.of} {words} move the number of right answers at least as far "
            f"as v, up or down (p = {_p(rank.p)}; {rank.as_high} have at least as many right, "
            f"{rank.as_low} at most as many)"
        )
    gained = len(findings.best_row.gained)
    tipped = ""
    if gained:
        tipped = (
            f" Of the {gained} questions that v gains, a direction by chance gains "
            f"{findings.gained_by_chance:.1f} on average."
        )
    return f"With the same norm and positions, {'; '.join(parts)}.{tipped}"


def _null_tests(findings: Findings) -> list[str]:
    sentences = [_null_test(null) for null in findings.nulls]
    if findings.layer < findings.inert_from:
        sentences.append(
            f"Steering the prompt alone is no null test at layer {findings.layer}: only from layer "
            f"{findings.inert_from} on does no later layer make keys and values from it."
        )
    return sentences


def _null_test(null: Null) -> str:
    row = null.row
    what = f"Steering the prompt alone by {row.scale:+g} v"
    if row.kind == "scale 0":
        what = "The hook at scale 0"
    if null.held:
        return f"{what} changes no token and no probability, as it must."
    return (
        f"{what} must change nothing; it changes {row.changed} answers, KL {row.kl:.2g} per token."
    )


def _power(findings: Findings) -> str:
    questions = findings.best_row.questions
    observed = findings.best_row.discordant
    usual_change = _points(detectable_change(questions, DISCORDANT))
    observed_change = _points(detectable_change(questions, observed))
    return (
        f"What {questions} questions can show with 80% power: {usual_change} if {DISCORDANT:.0%} "
        f"of the outcomes change, {observed_change} if {observed:.0%} do, as here."
    )


def _vector(findings: Findings) -> str:
    right, wrong = findings.answers
    samples = ""
    if findings.samples > 1:
        samples = f", {findings.samples} sampled to each; every sweep has one greedy answer"
    return (
        f"v is of {right} right and {wrong} wrong answers to {len(findings.ids['train'])} train "
        f"questions alone{samples}. It is steering_vec_L{findings.layer}.pt."
    )


# -- tables ----------------------------------------------------------------------------------------


def _scale_table(findings: Findings) -> Table:
    cells = []
    for row in findings.of("unsteered", "scale 0", "v"):
        scale = ("unsteered", "")
        if row.kind != "unsteered":
            scale = (f"{row.scale:g}", f"{row.scale / findings.norm:.1%}")
        holm_p = _p(findings.holm[row.scale]) if row.kind == "v" else ""
        cells.append((*scale, *outcome_cells(row), holm_p, *change_cells(row)))
    header = ("scale", "of mean norm", *OUTCOMES, "Holm p", *CHANGES)
    return Table(f"v on {findings.best_row.questions} test questions", header, cells)


def _control_table(findings: Findings) -> Table:
    cells = []
    for row in findings.of("opposite", "positions", "orthogonal", "shuffled", "random"):
        cells.append((row.kind, f"{row.scale:g}", *outcome_cells(row), *change_cells(row)))
    header = ("control", "scale", *OUTCOMES, *CHANGES)
    named = f"Controls at {findings.best:+g}, the best dev scale"
    if not findings.chosen:
        named += " other than 0; the dev questions chose to do nothing"
    return Table(named, header, cells)


def _recovery_table(findings: Findings) -> Table:
    """Every scale's questions that became right, and that became wrong."""
    cells = []
    for row in findings.of("v"):
        cells.append((f"{row.scale:g}", " ".join(row.gained), " ".join(row.lost)))
    return Table("Questions gained and lost by scale, by id", ("scale", "gained", "lost"), cells)


def _overlap_table(findings: Findings) -> Table:
    header = (
        "scales",
        "recovered by the first",
        "by the second",
        "by both",
        "their ids",
        "hypergeometric p",
        "Holm p",
    )
    cells = [_overlap_cells(overlap) for overlap in findings.overlaps]
    return Table("Questions that are wrong unsteered and right at two scales", header, cells)


def _overlap_cells(overlap: Overlap) -> tuple[str, ...]:
    first, second = overlap.scales
    by_first, by_second = overlap.recovered
    return (
        f"{first:g} and {second:g}",
        str(by_first),
        str(by_second),
        str(len(overlap.shared)),
        " ".join(overlap.shared),
        _p(overlap.p),
        _p(overlap.p_holm),
    )


def _dev_table(findings: Findings) -> Table:
    total = len(findings.ids["dev"])
    cells = []
    for scale, right in findings.dev.items():
        cells.append((f"{scale:g}" if scale else "unsteered", str(right), f"{right / total:.1%}"))
    return Table(f"v on {total} dev questions", ("scale", "right", "accuracy"), cells)


def _accuracy(row: Row) -> str:
    return formatted(figure(row.accuracy, row.interval), ".1%")


def _points(change: float) -> str:
    return "no difference" if np.isnan(change) else f"a difference of {100 * change:.1f} points"


def _p(value: float) -> str:
    return f"{value:.2g}"
