"""What the study `intervene` says: its rule, its verdict, its sentences, tables and picture."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from residual_saes.analyze.changes.replies import (
    CHANGES,
    OUTCOMES,
    Row,
    change_cells,
    outcome_cells,
)
from residual_saes.analyze.drawing import STYLE, svg
from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.stats import bracketed, detectable_change, figure, formatted
from residual_saes.analyze.studies.intervene.outcomes import (
    CHOSEN,
    CONTROLS,
    DIRECTIONS,
    KEPT,
    LATENTS,
    LEVEL,
    Attribution,
    Dose,
    Findings,
)

RULE = (
    f"Rule: of the doses at which other controls keep {KEPT:.0%} of right dev answers, the one at "
    "which they keep least decides. The latents change answers if there exact McNemar with "
    f"Holm over all doses has p < {LEVEL}, and the count of right answers moves further than with "
    f"random latents of equal density (p < {LEVEL}) and with random directions of equal norm "
    f"(p < {LEVEL}), up or down."
)
_SELECTIONS = {
    "list": "They were listed.",
    "gate": "The run's stage gate, whose verdict is {gate}, chose them as {side}.",
    "contrast": (
        "They are the most {side} of {of} by Hedges' g between right and wrong answers to train "
        "questions."
    ),
    "confidence": (
        "Of {of} latents whose mean activation was added, they are the most {side} to the "
        "log-probability of right answers to train questions."
    ),
}


def outcome(findings: Findings) -> Outcome:
    """The whole result."""
    caption = (
        f"Right answers to {findings.unsteered.questions} test questions at each dose at layer "
        f"{findings.layer}, with Wilson's 95% intervals. Grey: the same of random latents of "
        "equal density, and of random directions of equal norm. Dashed: without a change."
    )
    tables = [
        _dose_table(findings),
        _control_table(findings),
        _latent_table(findings),
        _question_table(findings),
        _dev_table(findings),
    ]
    pictures = {"intervene": Picture(caption, over_doses(findings))}
    return Outcome({"rule": RULE, **findings.figures()}, summary(findings), tables, pictures)


# -- sentences -------------------------------------------------------------------------------------


def summary(findings: Findings) -> list[str]:
    """The verdict first, then the rule and what the verdict rests on."""
    return [
        _verdict(findings),
        RULE,
        _best(findings),
        _against_controls(findings),
        *_other_doses(findings),
        _null(findings),
        _power(findings),
        _selected(findings),
        *_attributed(findings.attribution, len(findings.latents)),
    ]


def _verdict(findings: Findings) -> str:
    count = len(findings.latents)
    what = f"the {count} latents" if count > 1 else f"latent {findings.latents[0]['feature']}"
    where = f"{_done(findings.best)} {what} of layer {findings.layer} at {_positions(findings)}"
    word = findings.verdict
    if word == "broken":
        return "Nothing here is to be trusted: the hook with nothing to add changes answers."
    if word == "no effect":
        questions = findings.unsteered.questions
        return f"{where} has no effect on answers that {questions} questions could show."
    moves = "more" if findings.best_row.net > 0 else "fewer"
    if word == "not shown":
        few = ""
        if 1 / (1 + findings.ranks[LATENTS].of) >= LEVEL:
            few = "; too few controls were tried to tell more"
        return (
            f"{where}: {moves} answers are right, but not shown to be more than what random "
            f"latents or directions do{few}."
        )
    return f"{where} changes answers: {moves} are right, and further than controls move the count."


def _done(dose: Dose) -> str:
    """A dose as the beginning of a sentence."""
    if dose.change == "ablate":
        return "Ablating"
    times = f"{dose.scale:g} times the mean activation"
    return f"Adding {times} to" if dose.change == "add" else f"Clamping to {times}"


def _positions(findings: Findings) -> str:
    positions = findings.selection["positions"]
    return "all positions" if positions == "all" else f"positions `{positions}`"


def _best(findings: Findings) -> str:
    best = findings.best_row
    tried = len(findings.dev)
    source = ""
    if tried > 1 and findings.kept[findings.best] < KEPT:
        source = (
            f"At all {tried} doses controls keep less than {KEPT:.0%} of right dev answers, and "
            f"most at {findings.best} ({findings.kept[findings.best]:.0%}); give smaller "
            "study.doses=. "
        )
    elif tried > 1:
        source = (
            f"Of {tried} doses, {findings.best} is the strongest at which other controls keep "
            f"{KEPT:.0%} of the {findings.dev_right} right answers to "
            f"{len(findings.ids['dev'])} dev questions ({findings.kept[findings.best]:.0%}). "
        )
    return (
        f"{source}Of {best.questions} test questions {_accuracy(best)} are right, without a change "
        f"{_accuracy(findings.unsteered)}: {len(best.gained)} gained, {len(best.lost)} lost, exact "
        f"McNemar p = {_p(best.p)}, by Holm over all doses "
        f"{_p(findings.holm[findings.best])}."
    )


def _against_controls(findings: Findings) -> str:
    words = {LATENTS: "sets of random latents", DIRECTIONS: "random directions"}
    parts = []
    for kind, noun in words.items():
        rank = findings.ranks[kind]
        parts.append(
            f"{rank.as_far} of {rank.of} {noun} move the number of right answers at least as far, "
            f"up or down (p = {_p(rank.p)})"
        )
    return f"With the same change, {'; '.join(parts)}."


def _other_doses(findings: Findings) -> list[str]:
    shown = []
    for measured in findings.of(CHOSEN):
        p = findings.holm[measured.dose]
        if p < LEVEL and measured.dose != findings.best:
            shown.append(f"{measured.dose} ({measured.row.net:+d} net, p = {_p(p)})")
    if len(findings.dev) == 1:
        return []
    if not shown:
        return ["At no other dose do right answers differ by Holm's p < 0.05."]
    return [f"By Holm's p < 0.05 they also differ at {', '.join(shown)}, with few controls there."]


def _null(findings: Findings) -> str:
    if findings.held:
        return "The hook with nothing to add changes no token and no probability, as it must."
    return "The hook with nothing to add must change nothing, and it does."


def _power(findings: Findings) -> str:
    questions = findings.unsteered.questions
    gained_or_lost = findings.best_row.discordant
    change = detectable_change(questions, gained_or_lost)
    said = "no difference" if np.isnan(change) else f"a difference of {100 * change:.1f} points"
    return (
        f"What {questions} questions can show with 80% power if {gained_or_lost:.0%} of the "
        f"outcomes change, as here: {said}."
    )


def _selected(findings: Findings) -> str:
    selection = findings.selection
    names = _listed([latent["feature"] for latent in findings.latents], "d")
    how = _SELECTIONS[selection["by"]].format(**selection)
    return f"The latents: {names}. {how} No dev or test question chose them."


def _attributed(attribution: Attribution | None, chosen: int) -> list[str]:
    if attribution is None:
        return ["No right answer holds a number, so there is no attribution."]
    others = len(attribution.features) - chosen
    interval = bracketed(attribution.interval, ".2f")
    return [
        f"Attribution: gradient times activation orders what ablating each of {chosen} chosen and "
        f"{others} random latents alone does to ln p of the answer's number with Spearman's rho "
        f"{attribution.rho:.2f} {interval} over {attribution.answers} right answers (pairs "
        f"permuted, p = {_p(attribution.p)})."
    ]


# -- tables ----------------------------------------------------------------------------------------


def _dose_table(findings: Findings) -> Table:
    none = findings.unsteered
    cells = [("none", *outcome_cells(none), "", *change_cells(none))]
    for kind, dose, row in findings.measured:
        if kind not in CONTROLS:
            p = _p(findings.holm[dose]) if kind == CHOSEN else ""
            name = str(dose) if kind == CHOSEN else kind
            cells.append((name, *outcome_cells(row), p, *change_cells(row)))
    header = ("dose", *OUTCOMES, "Holm p", *CHANGES)
    return Table(f"The chosen latents on {none.questions} test questions", header, cells)


def _control_table(findings: Findings) -> Table:
    cells = []
    for kind, dose, row in findings.measured:
        if kind in CONTROLS:
            cells.append((kind, str(dose), *outcome_cells(row), *change_cells(row)))
    header = ("control", "dose", *OUTCOMES, *CHANGES)
    return Table(f"Controls; {findings.best} is the dose that dev questions chose", header, cells)


def _latent_table(findings: Findings) -> Table:
    attribution = findings.attribution
    cells = []
    for place, latent in enumerate(findings.latents):
        effects = ("", "")
        if attribution:
            effects = (
                f"{attribution.estimated[place]:+.2g}",
                f"{attribution.measured[place]:+.2g}",
            )
        score = "" if latent["score"] is None else f"{latent['score']:+.3g}"
        cells.append(
            (
                str(latent["feature"]),
                score,
                f"{latent['density']:.3g}",
                f"{latent['mean']:.3g}",
                *effects,
            )
        )
    header = (
        "latent",
        "score",
        "density",
        "mean activation",
        "ablated, first order",
        "ablated, measured",
    )
    caption = "The chosen latents in train answers; effects on ln p of the number, nats an answer"
    return Table(caption, header, cells)


def _question_table(findings: Findings) -> Table:
    cells = []
    for _, dose, row in findings.of(CHOSEN):
        cells.append((str(dose), " ".join(row.gained), " ".join(row.lost)))
    return Table("Questions gained and lost by dose, by id", ("dose", "gained", "lost"), cells)


def _dev_table(findings: Findings) -> Table:
    cells = []
    for dose, right in findings.dev.items():
        cells.append((str(dose), _listed(right, "d"), f"{findings.kept[dose]:.0%}"))
    caption = (
        f"Right answers to {len(findings.ids['dev'])} dev questions with other controls; "
        f"{findings.dev_right} without a change"
    )
    return Table(caption, ("dose", "controls", "kept"), cells)


def _listed(numbers: Sequence[int], form: str) -> str:
    return ", ".join(f"{number:{form}}" for number in numbers)


def _accuracy(row: Row) -> str:
    return formatted(figure(row.accuracy, row.interval), ".1%")


def _p(value: float) -> str:
    return f"{value:.2g}"


# -- the picture -----------------------------------------------------------------------------------

_GREY = "#6b7280"


def over_doses(findings: Findings) -> str:
    """A panel of what is set (ablate is clamp 0), and one of what is added."""
    panels = {"clamped to": ("ablate", "clamp"), "added": ("add",)}
    doses = [*findings.dev]
    shown = {}
    for name, kinds in panels.items():
        if own := [dose for dose in doses if dose.change in kinds]:
            shown[name] = own
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(0.8 + 3.4 * len(shown), 3.4), layout="constrained")
        panes = np.atleast_1d(drawn.subplots(1, len(shown), sharey=True))
        for axes, (name, own) in zip(panes, shown.items(), strict=True):
            _panel(axes, findings, sorted(own, key=lambda dose: dose.scale))
            axes.set_xlabel(f"{name}, times the mean activation")
        panes[0].set_ylabel("share of right answers")
        handles, labels = panes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3)
        return svg(drawn)


def _panel(axes: Axes, findings: Findings, doses: Sequence[Dose]) -> None:
    """One panel, with its doses at equal distances: they are far from even."""
    places = np.arange(len(doses))
    points = []
    names = []
    for dose in doses:
        row = findings.of(CHOSEN, dose)[0].row
        points.append((row.accuracy, *row.interval))
        names.append("0 (ablated)" if dose.change == "ablate" else f"{dose.scale:g}")
    shares, low, high = np.array(points).T
    errors = [shares - low, high - shares]
    axes.errorbar(places, shares, errors, marker="o", markersize=4, capsize=3, label=CHOSEN)
    for kind, marker, shift in ((LATENTS, "o", -0.18), (DIRECTIONS, "x", 0.18)):
        drawn = []
        for place, dose in enumerate(doses):
            for measured in findings.of(kind, dose):
                drawn.append((place + shift, measured.row.accuracy))
        x, y = np.array(drawn).T
        axes.plot(x, y, marker, color=_GREY, markersize=4, alpha=0.6, label=kind)
    axes.axhline(findings.unsteered.accuracy, color=_GREY, linestyle="--", linewidth=1)
    axes.set_xticks(places, names)
    axes.set_xlim(-0.5, len(doses) - 0.5)
