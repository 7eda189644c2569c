"""Word problems with their answers: GSM8K's files, the embedded model's own, and solutions that
somebody labelled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data import durable
from data.errors import SettingError, StoreError
from data.tiny import problems as tiny

TINY = "tiny"
# lm-evaluation-harness v3, task gsm8k: the strict match takes its first, the flexible one its last.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclass(frozen=True)
class Problem:
    """A question with its answer."""

    id: str  # of the question's text alone, so that it is the same in every file
    question: str
    answer: str  # a number, as `number` writes it


@dataclass(frozen=True)
class Solution:
    """Somebody's solution of a problem, known to be right or wrong."""

    problem: Problem
    source: str  # who wrote it
    text: str
    correct: bool


def number(text: str) -> str:
    """A number as answers are compared: without thousands commas, dollar signs and a final dot."""
    return text.strip().replace(",", "").replace("$", "").removesuffix(".")


def strict(text: str) -> str | None:
    """The number behind the first `#### `, or None."""
    found = _STRICT.search(text)
    return number(found[1]) if found else None


def flexible(text: str) -> str | None:
    """The last number in the text, or None."""
    found = _FLEXIBLE.findall(text)
    return number(next(filter(None, found[-1]))) if found else None


def read(source: str, limit: int) -> list[Problem] | list[Solution]:
    """The first `limit` problems of a source; of labelled solutions, all of the first `limit`
    problems.

    Args:
        source: `tiny`; a .jsonl of {question, answer}, where an answer's number may stand behind
            `#### `; or a .jsonl of {question, ground_truth, NAME: {solution, is_correct}, ...}.

    Raises:
        SettingError: there is no such file.
        StoreError: a line of it is none of these.
    """
    if source == TINY:
        drawn = (
            problem(one.question, str(one.answer))
            for one in islice(tiny.problems("heldout"), 2 * limit)
        )
        return list(islice({one.id: one for one in drawn}.values(), limit))
    path = Path(source)
    if not path.is_file():
        raise SettingError(
            f"problems={source} is no file; give a .jsonl of {{question, answer}}, or problems=tiny"
        )
    plain: dict[str, Problem] = {}
    labelled: dict[str, list[Solution]] = {}
    for where, line in _lines(path):
        if len(plain) == limit or (len(labelled) == limit and not plain):
            break
        question, answer = line.get("question"), line.get("answer", line.get("ground_truth"))
        if (
            not isinstance(question, str)
            or not isinstance(answer, str | int | float)
            or isinstance(answer, bool)
        ):
            raise StoreError(
                f"{where}: a problem has a text `question` and an `answer` (or `ground_truth`)"
            )
        one = problem(question, strict(str(answer)) or flexible(str(answer)) or "")
        if not one.answer:
            raise StoreError(f"{where}: there is no number in its answer {str(answer)[-60:]!r}")
        if found := _solutions(one, line):
            labelled.setdefault(one.id, found)
        else:
            plain.setdefault(one.id, one)
    if plain and labelled:
        raise StoreError(
            f"{path} has lines with labelled solutions and lines without; split it in two"
        )
    if not plain and not labelled:
        raise StoreError(f"{path} holds no problem")
    return (
        [one for found in labelled.values() for one in found] if labelled else list(plain.values())
    )


def problem(question: str, answer: str) -> Problem:
    return Problem(durable.digest(question.encode())[:16], question, number(answer))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for at, text in enumerate(file, 1):
            if not text.strip():
                continue
            where = f"{path} line {at}"
            try:
                line = json.loads(text)
            except ValueError as error:
                raise StoreError(f"{where} is not JSON") from error
            if not isinstance(line, dict):
                raise StoreError(f"{where} is not an object of question and answer")
            yield where, line


def _solutions(one: Problem, line: dict[str, Any]) -> list[Solution]:
    found = []
    for source, value in line.items():
        if isinstance(value, dict) and isinstance(value.get("is_correct"), bool):
            found.append(Solution(one, source, str(value.get("solution", "")), value["is_correct"]))
    return found
