"""How many word problems the model answers right: accuracy by two gradings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from residual_saes.analyze.outcome import Outcome, Table
from residual_saes.analyze.questions.answering import (
    GENERATED,
    Answer,
    answers,
    asking_of,
    inputs,
    prompt_of,
)
from residual_saes.analyze.stats import FEW, Floats, Interval, bootstrap_ratio, sums_by, wilson
from residual_saes.analyze.study import Definition, Study
from residual_saes.data.errors import StopRequest


def gsm8k(study: Study) -> Outcome:
    """Accuracy by either grading, and which problems were answered right and wrong.

    Of a folder of problems it is that of test.jsonl.
    """
    with StopRequest() as stop:
        graded = answers(study, stop, part="test")
    shares = _shares(graded)
    rows = {}
    for name, share in shares.items():
        cells = (str(share["count"]), f"{share['share']:.1%}", _range(share["interval"]))
        rows[name] = (name, *cells)
    questions = len({answer.problem.id for answer in graded})
    figures: dict[str, Any] = {
        "answers": len(graded),
        "questions": questions,
        "prompt": prompt_of(study),
        **shares,
        "right": [answer.problem.id for answer in graded if answer.correct],
        "wrong": [answer.problem.id for answer in graded if not answer.correct],
    }
    of, method = f"{len(graded)} answers", "Wilson"
    if questions < len(graded):
        of += f" to {questions} questions"
        method = "over questions: answers to the same question depend on each other"
        if questions < FEW:
            method += "; so few make it too narrow"
    grading = asking_of(study).grading
    by = f"the {grading} grading"
    if graded[0].source != GENERATED:
        grading, by = "strict", "their labels"  # which are counted as the strict grade
    _, right, share_right, interval = rows[grading]
    summary = [
        f"{right} of {of} are right by {by}: {share_right}, 95% interval {interval} ({method}).",
        _asked(figures["prompt"]),
    ]
    table = Table("Graded answers", ("", "answers", "share", "95%"), list(rows.values()))
    return Outcome(figures, summary, [table])


def _range(interval: Interval | None) -> str:
    return "none" if interval is None else f"{interval.low:.1%} to {interval.high:.1%}"


def _asked(prompt: Mapping[str, Any]) -> str:
    """A sentence on how the problems were asked."""
    line = f"The prompt is {prompt['form']}"
    if prompt["turns"] is None:
        return f"{line}, with {prompt['shots']} examples before the question."
    reason = ", for its tokenizer has no chat template" if prompt["built_in"] else ""
    return f"{line}, in {prompt['turns']}{reason}."


def _by_strict(answer: Answer) -> bool:
    """Whether the strict number is right; of a labelled solution, its label."""
    is_labelled = answer.source != GENERATED
    return answer.correct if is_labelled else answer.problem.is_answer(answer.strict)


def _shares(graded: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """By grade: how many answers have it, their share, and the 95 % interval of that."""
    by_grade = {
        "strict": [_by_strict(answer) for answer in graded],
        "flexible": [answer.problem.is_answer(answer.flexible) for answer in graded],
        "unparsable": [answer.unparsable for answer in graded],
        "truncated": [not answer.finished for answer in graded],
    }
    question = [answer.problem.id for answer in graded]
    shares = {}
    for name, has in by_grade.items():
        count = sum(has)
        interval = _interval(question, np.array(has, np.float64))
        shares[name] = {"count": count, "share": count / len(has), "interval": interval}
    return shares


def _interval(question: Sequence[str], has: Floats) -> Interval | None:
    """The interval of the mean of `has` (n,): Wilson's, or over resampled questions.

    Where a question has several answers, Wilson's would take dependent answers for independent
    ones. All or no answers give resampling no spread: then it is Wilson's over the questions.
    None for several answers to one question that are not alike.
    """
    of_question, answers_of = sums_by(question, has, np.ones(len(has)))
    share = float(has.mean())
    if len(of_question) == len(has) or share in (0.0, 1.0):
        return wilson(round(share * len(of_question)), len(of_question))
    return bootstrap_ratio(of_question, answers_of)


DEFINITION = Definition(gsm8k, version=2, inputs=inputs, order=20)
