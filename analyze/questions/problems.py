"""Word problems with their answers, and solutions that somebody labelled right or wrong.

A source is GSM8K's files, others of their form, or the embedded model's own problems.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.analyze import json_lines
from residual_saes.analyze.questions.truth import NotANumber, is_right, truth_of
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.tiny import problems as tiny

TINY = "tiny"
PARTS = ("train", "test")  # of a folder of problems: its files, as GSM8K's are named
# lm-evaluation-harness v3, task gsm8k: strict takes the first match, flexible the last one.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclass(frozen=True)
class Problem:
    """A question with its answer."""

    id: str  # digest of the question's text alone, so it is the same in every file
    question: str
    answer: str  # a number, as analyze.questions.truth writes it
    by_number: bool = False  # compared as numbers, since the file does not write plain digits
    part: str | None = None  # `train` or `test` in a folder of both; None in a single file

    def is_answer(self, found: str | None) -> bool:
        """Whether a number found in an answer is the right one."""
        return is_right(found, self.answer, by_number=self.by_number)

    def record(self) -> dict[str, Any]:
        """What keys and kept files hold: `by_number` and `part` where they are set."""
        fields = asdict(self)
        if not self.by_number:
            del fields["by_number"]
        if self.part is None:
            del fields["part"]
        return fields


@dataclass(frozen=True)
class Solution:
    """Somebody's solution of a problem, labelled right or wrong."""

    problem: Problem
    source: str  # who wrote it
    text: str
    correct: bool

    def record(self) -> dict[str, Any]:
        """See `Problem.record`."""
        return asdict(self) | {"problem": self.problem.record()}


class Example(NamedTuple):
    """A question with its worked answer, as a file has them: to be shown before another one."""

    question: str
    answer: str


def problem(question: str, answer: str, *, by_number: bool = False) -> Problem:
    """The problem of a question, with its id and its answer as a bare number."""
    identity = durable.digest(question.encode())[:16]
    return Problem(identity, question, number(answer), by_number)


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
        source: `tiny`; a .jsonl of {question, answer}, where an answer is a number, or a text
            whose number stands behind `#### ` or is the last one (see truth.py); a .jsonl of
            {question, ground_truth, NAME: {solution, is_correct}, ...}; or a folder with such files
            train.jsonl and test.jsonl.
        limit: of each file.

    Raises:
        SettingError: there is no such file or folder, or a file of the folder is missing.
        StoreError: a line is none of these, or its answer may be read in two ways; or a question
            is in both files of a folder.
    """
    if source == TINY:
        return _embedded(limit)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, limit)
    if not path.is_file():
        raise SettingError(
            f"problems={source} is no file; give a .jsonl of {{question, answer}}, a folder with "
            "such files train.jsonl and test.jsonl, or problems=tiny"
        )
    return _of_file(path, limit)


def _of_folder(folder: Path, limit: int) -> list[Problem] | list[Solution]:
    """The problems of train.jsonl, then those of test.jsonl, each with its part."""
    problems: list[Problem] = []
    solutions: list[Solution] = []
    part_of: dict[str, str] = {}
    for part in PARTS:
        path = folder / f"{part}.jsonl"
        if not path.is_file():
            raise SettingError(
                f"problems={folder} has no {path.name}; a folder holds train.jsonl and test.jsonl; "
                "else give one file"
            )
        for item in _of_file(path, limit):
            asked = item if isinstance(item, Problem) else item.problem
            if part_of.setdefault(asked.id, part) != part:
                raise StoreError(
                    f"{path} asks what train.jsonl asks, too: {asked.question[:60]!a}; remove it "
                    "from one of them, for what is chosen on train would be judged by it"
                )
            asked = replace(asked, part=part)
            if isinstance(item, Problem):
                problems.append(asked)
            else:
                solutions.append(replace(item, problem=asked))
    if problems and solutions:
        raise StoreError(
            f"of train.jsonl and test.jsonl in {folder} one has labelled solutions and one has "
            "none; give one of them as problems="
        )
    return problems or solutions


def _of_file(path: Path, limit: int) -> list[Problem] | list[Solution]:
    plain: dict[str, Problem] = {}
    labelled: dict[str, list[Solution]] = {}
    for place, line in json_lines.lines(path, "problems", "question and answer"):
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


def examples(path: Path) -> list[Example]:
    """Every line of a .jsonl of {question, answer}.

    Raises:
        SettingError: there is no such file.
        StoreError: a line is none of these.
    """
    if not path.is_file():
        raise SettingError(
            f"answers.examples={path} is no file; give a .jsonl of {{question, answer}} such as "
            "GSM8K's train.jsonl"
        )
    found = []
    for place, line in json_lines.lines(path, "answers.examples", "question and answer"):
        question, answer = line.get("question"), line.get("answer")
        if not isinstance(question, str) or isinstance(answer, bool | list | dict | None):
            raise StoreError(f"{place}: an example has a text `question` and an `answer`")
        found.append(Example(question, str(answer)))
    return found


def embedded_kinds(limit: int) -> dict[str, str]:
    """By id the kind of each of the first `limit` embedded problems, one of `tiny.KINDS`."""
    first = islice(tiny.problems("heldout"), 2 * limit)
    return {problem(drawn.question, str(drawn.answer)).id: drawn.kind for drawn in first}


def _embedded(limit: int) -> list[Problem]:
    """The first `limit` different problems that the embedded model was not trained on."""
    unique: dict[str, Problem] = {}
    for drawn in islice(tiny.problems("heldout"), 2 * limit):
        asked = problem(drawn.question, str(drawn.answer))
        unique[asked.id] = asked
        if len(unique) == limit:
            break
    return list(unique.values())


def _problem(place: str, line: dict[str, Any]) -> Problem:
    question = line.get("question")
    is_asked = isinstance(question, str) and bool(question.strip())
    if not is_asked or not line.keys() & {"answer", "ground_truth"}:
        raise StoreError(
            f"{place}: a problem has a text `question` and an `answer` (or `ground_truth`)"
        )
    try:
        truth = truth_of(line.get("answer", line.get("ground_truth")))
    except NotANumber as error:
        raise StoreError(f"{place}: {error}; write one number, such as 18 or '#### 18'") from error
    return problem(str(question), truth.number, by_number=not truth.plain)


def _solutions(asked: Problem, line: dict[str, Any]) -> list[Solution]:
    solutions = []
    for source, value in line.items():
        if isinstance(value, dict) and isinstance(value.get("is_correct"), bool):
            text = str(value.get("solution", ""))
            solutions.append(Solution(asked, source, text, value["is_correct"]))
    return solutions
