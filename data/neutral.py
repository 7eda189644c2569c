"""Text of strangers, made safe to show: a terminal or a page obeys some characters, or hides them.

Those are control characters (an escape that recolours or clears the terminal, a line feed that
makes one message two), marks of writing direction (which let a name read as another), line and
paragraph separators, halves of surrogate pairs, which cannot be printed at all, and what has no
shape, such as a zero-width space in a name. Joiners and variation selectors stay: emoji, Persian
and the scripts of India need them.

What one machine writes for another, such as JSON, keeps its text as it is.
"""

from __future__ import annotations

import re

_OBEYED = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|"  # a region's flag: its name in tags
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e00ff]"
)


def neutral(text: str) -> str:
    r"""`text` with each such character as its escape in Python: \n, \x1b, \u202e."""
    return _OBEYED.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    return match[1] or match[0].encode("unicode_escape").decode("ascii")
