"""All that lies in a folder, as bytes in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

# By path in the folder, with /: a file's bytes; None for a folder; a symbolic link's target.
Node = bytes | str | None
Tree = dict[str, Node]


def read(root: Path) -> Tree:
    """Everything below `root`, parents before what is in them."""
    return dict(_walk(str(root), ""))


def _walk(root: str, below: str) -> Iterator[tuple[str, Node]]:
    with os.scandir(f"{root}/{below}") as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_symlink():
            yield path, os.readlink(entry.path)
        elif entry.is_dir():
            yield path, None
            yield from _walk(root, path)
        else:
            yield path, Path(entry.path).read_bytes()


def put(root: Path, tree: Mapping[str, Node]) -> None:
    """Make `root` hold exactly `tree`."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, node in tree.items():
        path = root / name
        if node is None:
            path.mkdir()
        elif isinstance(node, str):
            path.symlink_to(node)
        else:
            path.write_bytes(node)


def files(root: Path) -> dict[str, bytes]:
    """The files alone, by path in `root`."""
    return {name: node for name, node in read(root).items() if isinstance(node, bytes)}


def differences(a: Mapping[str, Node], b: Mapping[str, Node]) -> list[str]:
    """-NAME, +NAME and ~NAME of what is only in `a`, only in `b`, or other in `b`."""
    gone = [f"-{name}" for name in a.keys() - b.keys()]
    new = [f"+{name}" for name in b.keys() - a.keys()]
    changed = [f"~{name}" for name in a.keys() & b.keys() if a[name] != b[name]]
    return sorted([*gone, *new, *changed])
