"""Contrastive activation addition: does the direction from wrong to right answers, added to a
layer, make more right?

The vector is mean(h | right) - mean(h | wrong) of the train questions' answers, at unit norm
(Rimsky et al., arXiv 2312.06681), the scale is chosen on dev questions, and everything is reported
on test questions. Each sweep over the test questions is paired with an unsteered one in the same
batches, so that nothing but the vector differs. Controls: the hook at scale 0, the opposite scale,
other positions, vectors from shuffled labels, and directions by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analyze import answering
from analyze.answering import Answer, Asking, answers, written
from analyze.outcome import Outcome
from analyze.results import digest_of
from analyze.stats import Floats
from analyze.studies.contrast.study import answer_means, caa
from analyze.studies.steering.hook import POSITIONS, effects, prompt_inert_from, steered
from analyze.studies.steering.outcomes import Reply, Row, Steer
from analyze.studies.steering.words import Page
from analyze.study import Definition, Study, grow, read_lines
from data import durable
from data.errors import SettingError, StopRequest
from data.journal import Progress
from data.settings import build, number

SEED = 0  # of random directions and shuffled labels


VERSION = 1  # of the replies
_FILE = "replies.jsonl"


@dataclass(frozen=True)
class Options:
    """What is steered, and against what."""

    layer: int | None = None  # null: the run's own
    scales: Sequence[float] = (2, 5, 10, 15, -5)  # times the unit vector
    positions: str = "all"  # see analyze.steering.hook
    n_random: int = 20
    n_shuffled: int = 5
    train: float = 0.3  # share of the questions
    dev: float = 0.2  # likewise; the rest are test questions

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise SettingError(
                f"study.positions={self.positions} must be one of {', '.join(POSITIONS)}"
            )
        if not isinstance(self.scales, list | tuple):
            raise SettingError(f"study.scales={self.scales} must be a list, such as [2,5,-5]")
        values = [number("study.scales", one) for one in self.scales]
        if (
            not values
            or len(set(values)) < len(values)
            or not all(one and isfinite(one) for one in values)
        ):
            raise SettingError(
                f"study.scales={values} must be different numbers other than 0, such as [2,5,-5]"
            )
        for name in ("n_random", "n_shuffled"):
            if getattr(self, name) < 1:
                raise SettingError(f"study.{name}={getattr(self, name)} must be at least 1")
        if not (self.train > 0 and self.dev > 0 and self.train + self.dev < 1):
            raise SettingError(
                f"study.train={self.train} and study.dev={self.dev} must be above 0 and leave questions to test on: "
                "together less than 1"
            )


def steering(study: Study) -> Outcome:
    """Accuracy on test questions, steered and not, at each scale and under each control.

    Labelled solutions, where the problems come with such, only make the vector; what is steered is
    the model's own.

    Raises:
        SettingError: the layer is none of the model's, or the questions are too few for the split.
    """
    options, asking = (
        build(Options, "study", study.options),
        build(Asking, "answers", study.answers),
    )
    layer = study.subject.layer if options.layer is None else options.layer
    if not 0 <= layer < study.lm.n_layers:
        raise SettingError(
            f"study.layer={layer} must be one of the model's layers, 0 to {study.lm.n_layers - 1}"
        )
    with StopRequest() as stop:
        found = answers(study, stop)
        split = split_of(found, options)
        trained = np.array([one.problem.id in split.train for one in found])
        means = answer_means(study, found, stop)
        hidden, correct = means.hidden[trained, layer], means.correct[trained]
        if correct.all() or not correct.any():
            raise SettingError(
                f"all {len(correct)} answers to the {len(split.train)} train questions are "
                f"{'right' if correct.any() else 'wrong'}, and a contrast needs both; raise answers.questions or "
                "study.train"
            )
        made_of = int(correct.sum()), int((~correct).sum())
        sweeps = Sweeps(study, layer, asking, stop, Progress())
        return _page(
            sweeps, split, directions(hidden, correct, options), options, made_of
        ).outcome()


def _page(
    sweeps: Sweeps,
    split: Split,
    vectors: dict[str, list[Floats]],
    options: Options,
    made_of: tuple[int, int],
) -> Page:
    """All sweeps: over the dev questions to choose the scale, then over the test questions."""
    tried = [
        Steer("v", vectors["v"][0], float(scale), options.positions) for scale in options.scales
    ]
    dev = {0.0: _right(sweeps.run(split.dev, None, "dev, unsteered"))}
    dev |= {
        one.scale: _right(sweeps.run(split.dev, one, f"dev, v {one.scale:+g}")) for one in tried
    }
    best = chosen(tried, dev)
    unsteered = sweeps.run(split.test, None, "test, unsteered")
    rows = [Row.of(None, unsteered, unsteered)]
    every = steers(tried, best, vectors)
    for at, one in enumerate(every, 1):
        label = f"test {at}/{len(every)}, {one.kind} {one.scale:+g}"
        rows.append(Row.of(one, sweeps.run(split.test, one, label, unsteered), unsteered))
    ids = {"train": split.train, "dev": _ids(split.dev), "test": _ids(split.test)}
    inert_from = prompt_inert_from(sweeps.study.lm)
    return Page(rows, best.scale, dev, ids, made_of, sweeps.layer, inert_from, SEED)


def _right(replies: Sequence[Reply]) -> int:
    return sum(one.correct for one in replies)


def _ids(asked: Sequence[Answer]) -> list[str]:
    return [one.problem.id for one in asked]


# -- what is compared ------------------------------------------------------------------------------


class Split(NamedTuple):
    """Questions by what they are for."""

    train: list[str]  # ids
    dev: list[Answer]  # one per question
    test: list[Answer]


def split_of(found: Sequence[Answer], options: Options) -> Split:
    """Questions by a digest of their id, so that a question's part does not depend on which others
    are asked.
    """
    parts: dict[str, dict[str, Answer]] = {"train": {}, "dev": {}, "test": {}}
    for one in found:
        at = int(durable.digest(b"steering", one.problem.id.encode()), 16) / 2**128
        part = (
            "train" if at < options.train else "dev" if at < options.train + options.dev else "test"
        )
        parts[part].setdefault(one.problem.id, one)
    if empty := [name for name, part in parts.items() if not part]:
        total = sum(map(len, parts.values()))
        raise SettingError(
            f"of {total} questions none is left as {empty[0]} question; raise answers.questions"
        )
    return Split(list(parts["train"]), list(parts["dev"].values()), list(parts["test"].values()))


def directions(
    hidden: Floats, correct: NDArray[np.bool_], options: Options
) -> dict[str, list[Floats]]:
    """Unit vectors (d,) by kind."""
    v, rng = caa(hidden, correct), np.random.default_rng(SEED)
    random = [_unit(rng.normal(size=len(v))) for _ in range(options.n_random)]
    return {
        "v": [v],
        "orthogonal": [_unit(random[0] - (random[0] @ v) * v)],
        "shuffled": [caa(hidden, rng.permutation(correct)) for _ in range(options.n_shuffled)],
        "random": random,
    }


def _unit(vector: Floats) -> Floats:
    return np.asarray(vector / np.linalg.norm(vector), np.float64)


def chosen(tried: Sequence[Steer], right: Mapping[float, int]) -> Steer:
    """The one under which most dev answers are right; of equals the smallest scale, and the
    positive one.
    """
    return max(tried, key=lambda one: (right[one.scale], -abs(one.scale), one.scale))


def steers(tried: Sequence[Steer], best: Steer, vectors: dict[str, list[Floats]]) -> list[Steer]:
    """Every sweep over the test questions but the unsteered one: the scales, then the controls at
    the best one.
    """
    opposite = (
        []
        if -best.scale in [one.scale for one in tried]
        else [best._replace(kind="opposite", scale=-best.scale)]
    )
    return [
        best._replace(kind="scale 0", scale=0.0),
        *tried,
        *opposite,
        *(
            best._replace(kind="positions", positions=one)
            for one in POSITIONS
            if one != best.positions
        ),
        *(
            best._replace(kind=kind, vector=vector)
            for kind in ("orthogonal", "shuffled", "random")
            for vector in vectors[kind]
        ),
    ]


# -- generation ------------------------------------------------------------------------------------


class Sweeps(NamedTuple):
    """Generates answers under steering, and keeps them.

    Each sweep lies in the study's folder as sweep-DIGEST.jsonl, the digest being of all that it
    depends on; written batch by batch: a study that is stopped goes on behind the last one.
    """

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
        """The replies to questions, in batches of consecutive ones, which are the same in every
        sweep.

        Args:
            steer: None: no hook at all.
            unsteered: replies on which the effect of steering is measured too.
        """

        def write(folder: Path) -> None:
            right = 0

            def next_batch(part: slice) -> list[dict[str, Any]]:
                nonlocal right
                self.stop.check()
                compared = None if unsteered is None else unsteered[part]
                replies = self._replies(asked[part], steer, compared)
                right += _right(replies)
                done = min(part.stop, len(asked))
                self.progress.show(f"{label}: {done}/{len(asked)} answered | {right} right here")
                return [reply._asdict() for reply in replies]

            grow(folder / _FILE, len(asked), self.asking.batch, next_batch)

        folder = self.study.kept("steered", self._key(asked, steer, unsteered), write)
        return [Reply(**line) for line in read_lines(folder / _FILE)]

    def _key(
        self, asked: Sequence[Answer], steer: Steer | None, unsteered: Sequence[Reply] | None
    ) -> dict[str, Any]:
        said = None
        if steer is not None:
            said = [
                self.layer,
                durable.digest(steer.vector.tobytes()),
                steer.scale,
                steer.positions,
            ]
        return {
            "version": VERSION,
            "weights": self.study.identity["weights"],
            "dtype": self.study.model.dtype,
            "device": torch.device(
                self.study.model.device
            ).type,  # sums round otherwise on another kind
            "asked": digest_of({"asked": [[one.prompt_ids, asdict(one.problem)] for one in asked]}),
            "asking": [self.asking.new_tokens, self.asking.batch],
            "steer": said,
            "unsteered": digest_of(
                {"ids": None if unsteered is None else [one.ids for one in unsteered]}
            ),
        }

    def _replies(
        self, asked: Sequence[Answer], steer: Steer | None, unsteered: Sequence[Reply] | None
    ) -> list[Reply]:
        lm, prompts = self.study.lm, [one.prompt_ids for one in asked]
        hook = (
            nullcontext()
            if steer is None
            else steered(lm, self.layer, *_moved(steer), list(map(len, prompts)))
        )
        with hook:
            found = written(lm, [(one.problem, one.prompt_ids) for one in asked], self.asking)
        replies = [
            Reply(one.problem.id, one.ids, one.correct, one.unparsable, one.finished)
            for one in found
        ]
        if steer is None or unsteered is None:
            return replies
        texts = [(prompt, reply.ids) for prompt, reply in zip(prompts, unsteered, strict=True)]
        measured = effects(lm, texts, self.layer, *_moved(steer))
        return [
            reply._replace(**one._asdict()) for reply, one in zip(replies, measured, strict=True)
        ]


def _moved(steer: Steer) -> tuple[torch.Tensor, float, str]:
    return torch.from_numpy(steer.vector), steer.scale, steer.positions


DEFINITION = Definition(steering, options=Options, inputs=answering.inputs, order=40)
