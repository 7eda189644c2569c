"""Text sources: the embedded problems, local files, and a mix of several; data/text/hub.py has the
hub's data sets.

Each document comes with the state of its source behind it, a small JSON value. A source that is
started from a state gives exactly the rest, without reading what came before: states are (file,
row, byte) or a problem's number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data import durable, order
from data.errors import SettingError, StoreError
from data.journal import tell
from data.text.documents import Column, Content, Document, State, TextSource, characters, read_files
from data.text.hub import HubText
from data.tiny import problems

__all__ = [
    "Content",
    "Document",
    "FileText",
    "HubText",
    "Mix",
    "Part",
    "State",
    "TextSource",
    "TinyText",
]
__all__ += ["has_chats", "source_name", "source_of"]

SUFFIXES = (".txt", ".jsonl", ".parquet")
# Settings of a source by its kind, with their defaults; `...` must be given.
_SETTINGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "files": {"path": ..., "field": "text", "messages": None},
    "hub": {
        "dataset": ...,
        "config": None,
        "split": "train",
        "field": "text",
        "messages": None,
        "revision": "main",
    },
}
_PHASE = 4096  # characters: about a document, so that sources of one weight do not begin in step


@dataclass(frozen=True)
class TinyText:
    """The embedded word problems, with their solutions: an endless source that needs no file."""

    def identity(self) -> dict[str, Any]:
        first = (problems.document(problem) for problem in islice(problems.problems("train"), 64))
        return {
            "kind": "tiny",
            "sample": durable.digest(*(document.encode() for document in first)),
        }

    def documents(self, state: State) -> Iterator[Document]:
        start = state or 0
        for number, problem in zip(
            count(start + 1), problems.problems("train", start), strict=False
        ):
            yield Document(problems.document(problem), number)


@dataclass(frozen=True)
class FileText:
    """Local files in the order of their names: a .txt is one document, .jsonl and .parquet give one
    a row.
    """

    path: Path  # a file, or a folder that is searched for such files
    field: str = "text"  # column of .jsonl and .parquet that holds the document
    messages: str | None = None  # column that holds a chat, in the place of `field`

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise SettingError(f"text.path={self.path} does not exist")
        if not self._files:
            raise SettingError(
                f"text.path={self.path} holds no text; allowed are {', '.join(SUFFIXES)} files"
            )
        plain = [file for file in self._files if file.suffix == ".txt"]
        if self.messages is not None and plain:
            raise SettingError(
                f"{plain[0]} holds no messages; text.messages= is for .jsonl and .parquet files"
            )

    @cached_property
    def _files(self) -> list[Path]:
        candidates = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        return [path for path in candidates if path.suffix in SUFFIXES and path.is_file()]

    def identity(self) -> dict[str, Any]:
        root = self.path if self.path.is_dir() else self.path.parent
        try:
            files = {
                str(file.relative_to(root)): durable.digest_file(file).xxh3_128
                for file in self._files
            }
        except OSError as error:
            raise StoreError(f"{error.filename} cannot be read: {error.strerror}") from error
        column = {"field": self.field} if self.messages is None else {"messages": self.messages}
        return {"kind": "files", **column, "files": files}

    def documents(self, state: State) -> Iterator[Document]:
        column = Column(self.field, setting="text.field")
        if self.messages is not None:
            column = Column(self.messages, chat=True, setting="text.messages")
        return read_files([str(file) for file in self._files], _opened, column, state)


def _opened(name: str) -> BinaryIO:
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise StoreError(f"{name} cannot be read: {error.strerror}") from error


class Part(NamedTuple):
    """One source of a mix."""

    weight: float  # its share of the characters, relative to the other parts'
    source: TextSource


@dataclass(frozen=True)
class Mix:
    """Several sources, each with its share of the characters.

    The next document comes from the source with the least of (phase + characters served) / weight,
    so that shares hold at every length of text to within a document. Phases are drawn from the
    seed. A pure function of (seed, served).
    """

    parts: Mapping[str, Part]
    seed: int

    def __post_init__(self) -> None:
        if not self.parts:
            raise SettingError(
                "text has no source; give text=fineweb_edu, text=[fineweb_edu,tiny] or text.path=FILES"
            )
        for name, (weight, _) in self.parts.items():
            _require_weight(name, weight)

    def identity(self) -> dict[str, Any]:
        parts = {
            name: {"weight": float(part.weight), **part.source.identity()}
            for name, part in self.parts.items()
        }
        return {"kind": "mix", "seed": self.seed, "sources": dict(sorted(parts.items()))}

    def documents(self, state: State) -> Iterator[Document]:
        names = sorted(self.parts)
        phases = dict(
            zip(names, (order.keys(len(names), self.seed, 0x7E47) % _PHASE).tolist(), strict=True)
        )
        # name -> (its own state, characters served, has ended); a new dictionary for each document.
        progress: dict[str, list[Any]] = state or {name: [None, 0, False] for name in names}
        streams: dict[str, Iterator[Document]] = {}
        while live := [name for name in names if not progress[name][2]]:
            name = min(
                live, key=lambda name: (phases[name] + progress[name][1]) / self.parts[name].weight
            )
            inner, served, _ = progress[name]
            if name not in streams:
                streams[name] = self.parts[name].source.documents(inner)
            document = next(streams[name], None)
            if document is None:
                progress = {**progress, name: [inner, served, True]}
                others = ", ".join(other for other in live if other != name)
                rest = f"; the rest is from {others}" if others else ""
                tell(f"text: {name} ends after {served:,} characters{rest}")
                continue
            # An empty document counts as one character: the order must move on.
            served += max(1, characters(document.content))
            progress = {**progress, name: [document.after, served, False]}
            yield Document(document.content, progress)


def has_chats(source: TextSource) -> bool:
    """Whether any of its documents are chats, so that the model's chat template decides their
    tokens.
    """
    if isinstance(source, Mix):
        return any(has_chats(part.source) for part in source.parts.values())
    return getattr(source, "messages", None) is not None


def source_of(group: Mapping[str, Any], seed: int) -> TextSource:
    """The source that the `text` settings name: `path` alone if it is given, else `sources`, mixed
    by their weights.

    Raises:
        SettingError: an unknown kind or key, a weight that is none, no source at all.
    """
    path, field, messages = (group.get(key) for key in ("path", "field", "messages"))
    if path is not None:
        return _source(
            "files", {"path": path, "field": field or "text", "messages": messages}, "text"
        )
    if messages is not None or field not in (None, "text"):
        key = "field" if messages is None else "messages"
        raise SettingError(
            f"text.{key} belongs to text.path=; a source's own column is text.sources.NAME.{key}="
        )
    parts = {name: _part(name, settings) for name, settings in (group.get("sources") or {}).items()}
    return next(iter(parts.values())).source if len(parts) == 1 else Mix(parts, seed)


def source_name(group: Mapping[str, Any]) -> str:
    """What the default store is named after: the file or folder, or the sources."""
    if group.get("path") is not None:
        return Path(str(group["path"])).stem
    return "+".join(sorted(group.get("sources") or {}))


def _part(name: str, settings: Any) -> Part:
    where = f"text.sources.{name}"
    if not isinstance(settings, Mapping):
        raise SettingError(
            f"{where}={settings!r} is no source; it needs kind= and that kind's settings"
        )
    rest = dict(settings)
    kind, weight = rest.pop("kind", None), rest.pop("weight", 1)
    _require_weight(name, weight)
    if kind not in _SETTINGS:
        raise SettingError(f"{where}.kind={kind} is unknown; choose one of {', '.join(_SETTINGS)}")
    return Part(weight, _source(kind, rest, where))


def _source(kind: str, given: Mapping[str, Any], where: str) -> TextSource:
    defaults = _SETTINGS[kind]
    if unknown := [key for key in given if key not in defaults]:
        allowed = ", ".join(["kind", "weight", *defaults])
        raise SettingError(
            f"{where}.{unknown[0]} is no setting of a source of kind={kind}; it has {allowed}"
        )
    settings = {**defaults, **given}
    for key, value in settings.items():
        if value is None and defaults[key] is None:
            continue
        if not isinstance(value, str | Path):
            got = " is not set" if value is ... or value is None else f"={value!r} is no text"
            raise SettingError(f"{where}.{key}{got}; a source of kind={kind} needs it")
    if kind == "hub":
        return HubText(**settings)
    return FileText(Path(settings.pop("path")), **settings) if kind == "files" else TinyText()


def _require_weight(name: str, weight: Any) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight <= 0:
        raise SettingError(
            f"text.sources.{name}.weight={weight} must be a number above 0; to leave it out, take it out of text="
        )
