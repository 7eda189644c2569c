"""Word problems with their answers, and solutions that somebody labelled right or wrong.

A source is GSM8K's files, others of their form, or the embedded model's own problems.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from analyze.truth import NotANumber, is_right, truth_of
from data import durable
from data.errors import SettingError, StoreError, caused
from data.tiny import problems as tiny

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
    answer: str  # a number, as analyze.truth writes it
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
            whose number stands behind `#### ` or is the last one (analyze/truth.py); a .jsonl
            of {question, ground_truth, NAME: {solution, is_correct}, ...}; or a folder with such
            files train.jsonl and test.jsonl.
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
    for place, line in _lines(path):
        question, answer = line.get("question"), line.get("answer")
        if not isinstance(question, str) or isinstance(answer, bool | list | dict | None):
            raise StoreError(f"{place}: an example has a text `question` and an `answer`")
        found.append(Example(question, str(answer)))
    return found


def _embedded(limit: int) -> list[Problem]:
    """The first `limit` different problems that the embedded model was not trained on."""
    unique: dict[str, Problem] = {}
    for drawn in islice(tiny.problems("heldout"), 2 * limit):
        asked = problem(drawn.question, str(drawn.answer))
        unique[asked.id] = asked
    return list(islice(unique.values(), limit))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its place, for error messages.

    Numbers are int or Decimal, so they are exactly what is written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        got = f"problems={path} cannot be read: {error.strerror}"
        raise caused(error, got, "mend the file's rights") from error
    for row, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        place = f"{path} line {row}"
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            got = f"byte 0x{raw[error.start]:02x} at {error.start}"
            raise StoreError(f"{place} is not UTF-8 ({got}); save the file as UTF-8") from error
        if not text.strip():
            continue
        line = _object(place, text)
        _require_unicode(place, line)
        yield place, line


def _object(place: str, text: str) -> dict[str, Any]:
    """The JSON object of a line."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        line = dict(pairs)
        if len(line) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise StoreError(f"{place} has {twice!a} twice; it may be there once")
        return line

    try:
        line = json.loads(
            text,
            object_pairs_hook=unique,
            parse_float=_decimal,
            parse_int=_whole,
            parse_constant=Decimal,  # NaN, Infinity
        )
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{place} is not JSON") from error
    if not isinstance(line, dict):
        raise StoreError(f"{place} is not an object of question and answer")
    return line


def _decimal(written: str) -> Decimal:
    """A number of JSON; infinite, if its exponent is."""
    try:
        return Decimal(written)
    except InvalidOperation:
        return Decimal("Infinity")


def _whole(digits: str) -> int | Decimal:
    """A whole number of JSON; Python reads no int of more than some thousand digits."""
    return int(digits) if len(digits) < 1000 else Decimal(digits)


def _require_unicode(place: str, line: dict[str, Any]) -> None:
    """Raise StoreError if a text of a line holds half of a surrogate pair, which has no UTF-8."""
    for name, value in line.items():
        texts = value.values() if isinstance(value, dict) else (name, value)
        for text in texts:
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise StoreError(
                    f"{place}: {name!a} holds half of a surrogate pair, which no tokenizer can "
                    "read; write the whole character"
                )


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
