"""What each study asks, and what it answers, in words that need no other page.

An answer begins with yes, no or not shown where the question allows it. The studies' own sentences,
with intervals and tests, are theirs: see words.py of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from residual_saes.analyze.stats import number, percent

Figures = Mapping[str, Any]

QUESTIONS = {
    "gsm8k": "How many word problems does the model answer right?",
    "contrast": "Do features tell right answers from wrong ones?",
    "steering": "Are more answers right if the model is pushed from wrong towards right ones?",
    "stage_gate": "Can features pick the right one of several answers?",
    "rollouts": "Can features pick the right one of several drawn answers?",
    "intervene": "Are more answers right when features are removed or held?",
    "stage_gate_2": "Does the model learn to answer better when features are its reward?",
    "logit_lens": "From which layer on does the model know its next token?",
    "reason_score": "Which features fire around words of reasoning?",
    "splice": "Does the model still predict well from what is rebuilt?",
    "probes": "Do a few features tell what a text is about?",
    "stability": "Does another training find the same features?",
    "cross_layer": "Do features of this run foretell those of another layer?",
    "diff": "Which features belong to one side alone?",
    "catalogue": "Where does each feature fire?",
}


# By study and verdict.
_VERDICTS = {
    "changed": {
        "broken": "It cannot be said: a change by nothing changed answers, so something is wrong.",
        "do nothing": "No: on a first set of questions, nothing did better than to leave the model "
        "alone.",
        "no effect": "Not shown: what did best on a first set of questions makes, on a second, no "
        "difference beyond chance.",
        "not shown": "Not shown: how many are right changes no more than by chance, with other "
        "features or directions.",
        "raises": "Yes: more are right, and by more than other features or directions give.",
        "lowers": "No: fewer are right, and by more than other features or directions take.",
    },
    "gate": {
        "pass": "Yes: their score tells right answers from wrong ones, beyond what an answer's "
        "length tells, by a rule that was fixed before.",
        "weak": "Somewhat: their score tells right answers from wrong ones, but less than the rule "
        "that was fixed before asks for.",
        "fail": "Not shown: their score does not tell right answers from wrong ones well enough, "
        "by a rule that was fixed before.",
        "undecided": "It cannot be said: there are too few answers to compare.",
    },
    "stage_gate_2": {
        "pass": "Yes: it has more right answers than one that was rewarded for right answers "
        "alone, and than one whose added features are random.",
        "fail": "Not shown: it has no more right answers than one that was rewarded for right "
        "answers alone, or than one whose added features are random.",
        "undecided": "It cannot be said: too little was trained to compare.",
    },
    "probes": {
        "better": "Yes, and better than as many of the layer's own numbers, as random features, "
        "and as the text's length.",
        "no better": "Not shown: as many of the layer's own numbers, random features, or the "
        "text's length tell it about as well.",
        "worse": "No: as many of the layer's own numbers tell it better.",
        "undecided": "It cannot be said: even all numbers of the layer together do not tell it.",
    },
}
_SAME = {
    "steering": "changed",
    "intervene": "changed",
    "stage_gate": "gate",
    "rollouts": "gate",
}


def answer(study: str, figures: Figures) -> str | None:
    """A study's answer in a sentence or two.

    Args:
        figures: of its result, fresh or as JSON has them.

    Returns:
        None if there are no words for it, or the result is of a version with other figures.
    """
    try:
        if study in _MEASURED:
            return _MEASURED[study](figures)
        return _VERDICTS[_SAME.get(study, study)][figures["verdict"]]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _contrast(figures: Figures) -> str:
    features = figures["features"]
    if features["raw"] is None:
        return "It cannot be said: no feature fires in enough answers."
    found = features["raw"]["below_5_percent_fdr"]
    of = f"of {features['tested']:,} features that fire in enough answers"
    if not found:
        return f"Not shown: none {of} differs by more than chance."
    if not (adjusted := features["adjusted"]):
        return f"Yes: {found:,} {of} differ. About one in 20 of such finds is chance."
    left = adjusted["below_5_percent_fdr"]
    covariates = [name.removeprefix("log ") for name in figures["covariates"]]
    equal = f"between answers of equal {', '.join(covariates)}"
    if not left:
        return f"Not shown: {found:,} {of} differ, but none does {equal}."
    both = f"{found:,} {of} differ, and {left:,} {equal}"
    return f"Yes: {both}. About one in 20 of such finds is chance."


def _logit_lens(figures: Figures) -> str:
    layers = figures["layers"]
    unlike = [row["layer"] for row in layers if row["agrees"]["value"] < 0.5]
    return (
        f"From layer {max(unlike, default=-1) + 1} on, of 0 to {layers[-1]['layer']}: if the model "
        "ended there, it would name the same next token at half of the places or more."
    )


def _reason_score(figures: Figures) -> str:
    found = f"{figures['significant']:,} of {figures['tested']:,} features do so"
    return f"{found}, more than around other words that are as frequent."


def _splice(figures: Figures) -> str:
    rows = {(row["name"], row["where"]): row for row in figures["rows"]}
    row = rows["sae", "all positions"]
    recovered, worse = (row[key]["value"] for key in ("loss_recovered", "difference"))
    return (
        f"It keeps {percent(recovered)} of what the layer adds to its predictions: its loss, "
        f"-ln of the next token's probability, is {number(worse, 3)} larger than with the layer's "
        "own numbers. 100% would be no difference; 0% is a layer of zeros."
    )


def _stability(figures: Figures) -> str:
    level, matched = "0.7", figures["matched"]
    shares = [percent(matched[key]["above"][level]["share"]) for key in ("other", "random")]
    return (
        f"{shares[0]} of the features that fire have one in the other training that fires nearly "
        f"alike (correlation {level} or more); among random directions {shares[1]} have one."
    )


def _cross_layer(figures: Figures) -> str:
    shares = []
    for found in (figures, figures["null"]):
        shares.append(percent(found["predicted"] / found["judged"]))
    return (
        f"{shares[0]} of the other layer's {figures['judged']:,} features that fire often enough "
        f"are foretold; by chance {shares[1]} are. That is no proof that one makes the other."
    )


def _catalogue(figures: Figures) -> str:
    alive = figures["features"] - figures["silent"]
    return (
        f"{alive:,} of {figures['features']:,} features fire somewhere in {figures['rows']:,} "
        f"held-out tokens. {figures['density_above_10_percent']:,} fire on more than 10% of them, "
        "and so say little by themselves."
    )


_MEASURED: dict[str, Callable[[Figures], str]] = {
    "contrast": _contrast,
    "logit_lens": _logit_lens,
    "reason_score": _reason_score,
    "splice": _splice,
    "stability": _stability,
    "cross_layer": _cross_layer,
    "catalogue": _catalogue,
}
