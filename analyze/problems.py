"""Word problems with their answers, and solutions that somebody labelled right or wrong.

A source is GSM8K's files, others of their form, or the embedded model's own problems.
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
# lm-evaluation-harness v3, task gsm8k: strict takes the first match, flexible the last one.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclass(frozen=True)
class Problem:
    """A question with its answer."""

    id: str  # digest of the question's text alone, so it is the same in every file
    question: str
    answer: str  # a number, as `number` writes it


@dataclass(frozen=True)
class Solution:
    """Somebody's solution of a problem, labelled right or wrong."""

    problem: Problem
    source: str  # who wrote it
    text: str
    correct: bool


def problem(question: str, answer: str) -> Problem:
    """The problem of a question, with its id and its answer as a bare number."""
    return Problem(durable.digest(question.encode())[:16], question, number(answer))


# -- numbers in texts ------------------------------------------------------------------------------


def number(text: str) -> str:
    """A number as answers are compared: without thousands commas, dollar signs and a final dot."""
    return text.strip().replace(",", "").replace("$", "").removesuffix(".")


def strict(text: str) -> str | None:
    """The number behind the first `#### `, or None."""
    match = _STRICT.search(text)
    return number(match[1]) if match else None


def flexible(text: str) -> str | None:
    """The last number in the text, or None."""
    matches = _FLEXIBLE.findall(text)
    return number(next(filter(None, matches[-1]))) if matches else None


# -- sources ---------------------------------------------------------------------------------------


def read(source: str, limit: int) -> list[Problem] | list[Solution]:
    """The first `limit` problems of a source, or every labelled solution of these.

    Args:
        source: `tiny`; a .jsonl of {question, answer}, where an answer's number may stand behind
            `#### `; or a .jsonl of {question, ground_truth, NAME: {solution, is_correct}, ...}.

    Raises:
        SettingError: there is no such file.
        StoreError: a line of it is none of these.
    """
    if source == TINY:
        return _embedded(limit)
    path = Path(source)
    if not path.is_file():
        raise SettingError(
            f"problems={source} is no file; give a .jsonl of {{question, answer}}, or problems=tiny"
        )
    plain: dict[str, Problem] = {}
    labelled: dict[str, list[Solution]] = {}
    for place, line in _lines(path):
        if len(plain) == limit or (len(labelled) == limit and not plain):
            break
        asked = _problem(place, line)
        solutions = _solutions(asked, line)
        if solutions:
            labelled.setdefault(asked.id, solutions)
        else:
            plain.setdefault(asked.id, asked)
    if plain and labelled:
        raise StoreError(
            f"{path} has lines with labelled solutions and lines without; split it in two"
        )
    if plain:
        return list(plain.values())
    if not labelled:
        raise StoreError(f"{path} holds no problem")
    return [solution for solutions in labelled.values() for solution in solutions]


def _embedded(limit: int) -> list[Problem]:
    """The first `limit` different problems that the embedded model was not trained on."""
    unique: dict[str, Problem] = {}
    for drawn in islice(tiny.problems("heldout"), 2 * limit):
        asked = problem(drawn.question, str(drawn.answer))
        unique[asked.id] = asked
    return list(islice(unique.values(), limit))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its place, for error messages."""
    with path.open(encoding="utf-8") as file:
        for row, text in enumerate(file, 1):
            if not text.strip():
                continue
            place = f"{path} line {row}"
            try:
                line = json.loads(text)
            except ValueError as error:
                raise StoreError(f"{place} is not JSON") from error
            if not isinstance(line, dict):
                raise StoreError(f"{place} is not an object of question and answer")
            yield place, line


def _problem(place: str, line: dict[str, Any]) -> Problem:
    question = line.get("question")
    answer = line.get("answer", line.get("ground_truth"))
    is_answer = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    if not isinstance(question, str) or not is_answer:
        raise StoreError(
            f"{place}: a problem has a text `question` and an `answer` (or `ground_truth`)"
        )
    text = str(answer)
    asked = problem(question, strict(text) or flexible(text) or "")
    if not asked.answer:
        raise StoreError(f"{place}: there is no number in its answer {text[-60:]!r}")
    return asked


def _solutions(asked: Problem, line: dict[str, Any]) -> list[Solution]:
    solutions = []
    for source, value in line.items():
        if isinstance(value, dict) and isinstance(value.get("is_correct"), bool):
            text = str(value.get("solution", ""))
            solutions.append(Solution(asked, source, text, value["is_correct"]))
    return solutions
