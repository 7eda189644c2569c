"""Which questions choose, and which judge what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.questions.answering import Answer
from residual_saes.analyze.questions.problems import Problem
from residual_saes.data import durable
from residual_saes.data.errors import SettingError

TRAIN = "train"  # the part of the problems that chooses, see analyze.questions.problems


def in_discovery(
    question: NDArray[np.str_], share: float, part: NDArray[np.str_] | None = None
) -> NDArray[np.bool_]:
    """(n,) whether an answer's question is one of those that choose.

    Args:
        question: (n,) ids. Without parts, a question's side is a function of its id alone.
        share: of the questions, about; not used with parts.
        part: (n,) of the problems, where they come in two: `TRAIN` chooses.
    """
    if part is not None:
        return np.asarray(part == TRAIN)
    ids, number = np.unique(question, return_inverse=True)
    positions = []
    for name in ids:
        digest = durable.digest(f"stage gate {name}".encode())
        positions.append(int(digest[:13], 16) / 16**13)  # in [0, 1)
    return np.asarray(np.array(positions)[number] < share)


def require_share(share: float) -> None:
    """Raise SettingError unless study.discovery can be a share of the questions."""
    if not 0 < share < 1:
        raise SettingError(f"study.discovery={share} must be above 0 and below 1, such as 0.5")


# -- in three --------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Questions by what they are for: train chooses, dev chooses how much, test judges."""

    train: list[str]  # ids
    dev: list[Answer]  # one per question
    test: list[Answer]


def split_of(answered: Sequence[Answer], train: float, dev: float) -> Split:
    """Each question's part is a function of its id, so other questions do not change it.

    Problems that come as train.jsonl and test.jsonl keep that: questions of train.jsonl are train
    or dev, in the ratio of the two shares, and those of test.jsonl are test.

    Args:
        train: share of the questions, about.
        dev: likewise.

    Raises:
        SettingError: a part is empty.
    """
    parts: dict[str, dict[str, Answer]] = {"train": {}, "dev": {}, "test": {}}
    for answer in answered:
        part = _part(answer.problem, train, dev)
        parts[part].setdefault(answer.problem.id, answer)
    total = sum(map(len, parts.values()))
    for name, part_answers in parts.items():
        if not part_answers:
            raise SettingError(
                f"of {total} questions none is left as {name} question; raise answers.questions"
            )
    return Split(list(parts["train"]), list(parts["dev"].values()), list(parts["test"].values()))


def _part(asked: Problem, train: float, dev: float) -> str:
    """`train`, `dev` or `test`."""
    if asked.part == "test":
        return "test"
    digest = durable.digest(b"steering", asked.id.encode())
    position = int(digest, 16) / 2**128  # in [0, 1)
    if asked.part == TRAIN:
        position *= train + dev
    if position < train:
        return "train"
    return "dev" if asked.part == TRAIN or position < train + dev else "test"


def require_shares(train: float, dev: float) -> None:
    """Raise SettingError unless study.train and study.dev leave questions to test on."""
    if not (train > 0 and dev > 0 and train + dev < 1):
        raise SettingError(
            f"study.train={train} and study.dev={dev} must be above 0 and leave questions to test "
            "on: together less than 1"
        )
