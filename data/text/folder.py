"""The files of text in a folder, and the others: none is left out without a word.

Names that begin with a dot are left out: editors and download clients keep copies there. Links are
followed, and what is reached twice is read once, under its own name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_NAMED = 5  # files that the message names


class Folder(NamedTuple):
    """What a folder holds."""

    files: list[Path]  # of text, in the order of their paths
    others: list[str]  # names of what is not read, some with why

    @property
    def summary(self) -> str:
        """How many files are not read, and the first of them by name."""
        more = len(self.others) - _NAMED
        named = [*self.others[:_NAMED], *([f"{more:,} more"] if more > 0 else [])]
        return f"{len(self.others):,} not read: {', '.join(named)}"


def scan(root: Path, fault: Callable[[Path], str | None]) -> Folder:
    """The files below `root`.

    Args:
        fault: why a file is no text: a few words, or none if its name tells; None: it is text.
    """
    files: list[Path] = []
    others: dict[Path, str] = {}
    read: set[str] = set()  # real paths
    real_folder = cache(os.path.realpath)
    for found in _walk(root):
        # Files before links, so that a file which a link names too is read under its own name.
        for path in sorted(found, key=lambda path: (path.is_symlink(), path)):
            real = os.path.join(real_folder(path.parent), path.name)
            if path.is_symlink():
                real = os.path.realpath(path)
            why = found[path] or ("read already" if real in read else fault(path))
            if why is None:
                read.add(real)
                files.append(path)
            else:
                others[path] = why
    return Folder(sorted(files), [_named(path, root, others[path]) for path in sorted(others)])


def _walk(root: Path) -> Iterator[dict[Path, str | None]]:
    """The files of `root`, then those of each folder that is linked there.

    Folders that are left out stand among them. Each has why it is, or None.
    """
    entered: set[str] = set()
    linked = [root]
    while linked:
        top = linked.pop(0)
        if os.path.realpath(top) in entered:
            yield {top: "read already"}
            continue
        found: dict[Path, str | None] = {}
        refused: list[OSError] = []
        for place, folders, names in os.walk(top, onerror=refused.append):
            entered.add(os.path.realpath(place))
            here = Path(place)
            for name in list(folders):
                if name.startswith("."):
                    folders.remove(name)
                    found[here / name] = "hidden"
                elif (here / name).is_symlink():
                    linked.append(here / name)
            for name in names:
                path = here / name
                why = None if path.is_file() else "no regular file"
                found[path] = "hidden" if name.startswith(".") else why
        for error in refused:
            found[Path(error.filename)] = str(error.strerror)
        yield found


def _named(path: Path, root: Path, why: str) -> str:
    name = str(path.relative_to(root)) + ("/" if path.is_dir() else "")
    return f"{name} ({why})" if why else name
