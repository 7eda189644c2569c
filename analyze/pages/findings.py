"""What a report says first, for readers of another field: what was made, how good it is, what the
studies say, what nobody knows yet, and what is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from residual_saes.analyze.pages.answers import QUESTIONS
from residual_saes.analyze.reconstruction import TRAINED
from residual_saes.analyze.stats import counted, number, percent
from residual_saes.analyze.subject import Subject
from residual_saes.train import recipe

_OPEN = ("splice", "stability", "steering", "probes")  # what a reader would want to know next
_GOOD = (
    (0.9, "That is a close copy."),
    (0.7, "That is a fair copy: some of what the numbers hold is lost."),
    (0.0, "That is a rough copy: much of what the numbers hold is lost."),
)
_MANY_DEAD = 0.1  # share of latents
_FELL = 0.02  # variance explained below its best


class Measured(NamedTuple):
    """What is known of a run in figures."""

    figures: Mapping[str, Any]  # of study=quality
    metrics: Sequence[Mapping[str, Any]]  # of the training; none of an SAE of elsewhere

    @property
    def explained(self) -> float | None:
        """Variance explained of the rows as trained."""
        value: float | None = self.figures["variance_explained"][TRAINED]["centred"]
        return value

    def last(self, split: str) -> Mapping[str, Any] | None:
        """The last record of the training, or of the held-out rows."""
        return next((one for one in reversed(self.metrics) if one["split"] == split), None)

    @property
    def dead(self) -> int | None:
        """Latents that were dead when training ended."""
        final = self.last("held_out")
        return None if final is None else int(final["dead"])


def quality(measured: Measured, noun: str) -> str:
    """How good it is, in words."""
    figures = measured.figures
    explained = measured.explained
    if explained is None:
        return "How good it is cannot be said: the held-out numbers do not vary."
    words = [word for least, word in _GOOD if explained >= least]
    interval = figures["variance_explained"][TRAINED]["centred_95"]
    brackets = ""
    if interval:
        low, high = (percent(end).removesuffix("%") for end in interval)
        brackets = f" [{low}, {high}]"
    return (
        f"With {number(figures['l0'], 3)} of its {figures['d_sae']:,} features at a time, the "
        f"{noun} explains {percent(explained)}{brackets} of how the numbers vary over "
        f"{figures['rows']:,} tokens of {counted(figures['documents'], 'document')} that it was "
        "not trained on. 100% would be a perfect copy; 0% is what the average of all tokens, given "
        f"each time, would get. {words[0] if words else 'It is worse than that average.'}"
    )


def dead(measured: Measured) -> str:
    """How many features do not work, in words."""
    figures = measured.figures
    if measured.dead is None:
        return (
            f"{figures['silent']:,} of its {figures['d_sae']:,} features fired on none of the "
            f"{figures['rows']:,} tokens."
        )
    count = f"{measured.dead:,}" if measured.dead else "None"
    return (
        f"{count} of its {figures['d_sae']:,} features had died when training ended: a feature is "
        f"dead when it has not fired for long. {figures['silent']:,} fired on none of the "
        f"{figures['rows']:,} held-out tokens."
    )


def unknown(done: Collection[str], text: str) -> list[str]:
    """What this page does not tell."""
    lines = [
        f"{QUESTIONS[name]} Not asked yet; study={name} does." for name in _OPEN if name not in done
    ]
    return [
        "What each feature stands for. The lists of tokens and texts are evidence; nobody has "
        "checked a name against it.",
        f"Anything about other texts. All figures are of one text, named {text}.",
        *lines,
    ]


def warnings(subject: Subject, measured: Measured) -> list[str]:
    """What is wrong with the run, the worst first, each with what can be done."""
    lines = []
    explained = measured.explained
    if explained is not None and explained < 0:
        lines.append(
            f"Variance explained is negative ({number(explained)}): the copies are worse than the "
            "average of all tokens. Nothing else on this page means much. Train again without sae= "
            "and optim=: sizes and learning rate then follow from the store."
        )
    figures = measured.figures
    share = (figures["silent"] if measured.dead is None else measured.dead) / figures["d_sae"]
    if share > _MANY_DEAD:
        lines.append(
            f"{percent(share)} of the features do not work: they do not fire. More tokens, fewer "
            "features (sae.d_sae) or AuxK (sae.aux_coef) help."
        )
    return [*lines, *_of_training(subject, measured)]


def _of_training(subject: Subject, measured: Measured) -> list[str]:
    last = measured.last("train")
    if last is None:
        return []
    lines = []
    steps = subject.config["steps"]
    if last["step"] < steps:
        lines.append(
            f"Training stopped at step {last['step']:,} of {steps:,}; the same command goes on."
        )
    settings = subject.config["settings"]
    sae = subject.sae
    lr = float(subject.config.get("lr", settings["optim"]["lr"]))
    of_sizes = (
        recipe.rate_warning(lr, sae.d_sae, steps),
        recipe.size_warning(sae.d_sae, settings["sae"]["k"], settings["tokens"]),
    )
    lines += filter(None, of_sizes)
    curve = [one["variance_explained"] for one in measured.metrics if one["split"] == "held_out"]
    if max(curve) - curve[-1] > _FELL:
        lines.append(
            f"Variance explained fell from {number(max(curve))} to {number(curve[-1])} before "
            "training ended: the learning rate may be too high."
        )
    return lines
