"""The number that a file of problems gives as an answer, and whether an answer is that number.

A truth is an exact decimal: digits, a minus before them, a point and further digits where it is no
whole number. Signs, grouping, currencies and exponents are read. Whatever else is beside the digits
(a fraction, a unit, a decimal comma) could make it another number, so it is refused.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

_MINUS = re.compile("[\u2212\ufe63\uff0d\u2010-\u2013]")  # as typesetters write it
# What makes another number of the one behind it, brackets and markup between them: a minus apart
# from it (or a dash, which cannot be told from one), a root, a power, a denominator.
_CHANGED_BEFORE = re.compile(
    r"(?:[-\u2212\ufe63\uff0d\u2010-\u2015\u207b\u2796/^\u221a\u2044\u00f7\u00d7]"
    r"|\b(?:sqrt|frac|log|ln))(?:[\s(\[{*`\"'$]|\\\w+)*"
)
# Words that make another number of the one before them.
_CHANGED_BEHIND = re.compile(
    r"[\s()\[\]}*`\"'$-]*(?:(?:and\s+)?(?:a|one)\s+(?:half|third|quarter)"
    r"|half|dozen|hundred|thousand|million|billion|trillion|lakh|crore)s?\b",
    re.IGNORECASE,
)
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
# A sign, a currency before or behind it, and the number; a percentage is its number.
_DRESSED = re.compile(
    rf"(?P<sign>[-+]?)\s*[{_CURRENCY}]?\s*(?P<inner>[-+]?)(?P<body>.*?)\s*[{_CURRENCY}%]?\.?"
)
_DIGITS = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,9})?", re.ASCII)
# Thousands by one separator throughout; lakhs by commas.
_GROUPED = re.compile(
    "\\d{1,3}(?P<by>[,' _\u00a0\u2009\u202f\u2019])\\d{3}(?:(?P=by)\\d{3})*(?:\\.\\d*)?"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d*)?",
    re.ASCII,
)
_SEPARATORS = re.compile("[,' _\u00a0\u2009\u202f\u2019]")
_PLAIN = re.compile(r"-?\d+", re.ASCII)
# What a number in a text is made of; what words and formulas put around it is cut off.
_RUN = re.compile(r"[^\s=:;<>()\[\]{}\"*`]+")
_AROUND = "'!?,~\u2248\\"
# What stands between two numbers that are not one, such as a formula and its result.
# A colon is one behind a word or a number only: 2:1 and 12:30 are no two numbers.
_APART = re.compile(r"[^\W\d_]|[=\n\u2248]|>>|[=-]>|(?<!\s):\s")
_MARK = "####"  # GSM8K's, before the answer
_MOST_DIGITS = 1000


class Truth(NamedTuple):
    """A problem's answer."""

    number: str
    # Whether the file writes it in plain digits, as GSM8K does. lm-evaluation-harness compares
    # texts: then that is the same as comparing numbers, but for answers such as 18.00.
    plain: bool


class NotANumber(Exception):
    """Its text says why, with what was got."""


def truth_of(value: Any) -> Truth:
    """The number in an answer of a JSON file, whose numbers were read as int or Decimal.

    Raises:
        NotANumber: there is none, there are several, or it may be another number than it seems.
    """
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise NotANumber(f"its answer {_shown(value)} is neither a number nor a text")
    return Truth(_written(Decimal(value)), isinstance(value, int))


def is_right(found: str | None, answer: str, *, by_number: bool) -> bool:
    """Whether the number found in an answer is the truth.

    Args:
        by_number: compare numbers. By default texts are compared, as lm-evaluation-harness does.
    """
    if found is None or not by_number:
        return found == answer
    try:
        return _written(_parsed(found)) == answer
    except NotANumber:
        return False


def _of_text(text: str) -> Truth:
    """The number behind `####`, else the last one in the text."""
    marked = text.split(_MARK)[1:]
    parts = [part.strip().splitlines()[0] for part in marked if part.strip()]
    found = [_in_part(part, last=False) for part in parts]
    if not marked:
        found = [_in_part(text, last=True)]
    if not found:
        raise NotANumber(f"there is no number behind {_MARK} in its answer {_shown(text)}")
    numbers = {_written(_parsed(written)) for written in found}
    if len(numbers) > 1:
        raise NotANumber(f"its answer {_shown(text)} has several numbers behind {_MARK}")
    harness = found[0].replace(",", "").replace("$", "").removesuffix(".")
    number = numbers.pop()
    return Truth(number, harness == number and _PLAIN.fullmatch(number) is not None)


def _in_part(part: str, *, last: bool) -> str:
    """The number in a part of a text, as it is written there.

    Args:
        last: take the last of several; else there may be only one.
    """
    try:
        _parsed(part)
        return part.strip()
    except NotANumber:
        pass
    runs = [run for run in _RUN.finditer(part) if any(map(str.isnumeric, run[0]))]
    if not runs:
        raise NotANumber(f"there is no number in its answer {_shown(part)}")
    *before, run = runs
    if before and not (last and _APART.search(part, before[-1].end(), run.start())):
        raise NotANumber(f"its answer {_shown(part)} has several numbers, or one in several parts")
    written = run[0].strip(_AROUND)
    start = run.start() + run[0].index(written)
    changed = _ends_changing(part[:start]) or _CHANGED_BEHIND.match(part, start + len(written))
    if changed:
        raise NotANumber(f"{_shown(written)} is only a part of the number in its answer")
    return written


def _ends_changing(before: str) -> bool:
    """Whether the text before a number makes another one of it."""
    return any(match.end() == len(before) for match in _CHANGED_BEFORE.finditer(before))


def _parsed(written: str) -> Decimal:
    """The number that the whole text is."""
    dressed = _DRESSED.fullmatch(_MINUS.sub("-", written.strip()))
    body = dressed["body"] if dressed else ""
    if _GROUPED.fullmatch(body):
        body = _SEPARATORS.sub("", body)
    if not dressed or not _DIGITS.fullmatch(body) or (dressed["sign"] and dressed["inner"]):
        raise NotANumber(f"{_shown(written)} in its answer is not one plain number")
    try:
        return Decimal(dressed["sign"] + dressed["inner"] + body)
    except InvalidOperation:
        raise NotANumber(f"{_shown(written)} in its answer is too long a number") from None


def _written(number: Decimal) -> str:
    """A number as truths are written."""
    if not number.is_finite() or abs(number.adjusted()) > _MOST_DIGITS:
        raise NotANumber(f"its answer {_shown(number)} is not finite, or has too many digits")
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").removesuffix(".")
    return "0" if text == "-0" else text


def _shown(value: Any) -> str:
    """The end of a value, in ASCII."""
    text = ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"...{text[-60:]}"
