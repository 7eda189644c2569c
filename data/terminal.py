"""Standard error as a terminal: whether it is one, how wide it is, which colours it shows.

A pipe, a file and a terminal of TERM=dumb get whole lines alone: no carriage return, no escape.
"""

from __future__ import annotations

import os
import sys

ERASE = "\r\x1b[K"  # the line that the cursor is in
_ROOM = 3  # columns left free behind an open line: the terminal writes ^C there
_BAR = 12  # columns
_BAR_FROM = 100  # columns of a terminal in which a bar takes no figure's place
# How a line begins, and its colour. No line needs one to be understood.
_COLOURS = {"error: ": "31", "warning: ": "33", "next: ": "36"}


def is_one() -> bool:
    """Whether standard error is a terminal that draws a line again."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """Its width now: a window may be resized at any time."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def painted(line: str) -> str:
    """A line in the colours of its beginning, if standard error shows colours."""
    begin = next((begin for begin in _COLOURS if line.startswith(begin)), "")
    return coloured(begin, _COLOURS[begin]) + line[len(begin) :] if begin else line


def coloured(text: str, colour: str = "1") -> str:
    """`text` in a colour, or bold; as it is where NO_COLOR is set or nothing shows colours."""
    return f"\x1b[{colour}m{text}\x1b[0m" if is_one() and not os.environ.get("NO_COLOR") else text


def fitted(text: str, share: float | None = None) -> str:
    """`text` in one line of the terminal as wide as it is now.

    Figures that have no room are left out, the last ones first. Wide characters take two columns.

    Args:
        share: of the work that is done, shown before the text.
    """
    from tqdm.std import Bar  # 40 ms, and pipes need none
    from tqdm.utils import disp_len, disp_trim

    room = max(columns() - _ROOM, 1)
    has_signs = (sys.stderr.encoding or "").lower().startswith("utf")
    if share is not None:
        bar = ""
        if columns() >= _BAR_FROM:
            bar = f"{Bar(share, _BAR, Bar.UTF if has_signs else Bar.ASCII)}|"
        text = f"{share:4.0%}|{bar} {text}"
    if disp_len(text) <= room:
        return text
    dots = "…" if has_signs else "~"
    cut: str = disp_trim(text, max(room - 1, 0))
    whole, gap, _ = cut.rpartition("   ")
    return (whole.rstrip() if gap and whole.strip() else cut) + dots
