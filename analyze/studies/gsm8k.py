"""How many word problems the model answers right: accuracy by two gradings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analyze.answering import Answer, answers, inputs
from analyze.outcome import Outcome, Table
from analyze.stats import wilson
from analyze.study import Definition, Study
from data.errors import StopRequest


def gsm8k(study: Study) -> Outcome:
    """Accuracy by either grading, and which problems were answered right and wrong."""
    with StopRequest() as stop:
        graded = answers(study, stop)
    shares = _shares(graded)
    rows = []
    for name, share in shares.items():
        low, high = share["interval"]
        rows.append(
            (name, str(share["count"]), f"{share['share']:.1%}", f"{low:.1%} to {high:.1%}")
        )
    figures = {
        "answers": len(graded),
        **shares,
        "right": [answer.problem.id for answer in graded if answer.correct],
        "wrong": [answer.problem.id for answer in graded if not answer.correct],
    }
    _, right, share_right, interval = rows[0]
    summary = [
        f"{right} of {len(graded)} answers are right by the strict grading: {share_right}, 95 % "
        f"interval {interval} (Wilson)."
    ]
    table = Table("Graded answers", ("", "answers", "share", "95 %"), rows)
    return Outcome(figures, summary, [table])


def _shares(graded: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """By grade: how many answers have it, their share, and Wilson's 95 % interval of that."""
    total = len(graded)
    counts = {
        "strict": sum(answer.correct for answer in graded),
        "flexible": sum(answer.problem.is_answer(answer.flexible) for answer in graded),
        "unparsable": sum(answer.unparsable for answer in graded),
        "truncated": sum(not answer.finished for answer in graded),
    }
    shares = {}
    for name, count in counts.items():
        shares[name] = {"count": count, "share": count / total, "interval": wilson(count, total)}
    return shares


DEFINITION = Definition(gsm8k, version=1, inputs=inputs, order=20)
