"""A truth is the number that a file of problems means, or the file's line is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from residual_saes.analyze.questions import answering, problems
from residual_saes.analyze.questions.problems import Problem
from residual_saes.data.errors import StoreError
from residual_saes.data.tiny.problems import problem as tiny_problem


def written(folder: Path, answer: str) -> Path:
    """A file of one problem whose answer is the JSON text `answer`."""
    (folder / "p.jsonl").write_text(f'{{"question": "How many?", "answer": {answer}}}\n')
    return folder / "p.jsonl"


def read(path: Path) -> Problem:
    (found,) = problems.read(str(path), 1)
    assert isinstance(found, Problem)
    return found


NUMBERS = [
    ("18", "18"),
    ("18.0", "18"),
    ("1e6", "1000000"),
    ("1E+2", "100"),
    ("0.5", "0.5"),
    ("1e-3", "0.001"),
    ("-0.0", "0"),
    ("-3", "-3"),
    ("9" * 400, "9" * 400),
    ("123456789012345678901234567890.50", "123456789012345678901234567890.5"),
]
TEXTS = [
    ("18.00", "18"),
    ("3.", "3"),
    ("#### -3", "-3"),
    ("so it is\n#### \u22123", "-3"),
    ("#### \u20133", "-3"),
    ("- 3", "-3"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("+7", "7"),
    ("1,234.50", "1234.5"),
    ("1,00,000", "100000"),
    ("1 000 000", "1000000"),
    ("1\u202f000", "1000"),
    ("#### 1e6", "1000000"),
    ("-0", "0"),
    ("007", "7"),
    ("50 %", "50"),
    ("5 \u20ac", "5"),
    ("#### 3 apples", "3"),
    ("#### 1,234.", "1234"),
    ("3 + 4 = 7 and\nA: 18", "18"),
    ("It costs $12.50.", "12.5"),
    ("#### 5\nso\n#### 5.0", "5"),
    ("\\boxed{7}", "7"),
    ("\\boxed{-3}", "-3"),
    ("x = -$3", "-3"),
    ("Step 1: 18", "18"),
    ("<<48/2=24>>24", "24"),
    ("3 + 4 => 7", "7"),
    ("The answer is **18**.", "18"),
]
NOT_NUMBERS = ["NaN", "-Infinity", "1e999999999", "1e99999999999999999999", "9" * 5000]
NOT_NUMBERS += ["true", "null", "[3]", '{"a": 3}']
UNCLEAR = ["", "none", "inf", "####", "#### none", "1/2", "#### 1/2", "#### 1 1/2", "\u00bd"]
UNCLEAR += ["1,5", "12,34", "1.234,56", "1.2.3", "--5", "5-3", "3\u20135", "16 - 3 - 4", "3, 4"]
UNCLEAR += ["It costs 1 000 dollars", "7th", "0x10", "5\u00b2", "\uff11\uff18", "\\frac{1}{2}"]
UNCLEAR += ["#### 5\n#### 6", "#### 3 of 4"]
# A sign, a root, a power, a ratio or a word that makes another number of the digits.
UNCLEAR += [
    "#### \u2014 3",
    "x = \u2013 3",
    "= - 3",
    "-(3)",
    "\u2212\\boxed{3}",
    "-**3**",
    "\\sqrt{4}",
]
UNCLEAR += ["x^{2}", "x / 3", "2:1", "12:30", "2 : 1", "$1.5 million", "#### 3 and a half"]
UNCLEAR += ["2 dozen", "18 (thousand)", "\u207b3", "1.234.567", "1\u2007234", "18k", "\uff0b3"]


@pytest.mark.parametrize(
    ("answer", "right"), [*NUMBERS, *((json.dumps(text), right) for text, right in TEXTS)]
)
def test_a_truth_is_its_number(tmp_path: Path, answer: str, right: str) -> None:
    found = read(written(tmp_path, answer))
    assert found.answer == right
    assert found.is_answer(right)


@pytest.mark.parametrize("answer", [*NOT_NUMBERS, *map(json.dumps, UNCLEAR)])
def test_what_may_be_another_number_is_refused_by_its_line(tmp_path: Path, answer: str) -> None:
    path = written(tmp_path, answer)
    path.write_text('{"question": "q", "answer": 1}\n' + path.read_text())
    with pytest.raises(StoreError, match=re.escape(f"{path} line 2")) as caught:
        problems.read(str(path), 9)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("answer", "found", "right"),
    [
        ("18", "18", True),
        ("18", "18.00", False),  # lm-evaluation-harness compares texts
        ('"1,018"', "1018.0", False),
        ("18.0", "18.00", True),
        ('"18.00"', "18.00", True),
        ('"18.00"', "18", True),
        ("0.5", ".50", True),
        ("0.5", "0.51", False),
        ("1e3", "1000", True),
        ('"\u22123"', "-3", True),
        ("18.0", "1.8.0", False),
        ("18.0", None, False),
        ("18", None, False),
    ],
)
def test_answers_are_compared_as_the_truth_is_written(
    tmp_path: Path, answer: str, found: str | None, right: bool
) -> None:
    assert read(written(tmp_path, answer)).is_answer(found) == right


def test_records_are_as_before_where_nothing_changed() -> None:
    plain, other = problems.problem("q", "1"), problems.problem("q", "1", by_number=True)
    assert list(plain.record()) == ["id", "question", "answer"]
    assert Problem(**plain.record()) == plain
    assert Problem(**other.record()) == other


def test_floats_are_graded_as_whole_numbers_are(tiny_study: Any, tmp_path: Path) -> None:
    drawn = [tiny_problem("heldout", number) for number in range(12)]
    right = []
    for kind in (int, float):
        file = tmp_path / f"{kind.__name__}.jsonl"
        lines = [
            json.dumps({"question": item.question, "answer": kind(item.answer)}) for item in drawn
        ]
        file.write_text("\n".join(lines))
        answers = answering.answers(
            tiny_study("gsm8k", problems=str(file), answers={"questions": 12})
        )
        right.append([answer.correct for answer in answers])
        assert all(answer.problem.by_number == (kind is float) for answer in answers)
    assert right[0] == right[1] and sum(right[0]) >= 4


# -- files ----------------------------------------------------------------------------------------

LINES = [b'{"question": "q", "answer": 1}', b'{"question": "r", "answer": 2}']


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + b"\n".join(LINES),
        b"\r\n".join([*LINES, b"", b"  "]),
        b"\r".join(LINES),
        b"\n\n".join(LINES),
        b'{"question": "q", "answer": 1, "score": NaN, "n": 1e999}\n' + LINES[1],
    ],
)
def test_line_ends_and_a_byte_order_mark_are_no_matter(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    found = problems.read(str(tmp_path / "p.jsonl"), 9)
    assert found == [problems.problem("q", "1"), problems.problem("r", "2")]


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "Zo\u00e9?", "answer": 5}'.encode("latin-1"),
        '{"question": "q", "answer": 5}'.encode("utf-16"),
        b'{"question": "Tom \\ud83d?", "answer": 5}',
        b'{"question": "q", "answer": "\\udc00 5"}',
        b'{"question": "q", "answer": 5, "m": {"solution": "\\ud800", "is_correct": true}}',
        b'{"question": "q", "answer": 5, "answer": 6}',
        b'{"question": "q", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"question": " ", "answer": 5}',
        b'{"question": 3, "answer": 5}',
        b'{"answer": 5}',
        b'[{"question": "q", "answer": 5}]',
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(LINES[0] + b"\n" + line + b"\n")
    with pytest.raises(StoreError, match=re.escape(f"{path} line 2")) as caught:
        problems.read(str(path), 9)
    str(caught.value).encode("ascii")  # printed anywhere
    assert "\n" not in str(caught.value)
