"""How often what happened: by kind of fault and by what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from tests.faults.child import Answer


class Outcome(StrEnum):
    """What came of a fault."""

    SAME = "same"  # the result is right: the damage matters to nothing, or was undone on the way
    REPAIRED = "repaired"  # the damage was told, and the way out gave the same result
    REFUSED = "refused"  # one message with a way out, no result
    SILENT = "SILENT"  # another result, as if nothing were wrong
    BROKEN = "BROKEN"  # a traceback, a hang, or no end that the product promises


BAD = (Outcome.SILENT, Outcome.BROKEN)


def judged(answer: Answer, expected: Any) -> Outcome:
    """What an answer is, beside the `expected` result."""
    if answer.broken is not None:
        return Outcome.BROKEN
    if answer.refused:
        return Outcome.REFUSED
    return Outcome.SAME if answer.value == expected else Outcome.SILENT


class Tally:
    """Counts of one scenario."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Outcome]] = Counter()
        self.bad: list[str] = []  # one text for each fault that was silent or broke something

    def add(self, kind: str, outcome: Outcome, told: str) -> None:
        """Count one fault.

        Args:
            kind: what was done to what, as the table names it.
            told: enough to do it again.
        """
        self.counts[kind, outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{outcome} {kind}: {told}")

    def cases(self, outcome: Outcome | None = None) -> int:
        """How many faults there were, or how many came out so."""
        return sum(n for (_, found), n in self.counts.items() if outcome in (None, found))

    def rows(self) -> list[list[Any]]:
        """[kind, outcome, count] of each."""
        return [[kind, str(outcome), n] for (kind, outcome), n in sorted(self.counts.items())]


def summed(rows: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """By kind, the counts by outcome."""
    found: dict[str, dict[str, int]] = {}
    for kind, outcome, count in rows:
        of_kind = found.setdefault(kind, dict.fromkeys(map(str, Outcome), 0))
        of_kind[outcome] += count
    return dict(sorted(found.items()))


def table(found: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Lines of a Markdown table, with the sums below."""
    names = list(map(str, Outcome))
    lines = ["| fault | cases | " + " | ".join(names) + " |", "|---|" + "--:|" * (len(names) + 1)]
    total = dict.fromkeys(names, 0)
    for kind, counts in found.items():
        lines.append(_row(kind, counts))
        total = {name: total[name] + counts[name] for name in names}
    return [*lines, _row("**all**", total)]


def _row(kind: str, counts: Mapping[str, int]) -> str:
    return f"| {kind} | {sum(counts.values())} | " + " | ".join(map(str, counts.values())) + " |"
