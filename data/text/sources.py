"""Text sources by their kind: the embedded problems, local files, the hub's data sets.

Each document comes with the state of its source behind it, a small JSON value. A source started
from a state gives exactly the rest, without reading what came before: states are (file, rows,
bytes) or a problem's number.

A new kind of source is one frozen dataclass with a `kind` and the methods of
`data.text.documents.TextSource`, listed in `KINDS`. Its fields are its settings in
conf/text/NAME.yaml: text, a path or null. It is sent to the process that reads the text, so it must
pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from data import durable
from data.errors import SettingError, StoreError
from data.text.documents import Column, Document, State, TextSource, read_files
from data.text.hub import HubText
from data.text.mix import Mix, Part, require_weight
from data.tiny import problems

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TinyText:
    """The embedded word problems with their solutions: endless, needs no file."""

    kind: ClassVar[str] = "tiny"
    chats: ClassVar[bool] = False

    def identity(self) -> dict[str, Any]:
        first = islice(problems.problems("train"), 64)
        texts = (problems.document(problem).encode() for problem in first)
        return {"kind": self.kind, "sample": durable.digest(*texts)}

    def documents(self, state: State) -> Iterator[Document]:
        start = state or 0
        for number, problem in enumerate(problems.problems("train", start), start + 1):
            yield Document(problems.document(problem), number)


@dataclass(frozen=True)
class FileText:
    """Local files in the order of their names.

    A .txt file is one document; .jsonl and .parquet files give one a row.
    """

    kind: ClassVar[str] = "files"
    path: Path  # a file, or a folder that is searched for such files
    field: str = "text"  # column of .jsonl and .parquet that holds the document
    messages: str | None = None  # column that holds a chat, in the place of `field`

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # settings give it as text
        if not self.path.exists():
            raise SettingError(f"text.path={self.path} does not exist")
        if not self._files:
            raise SettingError(
                f"text.path={self.path} holds no text; allowed are {', '.join(SUFFIXES)} files"
            )
        plain = [file for file in self._files if file.suffix == ".txt"]
        if self.chats and plain:
            raise SettingError(
                f"{plain[0]} holds no messages; text.messages= is for .jsonl and .parquet files"
            )

    @property
    def chats(self) -> bool:
        return self.messages is not None

    @cached_property
    def _files(self) -> list[Path]:
        candidates = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        return [path for path in candidates if path.suffix in SUFFIXES and path.is_file()]

    @property
    def _column(self) -> Column:
        return Column.chosen(self.field, self.messages, "text.")

    def identity(self) -> dict[str, Any]:
        root = self.path if self.path.is_dir() else self.path.parent
        digests: dict[str, str] = {}
        for file in self._files:
            try:
                digests[str(file.relative_to(root))] = durable.digest_file(file).xxh3_128
            except OSError as error:
                raise _unreadable(file, error) from error
        return {"kind": self.kind, **self._column.identity(), "files": digests}

    def documents(self, state: State) -> Iterator[Document]:
        return read_files([str(file) for file in self._files], _open, self._column, state)


def _open(name: str) -> BinaryIO:
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(file: Path | str, error: OSError) -> StoreError:
    return StoreError(f"{file} cannot be read: {error.strerror}")


# -- from settings ---------------------------------------------------------------------------------

KINDS: dict[str, type] = {source.kind: source for source in (TinyText, FileText, HubText)}


def source_of(group: Mapping[str, Any], seed: int) -> TextSource:
    """The source that the `text` settings name.

    `path` alone if it is given, else `sources`, mixed by their weights.

    Raises:
        SettingError: an unknown kind or key, a weight not above 0, no source at all.
    """
    path = group.get("path")
    field = group.get("field") or "text"
    messages = group.get("messages")
    if path is not None:
        given = {"path": path, "field": field, "messages": messages}
        return _source("files", given, "text")
    if messages is not None or field != "text":
        key = "field" if messages is None else "messages"
        raise SettingError(
            f"text.{key} belongs to text.path=; a source's own column is text.sources.NAME.{key}="
        )
    parts: dict[str, Part] = {}
    for name, settings in (group.get("sources") or {}).items():
        parts[name] = _part(name, settings)
    if len(parts) == 1:
        (part,) = parts.values()
        return part.source
    return Mix(parts, seed)


def source_name(group: Mapping[str, Any]) -> str:
    """What the default store is named after: the file or folder, or the sources."""
    if group.get("path") is not None:
        return Path(str(group["path"])).stem
    return "+".join(sorted(group.get("sources") or {}))


def _part(name: str, settings: Any) -> Part:
    """The part of a mix that `text.sources.NAME` describes."""
    where = f"text.sources.{name}"
    if not isinstance(settings, Mapping):
        raise SettingError(
            f"{where}={settings!r} is no source; it needs kind= and that kind's settings"
        )
    given = dict(settings)
    kind = given.pop("kind", None)
    weight = given.pop("weight", 1)
    require_weight(name, weight)
    if kind not in KINDS:
        raise SettingError(f"{where}.kind={kind} is unknown; choose one of {', '.join(KINDS)}")
    return Part(weight, _source(kind, given, where))


def _source(kind: str, given: Mapping[str, Any], where: str) -> TextSource:
    """A source of `kind` from the settings `given`, checked against the fields of its class."""
    known: dict[str, Field[Any]] = {field.name: field for field in fields(KINDS[kind])}
    for name in given:
        if name not in known:
            allowed = ", ".join(["kind", "weight", *known])
            raise SettingError(
                f"{where}.{name} is no setting of a source of kind={kind}; it has {allowed}"
            )
    for name, field in known.items():
        value = given.get(name, field.default)
        if value is MISSING or (value is None and field.default is not None):
            raise SettingError(f"{where}.{name} is not set; a source of kind={kind} needs it")
        if value is not None and not isinstance(value, str | Path):
            raise SettingError(
                f"{where}.{name}={value!r} is no text; a source of kind={kind} needs it"
            )
    source: TextSource = KINDS[kind](**given)
    return source
