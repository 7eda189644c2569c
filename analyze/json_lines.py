"""The objects of a .jsonl that a user gives: exact, or refused in one line with the place."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from residual_saes.data.errors import StoreError, caused


def lines(path: Path, setting: str, holds: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its place, for error messages.

    Numbers are int or Decimal, so they are exactly what is written.

    Args:
        setting: that names the file.
        holds: what an object is of, for error messages.

    Raises:
        StoreError: a line is no UTF-8, no JSON, no object, or names something twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        got = f"{setting}={path} cannot be read: {error.strerror}"
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
        line = _object(place, text, holds)
        _require_unicode(place, line)
        yield place, line


def _object(place: str, text: str, holds: str) -> dict[str, Any]:
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
        raise StoreError(f"{place} is not an object of {holds}")
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
