"""Tables as lines of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def escaped(cell: str) -> str:
    """A cell's text without what would end the cell."""
    return cell.replace("\\", "\\\\").replace("|", "\\|")


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
