"""Lines of Markdown from text of strangers."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence

from residual_saes.data.neutral import neutral

# What Markdown, the Hub's formulas or its links would read as a mark. HTML entities are not read as
# marks.
_ENTITIES = {
    "\\": "&#92;",
    "$": "&#36;",
    "@": "&#64;",
    "://": "&#58;//",
    "](": "&#93;(",
}


class Markdown(str):
    """Text that is Markdown already."""


def escaped(text: str) -> Markdown:
    """Foreign text as one line of Markdown: no mark, link, cell, formula or HTML comes of it."""
    # An underscore inside a word is no mark.
    line = re.sub(r"[`*~|]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", in_html(text))
    # The first mark of a list, a rule, a heading or a link's definition.
    line = re.sub(r"^([-+=](?=[-+=\s]|$)|[#\[])", r"\\\g<0>", line)
    return Markdown(re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line))


def in_html(text: str) -> Markdown:
    """Foreign text as one line inside an HTML element, where Markdown's own marks mean nothing."""
    line = html.escape(neutral(" ".join(text.split())), quote=False)
    for mark, entity in _ENTITIES.items():
        line = line.replace(mark, entity)
    return Markdown(re.sub(r"(?i)\bwww\.", lambda match: f"{match[0][:-1]}&#46;", line))


def cell(text: str) -> str:
    """A cell's text on a terminal, where only what would end the cell is a mark."""
    return text.replace("\\", "\\\\").replace("|", "\\|")


def table_lines(
    header: Sequence[str], rows: Iterable[Sequence[str]], escape: Callable[[str], str] = escaped
) -> list[str]:
    """A table as lines of Markdown.

    Args:
        escape: what is done to every cell.
    """
    lines = [_row(header, escape), _row(["---"] * len(header), str)]
    for row in rows:
        lines.append(_row(row, escape))
    return lines


def _row(cells: Iterable[str], escape: Callable[[str], str]) -> str:
    return "| " + " | ".join(map(escape, cells)) + " |"
