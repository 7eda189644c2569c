"""What a study found: figures, sentences, tables and pictures, and how they lie in its folder.

NAME.json   every figure, with the settings that it follows from
NAME.md     the sentences and tables
*.svg       a file per picture

analyze/results.py records their digests, and until then they do not count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from residual_saes.data import durable
from residual_saes.data.digests import Digests
from residual_saes.data.errors import StoreError
from residual_saes.data.markdown import cell, escaped, table_lines


class Table(NamedTuple):
    """A table as people read it."""

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Picture(NamedTuple):
    """An SVG with what it shows."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Outcome:
    """What a study found."""

    figures: dict[str, Any]  # plain JSON; NaN becomes null
    summary: list[str]  # sentences: the verdict first, each figure with its null or interval
    tables: list[Table] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)  # by file name without .svg


def write(
    folder: Path, name: str, settings: Mapping[str, Any], outcome: Outcome, *, finds: bool = True
) -> None:
    """Write an outcome durably.

    Args:
        finds: whether it has a verdict; else it says where files are, and is not published.
    """
    for stem, picture in outcome.pictures.items():
        durable.write(folder / f"{stem}.svg", [picture.svg.encode()])
    lines = [f"# {name}", "", *markdown(outcome)]
    durable.write(folder / f"{name}.md", ["\n".join(lines).encode(), b"\n"])
    record = {
        "study": name,
        "finds": finds,
        "settings": settings,
        "summary": outcome.summary,
        "tables": outcome.tables,
        "pictures": {stem: picture.caption for stem, picture in outcome.pictures.items()},
        "figures": outcome.figures,
    }
    durable.write(folder / f"{name}.json", [dumped(record).encode()])


def read(digests: Digests, name: str, way_out: str) -> Outcome:
    """The outcome in NAME.json of a recorded folder, with the pictures beside it.

    Args:
        way_out: what the user can do if a file is damaged.

    Raises:
        StoreError: a file is damaged, or another version wrote it.
    """
    file = f"{name}.json"
    record = json.loads(digests.content(file, way_out))
    try:
        pictures = {}
        for stem, caption in record["pictures"].items():
            svg = digests.content(f"{stem}.svg", way_out).decode()
            pictures[stem] = Picture(caption, svg)
        tables = []
        for caption, header, rows in record["tables"]:
            tables.append(Table(caption, tuple(header), [tuple(row) for row in rows]))
        return Outcome(record["figures"], record["summary"], tables, pictures)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{digests.folder / file} is of another version"
        raise StoreError(f"{got}; {way_out}") from error


def dumped(value: Any) -> str:
    """JSON of plain values and numpy's; NaN and infinity become null."""
    return json.dumps(_plain(value), indent=1, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


# -- Markdown --------------------------------------------------------------------------------------


def markdown(outcome: Outcome) -> list[str]:
    """The outcome as lines of Markdown: the summary, then the tables."""
    return _lines(outcome, escaped, escaped)


def printed(outcome: Outcome) -> list[str]:
    """The same for a terminal."""
    return _lines(outcome, str, cell)


def _lines(
    outcome: Outcome, sentence: Callable[[str], str], of_cell: Callable[[str], str]
) -> list[str]:
    lines = [sentence(line) for line in outcome.summary]
    for table in outcome.tables:
        rows = table_lines(table.header, table.rows, of_cell)
        lines += ["", sentence(table.caption), "", *rows]
    return lines
