"""Answers generated under changes of a layer's output, sweep by sweep, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from residual_saes.analyze.changes.intervention import effects, intervened
from residual_saes.analyze.changes.replies import Reply, Row, Swept
from residual_saes.analyze.kept import read_lines
from residual_saes.analyze.questions.answering import (
    Answer,
    Asking,
    completions,
    grow_answers,
    model_key,
)
from residual_saes.analyze.results import digest_of
from residual_saes.analyze.study import Study
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress

VERSION = 1  # of the kept replies: raise it when the same settings give other ones
_FILE = "replies.jsonl"


def greedy(asking: Asking) -> Asking:
    """How sweeps ask: once, and without chance, so that nothing but the change differs."""
    return replace(asking, samples=1, temperature=0.0)


@dataclass(frozen=True)
class Sweeps:
    """Generates answers under changes, and keeps them: see `Study.kept`."""

    study: Study
    layer: int
    asking: Asking
    stop: StopRequest
    progress: Progress
    name: str = "steered"  # of the folders in which replies are kept

    def run(
        self,
        asked: Sequence[Answer],
        change: Swept | None,
        label: str,
        unsteered: Sequence[Reply] | None = None,
    ) -> list[Reply]:
        """The replies to questions, in batches of consecutive ones, the same in every sweep.

        Args:
            change: None: no hook at all.
            label: of the sweep, for the line of progress.
            unsteered: replies to the same questions; the change's effect on these texts is then
                measured, too.
        """

        def make(part: slice) -> list[dict[str, Any]]:
            before = None if unsteered is None else unsteered[part]
            return [reply._asdict() for reply in self._replies(asked[part], change, before)]

        def show(line: str, *, last: bool) -> None:
            self.progress.show(f"{label}: {line}")  # other sweeps follow, so none is the last

        def fill(folder: Path) -> None:
            path = folder / _FILE
            grow_answers(path, len(asked), self.asking.batch, make, show, self.stop)

        folder = self.study.kept(self.name, self._key(asked, change, unsteered), fill)
        return [Reply(**line) for line in read_lines(folder / _FILE)]

    def right(self, asked: Sequence[Answer], change: Swept | None, label: str) -> int:
        """How many replies are right."""
        return sum(reply.correct for reply in self.run(asked, change, label))

    def rows(self, changes: Sequence[Swept], asked: Sequence[Answer], part: str) -> list[Row]:
        """The rows of all sweeps over some questions, the unsteered one first.

        Args:
            part: of the questions, for the line of progress.
        """
        unsteered = self.run(asked, None, f"{part}, unsteered")
        rows = [Row.of(None, unsteered, unsteered)]
        for done, change in enumerate(changes, 1):
            label = f"{part} {done}/{len(changes)}, {change.kind} {change.scale:+g}"
            replies = self.run(asked, change, label, unsteered)
            rows.append(Row.of(change, replies, unsteered))
        return rows

    def _key(
        self, asked: Sequence[Answer], change: Swept | None, unsteered: Sequence[Reply] | None
    ) -> dict[str, Any]:
        prompts = [[answer.prompt_ids, answer.problem.record()] for answer in asked]
        texts = None if unsteered is None else [reply.ids for reply in unsteered]
        return {
            "version": VERSION,
            **model_key(self.study),
            "asked": digest_of({"asked": prompts}),
            "asking": [self.asking.new_tokens, self.asking.batch],
            **self.asking.added,
            "steer": None if change is None else [self.layer, *change.key],
            "unsteered": digest_of({"ids": texts}),
        }

    def _replies(
        self, asked: Sequence[Answer], change: Swept | None, unsteered: Sequence[Reply] | None
    ) -> list[Reply]:
        """The replies to one batch of questions."""
        lm = self.study.lm
        prompts = [answer.prompt_ids for answer in asked]
        lengths = [len(prompt) for prompt in prompts]
        hook = nullcontext() if change is None else intervened(lm, self.layer, change, lengths)
        with hook:
            batch = [(answer.problem, answer.prompt_ids) for answer in asked]
            written = completions(lm, batch, self.asking)
        replies = []
        for answer in written:
            replies.append(
                Reply(
                    id=answer.problem.id,
                    ids=answer.ids,
                    correct=answer.correct,
                    unparsable=answer.unparsable,
                    finished=answer.finished,
                )
            )
        if change is None or unsteered is None:
            return replies
        texts = [(prompt, reply.ids) for prompt, reply in zip(prompts, unsteered, strict=True)]
        measured = effects(lm, texts, self.layer, change)
        return [
            reply._replace(**effect._asdict())
            for reply, effect in zip(replies, measured, strict=True)
        ]
