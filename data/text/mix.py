"""Several text sources mixed by their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from residual_saes.data import order
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import tell
from residual_saes.data.text.documents import Document, State, TextSource, characters

_PHASE = 4096  # characters: about a document, so that sources of one weight do not begin in step


class Part(NamedTuple):
    """One source of a mix."""

    weight: float  # its share of the characters, relative to the other parts'
    source: TextSource


class Progress(NamedTuple):
    """How far one source of a mix has been read: a list in the mix's JSON state."""

    state: State  # the source's own
    served: int  # characters
    ended: bool


@dataclass(frozen=True)
class Mix:
    """Several sources, each with its share of the characters.

    The next document comes from the source with the least (phase + characters served) / weight, so
    shares hold at every length of text to within a document. Phases are drawn from the seed. The
    order is a pure function of (seed, characters served).
    """

    parts: Mapping[str, Part]
    seed: int

    def __post_init__(self) -> None:
        if not self.parts:
            raise SettingError(
                "text has no source; give text=fineweb_edu, text=[fineweb_edu,tiny] or "
                "text.path=FILES"
            )
        for name, part in self.parts.items():
            require_weight(name, part.weight)

    @property
    def chats(self) -> bool:
        return any(part.source.chats for part in self.parts.values())

    def identity(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, part in sorted(self.parts.items()):
            parts[name] = {"weight": float(part.weight), **part.source.identity()}
        return {"kind": "mix", "seed": self.seed, "sources": parts}

    def documents(self, state: State) -> Iterator[Document]:
        names = sorted(self.parts)
        offsets = order.keys(len(names), self.seed, 0x7E47) % _PHASE
        phases = dict(zip(names, offsets.tolist(), strict=True))
        # A document's state outlives the loop, so each gets a new dictionary.
        recorded = state or {name: Progress(None, 0, False) for name in names}
        progress = {name: Progress(*entry) for name, entry in recorded.items()}
        streams: dict[str, Iterator[Document]] = {}
        while live := [name for name in names if not progress[name].ended]:
            # The source that is furthest behind its share serves the next document.
            name = min(
                live,
                key=lambda name: (phases[name] + progress[name].served) / self.parts[name].weight,
            )
            before = progress[name]
            if name not in streams:
                streams[name] = self.parts[name].source.documents(before.state)
            document = next(streams[name], None)

            # A source that ends leaves the rest to the others.
            if document is None:
                progress = {**progress, name: before._replace(ended=True)}
                others = ", ".join(other for other in live if other != name)
                rest = f"; the rest is from {others}" if others else ""
                tell(f"text: {name} ends after {before.served:,} characters{rest}")
                continue

            # An empty document counts as one character: the order must move on.
            served = before.served + max(1, characters(document.content))
            progress = {**progress, name: Progress(document.after, served, False)}
            yield document._replace(after=progress)


def require_weight(name: str, weight: Any) -> None:
    """Raise SettingError for a weight that is not a finite number above 0."""
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight <= 0:
        raise SettingError(
            f"text.sources.{name}.weight={weight} must be a number above 0; to leave it out, take "
            "it out of text="
        )
