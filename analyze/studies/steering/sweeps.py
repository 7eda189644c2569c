"""Answers generated under steering, sweep by sweep, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyze.answering import Answer, Asking, completions, grow_answers, model_key
from analyze.intervention import Steer, effects, intervened
from analyze.kept import read_lines
from analyze.results import digest_of
from analyze.studies.steering.outcomes import Reply
from analyze.study import Study
from data import durable
from data.errors import StopRequest
from data.journal import Progress

VERSION = 1  # of the kept replies: raise it when the same settings give other ones
_FILE = "replies.jsonl"


@dataclass(frozen=True)
class Sweeps:
    """Generates answers under steering, and keeps them: see `Study.kept`."""

    study: Study
    layer: int
    asking: Asking
    stop: StopRequest
    progress: Progress

    def run(
        self,
        asked: Sequence[Answer],
        steer: Steer | None,
        label: str,
        unsteered: Sequence[Reply] | None = None,
    ) -> list[Reply]:
        """The replies to questions, in batches of consecutive ones, the same in every sweep.

        Args:
            steer: None: no hook at all.
            label: of the sweep, for the line of progress.
            unsteered: replies to the same questions; the effect of steering is then measured, too,
                on these texts.
        """

        def make(part: slice) -> list[dict[str, Any]]:
            before = None if unsteered is None else unsteered[part]
            return [reply._asdict() for reply in self._replies(asked[part], steer, before)]

        def show(line: str, *, last: bool) -> None:
            self.progress.show(f"{label}: {line}")  # other sweeps follow, so none is the last

        def fill(folder: Path) -> None:
            path = folder / _FILE
            grow_answers(path, len(asked), self.asking.batch, make, show, self.stop)

        folder = self.study.kept("steered", self._key(asked, steer, unsteered), fill)
        return [Reply(**line) for line in read_lines(folder / _FILE)]

    def _key(
        self, asked: Sequence[Answer], steer: Steer | None, unsteered: Sequence[Reply] | None
    ) -> dict[str, Any]:
        steered_by = None
        if steer is not None:
            vector = durable.digest(steer.vector.tobytes())
            steered_by = [self.layer, vector, steer.scale, steer.positions]
        prompts = [[answer.prompt_ids, answer.problem.record()] for answer in asked]
        texts = None if unsteered is None else [reply.ids for reply in unsteered]
        return {
            "version": VERSION,
            **model_key(self.study),
            "asked": digest_of({"asked": prompts}),
            "asking": [self.asking.new_tokens, self.asking.batch],
            **self.asking.added,
            "steer": steered_by,
            "unsteered": digest_of({"ids": texts}),
        }

    def _replies(
        self, asked: Sequence[Answer], steer: Steer | None, unsteered: Sequence[Reply] | None
    ) -> list[Reply]:
        """The replies to one batch of questions."""
        lm = self.study.lm
        prompts = [answer.prompt_ids for answer in asked]
        lengths = [len(prompt) for prompt in prompts]
        hook = nullcontext() if steer is None else intervened(lm, self.layer, steer, lengths)
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
        if steer is None or unsteered is None:
            return replies
        texts = [(prompt, reply.ids) for prompt, reply in zip(prompts, unsteered, strict=True)]
        measured = effects(lm, texts, self.layer, steer)
        return [
            reply._replace(**effect._asdict())
            for reply, effect in zip(replies, measured, strict=True)
        ]
