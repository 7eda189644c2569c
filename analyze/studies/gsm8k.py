"""How many word problems the model answers right: accuracy by two gradings."""

from __future__ import annotations

from analyze.answering import answers, inputs
from analyze.outcome import Outcome, Table
from analyze.stats import wilson
from analyze.study import Definition, Study
from data.errors import StopRequest


def gsm8k(study: Study) -> Outcome:
    """Accuracy by either grading, with Wilson's intervals, and which problems were answered right
    and wrong.
    """
    with StopRequest() as stop:
        found = answers(study, stop)
    total = len(found)
    counts = {
        "strict": sum(one.correct for one in found),
        "flexible": sum(one.flexible == one.problem.answer for one in found),
        "unparsable": sum(one.unparsable for one in found),
        "truncated": sum(not one.finished for one in found),
    }
    intervals = {name: wilson(count, total) for name, count in counts.items()}
    figures = {
        "answers": total,
        **{
            name: {"count": count, "share": count / total, "interval": intervals[name]}
            for name, count in counts.items()
        },
        "right": [one.problem.id for one in found if one.correct],
        "wrong": [one.problem.id for one in found if not one.correct],
    }
    said = {
        name: (f"{count / total:.1%}", f"{intervals[name].low:.1%} to {intervals[name].high:.1%}")
        for name, count in counts.items()
    }
    rows = [(name, str(count), *said[name]) for name, count in counts.items()]
    summary = [
        f"{counts['strict']} of {total} answers are right by the strict grading: {said['strict'][0]}, 95 % interval "
        f"{said['strict'][1]} (Wilson)."
    ]
    return Outcome(
        figures, summary, [Table("Graded answers", ("", "answers", "share", "95 %"), rows)]
    )


DEFINITION = Definition(gsm8k, inputs=inputs, order=20)
