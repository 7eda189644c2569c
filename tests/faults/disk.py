"""A disk that keeps what a completed fsync covers, and of the rest anything.

- An fsync of a file keeps its bytes, an fsync of a folder the names in it as they are then.
- A rename is atomic: its two names change together. An fsync of either folder keeps it.
- A folder is gone only if all that was in it is gone.
- Of the other names any subset of the changes is on the disk, so a file that was removed or
  replaced can be there again.
- Of bytes that were not synced the disk holds those of the last fsync, half of the new ones, zeros
  in their place, or all of them; each file by itself.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.faults.trace import Event, UntracedError
from tests.faults.tree import Node, Tree

_ROOT = 0  # the node of the root


@dataclass
class _File:
    """A file's bytes that are kept, and all that may be there instead, oldest first."""

    kept: bytes
    since: list[bytes] = field(default_factory=list)
    _choices: list[bytes] = field(default_factory=list)
    _of: int = -1  # so many were in `since` when the choices were made

    @property
    def live(self) -> bytes:
        return self.since[-1] if self.since else self.kept

    def choices(self) -> list[bytes]:
        """What may be on the disk: first what is kept, last what the process sees."""
        if self._of != len(self.since):
            self._of, self._choices = len(self.since), self._made()
        return self._choices

    def _made(self) -> list[bytes]:
        found = [self.kept]
        for data in self.since:
            same = _common(self.kept, data)
            half = data[: same + (len(data) - same) // 2]
            found += [data[:same], half, data[:same] + bytes(len(data) - same), data]
        live = found[-1]
        unique = [data for data in dict.fromkeys(found) if data != live]
        return [*unique, live] if len(found) > 1 and unique else [live]


def _common(a: bytes, b: bytes) -> int:
    """Length of the common beginning."""
    least = min(len(a), len(b))
    if a[:least] == b[:least]:
        return least
    return next(at for at in range(least) if a[at] != b[at])


class _Op(NamedTuple):
    """A change of names: (folder's node, name, node or None for none)."""

    edits: tuple[tuple[int, str, int | None], ...]
    told: str
    removed: int | None  # the folder that this removes


class Choice(NamedTuple):
    """One of the things that may be on the disk: which changes of names, and which bytes."""

    ops: frozenset[int]  # those that are there, of the pending
    bytes_of: Mapping[int, int]  # by file's node, the index in its choices
    told: str


class Disk:
    """What is on a disk while some work goes on."""

    def __init__(self, before: Tree) -> None:
        """All of `before` is kept."""
        self._nodes: dict[int, _File | str | None] = {_ROOT: None}
        self._base: dict[int, dict[str, int]] = {_ROOT: {}}
        self._ops: list[tuple[_Op, bool]] = []  # with whether it is kept
        self._live: dict[int, dict[str, int]] = {_ROOT: {}}
        for path, node in before.items():
            parent, name = self._parent(path)
            number = self._new(_File(node) if isinstance(node, bytes) else node)
            self._live[parent][name] = number
            self._base[parent][name] = number

    def _new(self, node: _File | str | None) -> int:
        number = len(self._nodes)
        self._nodes[number] = node
        if node is None:
            self._live[number], self._base[number] = {}, {}
        return number

    def _node(self, path: str) -> int:
        """The node that the process sees under a path."""
        number = _ROOT
        for name in path.split("/") if path else []:
            try:
                number = self._live[number][name]
            except KeyError as error:
                raise UntracedError(f"{path} was written by no noted call") from error
        return number

    def _parent(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        return self._node(parent), name

    # -- operations --------------------------------------------------------------------------------

    def do(self, event: Event) -> None:
        """Take one operation."""
        getattr(self, f"_{event.call}")(event)

    def _change(
        self, event: Event, *edits: tuple[int, str, int | None], removed: int | None = None
    ) -> None:
        told = f"{event.call} {event.path} {event.to}".rstrip()
        self._ops.append((_Op(edits, told, removed), False))
        _apply(self._live, self._ops[-1][0])

    def _create(self, event: Event) -> None:
        self._change(event, (*self._parent(event.path), self._new(_File(b""))))

    def _mkdir(self, event: Event) -> None:
        self._change(event, (*self._parent(event.path), self._new(None)))

    def _symlink(self, event: Event) -> None:
        self._change(event, (*self._parent(event.path), self._new(event.to)))

    def _link(self, event: Event) -> None:
        self._change(event, (*self._parent(event.to), self._node(event.path)))

    def _rename(self, event: Event) -> None:
        moved = self._node(event.path)
        self._change(event, (*self._parent(event.to), moved), (*self._parent(event.path), None))

    def _unlink(self, event: Event) -> None:
        self._change(event, (*self._parent(event.path), None))

    def _rmdir(self, event: Event) -> None:
        removed = self._node(event.path)
        self._change(event, (*self._parent(event.path), None), removed=removed)

    def _write(self, event: Event) -> None:
        self._file(event.path).since.append(event.data)

    def _fsync(self, event: Event) -> None:
        file = self._file(event.path)
        self._nodes[self._node(event.path)] = _File(file.live)

    def _sync(self, event: Event) -> None:
        self._keep(self._node(event.path))
        while self._ops and self._ops[0][1]:
            _apply(self._base, self._ops.pop(0)[0])

    def _keep(self, folder: int) -> None:
        """Keep the changes of names in a folder, and so in the folders that were in it."""
        for at, (op, is_kept) in enumerate(self._ops):
            if not is_kept and any(edit[0] == folder for edit in op.edits):
                self._ops[at] = (op, True)
                if op.removed is not None:
                    self._keep(op.removed)

    def _file(self, path: str) -> _File:
        node = self._nodes[self._node(path)]
        assert isinstance(node, _File), path
        return node

    # -- what may be there -------------------------------------------------------------------------

    def live(self) -> Tree:
        """What a process sees, and finds again after it was killed."""
        return self._tree(self._live, {})

    def after(self, choice: Choice) -> Tree:
        """What is there after the power went, for one choice."""
        names = {number: dict(found) for number, found in self._base.items()}
        for at, (op, is_kept) in enumerate(self._ops):
            if is_kept or at in choice.ops:
                _apply(names, op)
        return self._tree(names, choice.bytes_of)

    def _tree(self, names: Mapping[int, Mapping[str, int]], bytes_of: Mapping[int, int]) -> Tree:
        found: Tree = {}

        def walk(number: int, below: str) -> None:
            for name, child in sorted(names[number].items()):
                node = self._nodes[child]
                found[below + name] = self._seen(node, bytes_of.get(child))
                if node is None:
                    walk(child, f"{below}{name}/")

        walk(_ROOT, "")
        return found

    @staticmethod
    def _seen(node: _File | str | None, index: int | None) -> Node:
        if not isinstance(node, _File):
            return node
        return node.live if index is None else node.choices()[index]

    def choices(self, exhaustive: int, rng: random.Random) -> Iterator[Choice]:
        """What may be there after the power went now.

        Args:
            exhaustive: with at most so many, all. With more: nothing of what is pending, all of it,
                each part alone, all but each, and half as many random ones.
        """
        pending = [at for at, (_, is_kept) in enumerate(self._ops) if not is_kept]
        # A file that has no name yet counts as well: a pending change may give it one.
        counts = {
            number: len(node.choices())
            for number, node in self._nodes.items()
            if isinstance(node, _File) and node.since
        }
        total = 2 ** len(pending) * math.prod(counts.values())
        parts = [range(2)] * len(pending) + [range(count) for count in counts.values()]
        if total <= exhaustive:
            picks: Iterator[tuple[int, ...]] = itertools.product(*parts)
        else:
            picks = _some([len(part) for part in parts], exhaustive // 2, rng)
        for picked in picks:
            ops = frozenset(at for at, is_there in zip(pending, picked, strict=False) if is_there)
            bytes_of = dict(zip(counts, picked[len(pending) :], strict=True))
            missing = [self._ops[at][0].told for at in pending if at not in ops]
            parted = [i for i, at in bytes_of.items() if at < counts[i] - 1]
            yield Choice(
                ops, bytes_of, f"without {missing}, {len(parted)} files' bytes are not whole"
            )


def _apply(names: dict[int, dict[str, int]], op: _Op) -> None:
    if op.removed is not None and names[op.removed]:
        return
    for folder, name, node in op.edits:
        if node is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = node


def _some(sizes: list[int], count: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Nothing, all, each part alone, all but each, and `count` random picks."""
    nothing = [0] * len(sizes)
    everything = [size - 1 for size in sizes]
    yield tuple(nothing)
    yield tuple(everything)
    for at, size in enumerate(sizes):
        for value in range(size):
            yield (*nothing[:at], value, *nothing[at + 1 :])
            yield (*everything[:at], value, *everything[at + 1 :])
    for _ in range(count):
        yield tuple(rng.randrange(size) for size in sizes)
