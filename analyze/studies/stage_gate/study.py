"""The stage gate: may a handful of SAE features serve as a reward?

GRPO compares the answers to one question with each other. A reward that reads how hard the question
is tells right from wrong across questions, and moves GRPO by nothing. So the verdict is of sampled
answers to the same question, or of labelled solutions (judgement.py). `study=rollouts` shows what
it follows from. The reference has one answer to a question, and compares questions. Its figures
stand beside ours. They decide nothing.
"""

from __future__ import annotations

from residual_saes.analyze import refusals
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.questions.answering import inputs
from residual_saes.analyze.studies.contrast.means import answer_means, memory
from residual_saes.analyze.studies.stage_gate import pack
from residual_saes.analyze.studies.stage_gate.judgement import SAMPLES, VERSION, Options, judged
from residual_saes.analyze.studies.stage_gate.words import auroc_picture, summary, tables
from residual_saes.analyze.study import Definition, Study
from residual_saes.data.errors import StopRequest


def stage_gate(study: Study) -> Outcome:
    """The verdict by `judgement.RULE`, with the figures of R and its baselines."""
    with StopRequest() as stop:
        judgement, answered = judged(study, stop)
        figures = judgement.figures
        pack.write(study, figures, answer_means(study, answered, stop))
    return Outcome(figures, summary(figures), tables(figures), {"auroc": auroc_picture(figures)})


DEFINITION = Definition(
    stage_gate,
    version=VERSION,
    samples=SAMPLES,
    options=Options,
    refuses=refusals.no_layer,
    inputs=inputs,
    memory=memory,
    order=50,
)
