"""Damage to one file: a bit that flips anywhere, a file that is cut, empty, zeros or gone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import tree
from tests.faults.child import ask
from tests.faults.report import Outcome, Tally, judged


class Damage(NamedTuple):
    """A file as damage leaves it."""

    kind: str
    told: str
    data: bytes | None  # None: the file is gone


def flips(data: bytes, count: int, seed: int = 0) -> Iterator[Damage]:
    """`count` single flipped bits, one in each of `count` equal parts of the file, and in its first
    and last byte.
    """
    rng = random.Random(seed)
    bits = 8 * len(data)
    parts = min(count, bits)
    chosen = [rng.randrange(at * bits // parts, (at + 1) * bits // parts) for at in range(parts)]
    for bit in dict.fromkeys([*chosen, rng.randrange(8), bits - 1 - rng.randrange(8)]):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield Damage("flip", f"bit {bit}", bytes(flipped))


def damages(data: bytes, count: int, seed: int = 0) -> Iterator[Damage]:
    """Flips, and what a disk or a hand does to a whole file."""
    if data:
        yield from flips(data, count, seed)
        yield Damage("cut", "half of it", data[: len(data) // 2])
        yield Damage("cut", "all but its last byte", data[:-1])
        yield Damage("cut", "empty", b"")
        yield Damage("zeros", "of its length", bytes(len(data)))
    yield Damage("longer", "by a byte", data + b"\0")
    yield Damage("gone", "no file", None)


def tried(
    tally: Tally,
    root: Path,
    files: Iterable[str],
    work: Callable[[], Any],
    kind: Callable[[str], str] = str,
    count: int = 8,
    seed: int = 0,
    repair: Callable[[], object] | None = None,
) -> None:
    """Damage each of the files in turn, and see what `work` answers.

    Args:
        root: the folder that is made whole before each damage; everything that `work` and `repair`
            write is in it.
        files: paths in `root`.
        work: what a user does next, in a child; what it returns must be as without the damage.
        kind: a name for the kind of file, for the table.
        count: flips of each file.
        repair: the way out, where `work` refuses. `work` must then give the same result, and
            nothing else does.
    """
    whole = tree.read(root)
    expected = ask(work)
    assert expected.broken is None and not expected.refused, expected
    for name in files:
        data = whole[name]
        assert isinstance(data, bytes), name
        for damage in damages(data, count, seed):
            tree.put(
                root,
                {**whole, name: damage.data} if damage.data is not None else _without(whole, name),
            )
            answer = ask(work)
            found = judged(answer, expected.value)
            told = answer.refusal or answer.broken or answer.said
            if found is Outcome.REFUSED and repair is not None:
                mended = ask(repair)
                found, told = _mended(mended, work, expected.value)
            elif found is Outcome.SAME and _is_back(root / name, data):
                found = Outcome.REPAIRED
            tally.add(
                f"{damage.kind}: {kind(name)}", found, f"{name}, {damage.told}: {told[-2000:]}"
            )
    tree.put(root, whole)


def _without(whole: tree.Tree, name: str) -> tree.Tree:
    return {path: node for path, node in whole.items() if path != name}


def _is_back(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _mended(mended: Any, work: Callable[[], Any], expected: Any) -> tuple[Outcome, str]:
    """What came of the way out and of the work behind it."""
    if mended.broken is not None:
        return Outcome.BROKEN, f"the way out: {mended.broken}"
    if mended.refused:
        return Outcome.REFUSED, mended.refusal
    answer = ask(work)
    found = judged(answer, expected)
    told = answer.refusal or answer.broken or answer.said
    return (Outcome.REPAIRED, told) if found is Outcome.SAME else (found, told)
