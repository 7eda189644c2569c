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

import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from residual_saes.data import durable
from residual_saes.data.errors import DocumentError, PipelineError, SettingError, caused
from residual_saes.data.journal import tell
from residual_saes.data.text import folder
from residual_saes.data.text.documents import Column, Document, State, TextSource
from residual_saes.data.text.folder import Folder
from residual_saes.data.text.formats import COMPRESSIONS, FORMATS, format_of, read_files
from residual_saes.data.text.hub import HubText
from residual_saes.data.text.mix import Mix, Part, require_weight
from residual_saes.data.tiny import problems

_PLAIN = FORMATS[:-1]  # not .parquet, which is compressed inside


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
            yield Document(problems.document(problem), number, f"problem {number}")


@dataclass(frozen=True)
class FileText:
    """Local files in the order of their names.

    A .txt file is one document; the other formats give one a row. In a folder, files of other
    kinds are named in one line, and so is a .json file without the column.
    """

    kind: ClassVar[str] = "files"
    path: Path  # a file, or a folder that is searched for such files
    field: str = "text"  # column that holds the document
    messages: str | None = None  # column that holds a chat, in the place of `field`

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # settings give it as text
        if not self.path.exists():
            raise SettingError(f"text.path={self.path} does not exist")
        found = self._folder
        allowed = ", ".join(self._formats)
        if not found.files:
            held = f" ({found.summary})" if found.others else ""
            raise SettingError(
                f"text.path={self.path} holds no text{held}; allowed are {allowed} files, also "
                f"with {', '.join(COMPRESSIONS)}"
            )
        if found.others:
            tell(f"text: {len(found.files):,} files of {self.path} are read and {found.summary}")

    @property
    def chats(self) -> bool:
        return self.messages is not None

    @property
    def _formats(self) -> tuple[str, ...]:
        """What this reads: a .txt file has no messages."""
        return FORMATS[1:] if self.chats else FORMATS

    @cached_property
    def _folder(self) -> Folder:
        if self.path.is_dir():
            return folder.scan(self.path, self._fault)
        if format_of(self.path.name) in self._formats:
            return Folder([self.path], [])
        why = "it has no text.messages=" if self.chats else "another ending"
        return Folder([], [f"{self.path.name}: {why}"])

    def _fault(self, file: Path) -> str | None:
        """Why a file of a folder is not read; None if it is."""
        kind = format_of(file.name)
        if kind not in self._formats:
            return ""
        # Programs that compress a file may keep it.
        if file.suffix.lower() in COMPRESSIONS and file.with_suffix("").is_file():
            return "read uncompressed"
        # Data sets keep their descriptions in .json files.
        if kind == ".json":
            first = next(read_files([str(file)], _open, self._column, None), None)
            error = first.content if first else None
            if isinstance(error, DocumentError) and error.kind == "no such column":
                return f"no {self._column.setting}={self._column.name}"
        return None

    @property
    def _column(self) -> Column:
        return Column.chosen(self.field, self.messages, "text.")

    def identity(self) -> dict[str, Any]:
        root = self.path if self.path.is_dir() else self.path.parent
        digests: dict[str, str] = {}
        for file in self._folder.files:
            # A name that is not UTF-8 cannot stand in the manifest as it is.
            name = os.fsencode(file.relative_to(root)).decode("utf-8", "backslashreplace")
            try:
                digests[name] = durable.digest_file(file).xxh3_128
            except OSError as error:
                raise _unreadable(file, error) from error
        return {"kind": self.kind, **self._column.identity(), "files": digests}

    def documents(self, state: State) -> Iterator[Document]:
        return read_files([str(file) for file in self._folder.files], _open, self._column, state)


def _open(name: str) -> BinaryIO:
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(file: Path | str, error: OSError) -> PipelineError:
    got = f"{file} cannot be read: {error.strerror}"
    return caused(error, got, "mend its rights, or choose another text.path=")


def plain_bytes(source: TextSource) -> int | None:
    """Bytes of a source's files; None if they are not all on this machine, as plain text."""
    if isinstance(source, TinyText):
        return 0
    if isinstance(source, Mix):
        sizes = [plain_bytes(part.source) for part in source.parts.values()]
    elif isinstance(source, FileText):
        sizes = list(map(_plain_size, source._folder.files))
    else:
        return None
    return None if None in sizes else sum(size or 0 for size in sizes)


def _plain_size(file: Path) -> int | None:
    try:
        return file.stat().st_size if file.suffix.lower() in _PLAIN else None
    except OSError:  # whoever reads it says so
        return None


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
