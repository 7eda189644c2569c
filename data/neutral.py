"""Text of strangers, made safe to show: a terminal or a page obeys some characters, not only shows
them.

Those are control characters (an escape that recolours or clears the terminal, a line feed that
makes one message two), marks of writing direction (which let a name read as another), line and
paragraph separators, and halves of surrogate pairs, which cannot be printed at all.
"""

from __future__ import annotations

import re

# Cc; marks of direction; separators of lines and paragraphs; surrogates.
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def neutral(text: str) -> str:
    r"""`text` with each such character as its escape in Python: \n, \x1b, \u202e."""
    return _OBEYED.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
