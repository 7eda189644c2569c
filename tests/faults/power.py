"""Images of a folder as a power loss may leave it, at every moment of some work."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults import tree
from tests.faults.disk import Disk
from tests.faults.trace import Trace, UntracedError
from tests.faults.tree import Tree

# Scenarios of hours go on from every so-many-th image and kill only.
EVERY = int(os.environ.get("FAULTS_EVERY", "1"))


class Image(NamedTuple):
    """What a power loss left."""

    root: Path
    moment: int  # operations that were done
    told: str  # what of them is missing
    tree: Tree

    def put(self) -> None:
        """Make the folder what the power loss left. Paths in files stay right: it is the same."""
        tree.put(self.root, self.tree)

    def __str__(self) -> str:
        return f"after {self.moment} operations, {self.told}"


def images(trace: Trace, exhaustive: int = 64, seed: int = 0) -> Iterator[Image]:
    """Every image once, in the order of moments.

    Args:
        exhaustive: of a moment with at most so many images, all are there; else a part of them
            (`Disk.choices`).
        seed: of the random ones.

    Raises:
        UntracedError: the folder holds at the end what no noted call explains.
    """
    rng = random.Random(seed)
    disk = Disk(trace.before)
    seen: set[int] = set()
    for moment in range(len(trace.events) + 1):
        if moment:
            disk.do(trace.events[moment - 1])
        for choice in disk.choices(exhaustive, rng):
            found = disk.after(choice)
            # Bytes keep their hash, so that what did not change is not read again.
            if (key := hash(tuple(found.items()))) not in seen:
                seen.add(key)
                told = f"the last one {trace.events[moment - 1][:3]}; " if moment else ""
                yield Image(trace.root, moment, told + choice.told, found)
    if unexplained := tree.differences(disk.live(), trace.after):
        raise UntracedError(f"no noted call explains {unexplained[:5]}")
