"""Documents, and how they are read out of one file from any place in it.

A place is (row, byte): rows of the file already read, and for .jsonl the bytes that they take. It
is all that a restart needs: .jsonl goes on by a seek, .parquet at the row group that holds the row,
and a .txt is one document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

from data.errors import SettingError, StoreError

State = Any  # a JSON value: where a source goes on; None is its beginning
Content = str | list[dict[str, str]]  # plain text, or chat messages (role, content)
Place = tuple[int, int]  # rows read, bytes read

LINES = (".jsonl", ".json")
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a chat. Some templates make a token of the role (`<|ROLE|>`), so no other word is let through."""

_SHAREGPT = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_BATCH_ROWS = 1024  # decoded at a time: a row group may hold a million


class Document(NamedTuple):
    """One document of a source."""

    content: Content
    after: State  # the state of the source behind this document


class TextSource(Protocol):
    """Where text comes from: documents in a fixed order, endless or not.

    Sources never shuffle: rows are shuffled when they are written and when they are read, where it
    is exact.
    """

    def identity(self) -> dict[str, Any]:
        """What the manifest records of it, JSON: equal identities give equal documents."""
        ...

    def documents(self, state: State) -> Iterator[Document]:
        """The documents behind `state`; None is the beginning."""
        ...


@dataclass(frozen=True)
class Column:
    """The column of a table that holds the documents."""

    name: str
    chat: bool = False  # a list of messages in each row, not text
    setting: str = "field"  # how the user names it

    def of(self, row: Any, where: str) -> Content:
        """The document in a row, a mapping of column names.

        Raises:
            SettingError: the row has no such column, or something else than text or messages in it.
        """
        if not isinstance(row, Mapping) or self.name not in row:
            have = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise SettingError(f"{where} has no {self.setting}={self.name!r}; it has {have}")
        return self.content(row[self.name], where)

    def content(self, value: Any, where: str) -> Content:
        """The document that a cell of this column holds.

        Raises:
            SettingError: it holds something else than text or messages.
        """
        if value is None:
            raise SettingError(
                f"{where}: {self.name!r} is null; drop such rows first, or name another column with {self.setting}="
            )
        if self.chat:
            return _messages(value, f"{where}: {self.name!r}")
        if not isinstance(value, str):
            hint = "; a list of messages is named by messages=" if isinstance(value, list) else ""
            raise SettingError(
                f"{where}: {self.name!r} holds {type(value).__name__}, not text{hint}"
            )
        return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise SettingError(
            f"{where} holds {type(value).__name__}, not a list of messages; plain text is named by field="
        )
    return [_message(message, f"{where} message {number}") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    keys = (
        ("role", "content")
        if isinstance(message, dict) and "role" in message
        else ("from", "value")
    )
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
        raise SettingError(
            f"{where} must have text as role and content (or as from and value); drop such rows first"
        )
    role, content = (message[key] for key in keys)
    role = _SHAREGPT.get(role, role)
    if role not in ROLES:
        raise SettingError(
            f"{where} is by {role[:40]!r}; allowed are {', '.join((*ROLES, *_SHAREGPT))}"
        )
    return {"role": role, "content": content}


def characters(content: Content) -> int:
    """Length of a document in characters."""
    return (
        len(content)
        if isinstance(content, str)
        else sum(len(message["content"]) for message in content)
    )


def read_files(
    names: Sequence[str], opened: Callable[[str], BinaryIO], column: Column, state: State
) -> Iterator[Document]:
    """The documents of several files in order, behind a state [file, row, byte]; `opened` opens a
    file by its name.
    """
    first, *place = state or (0, 0, 0)
    for number, name in enumerate(names[first:], first):
        with closing(opened(name)) as file:
            for content, at in read(file, name, column, (place[0], place[1])):
                yield Document(content, [number, *at])
        place = [0, 0]


def read(
    file: BinaryIO, name: str, column: Column, place: Place
) -> Iterator[tuple[Content, Place]]:
    """The documents of a file behind `place`, each with the place behind it.

    Args:
        file: opened for reading, able to seek.
        name: what messages call the file; its ending tells the format.

    Raises:
        SettingError: not UTF-8, not JSON, no such column, or something else than text in it.
        StoreError: not a readable Parquet file.
    """
    if name.endswith(".parquet"):
        return _rows(file, name, column, place[0])
    return _lines(file, name, column, place) if name.endswith(LINES) else _whole(file, name, place)


def _whole(file: BinaryIO, name: str, place: Place) -> Iterator[tuple[Content, Place]]:
    if place[0] == 0:
        data = file.read()
        yield _decode(name, data), (1, len(data))


def _lines(
    file: BinaryIO, name: str, column: Column, place: Place
) -> Iterator[tuple[Content, Place]]:
    row, byte = place
    file.seek(byte)
    for line in file:
        row, byte = row + 1, byte + len(line)
        if line.strip():
            where = f"{name} line {row}"
            yield column.of(_json(where, line), where), (row, byte)


def _rows(file: BinaryIO, name: str, column: Column, row: int) -> Iterator[tuple[Content, Place]]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        # Without pre_buffer a group's column is one read, made in this thread, when it is needed.
        table = parquet.ParquetFile(file, pre_buffer=False)
        if column.name not in table.schema_arrow.names:
            column.of(dict.fromkeys(table.schema_arrow.names), name)
        first = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row < first + rows:
                at = first
                for batch in table.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=[column.name]
                ):
                    for value in batch.column(column.name)[max(0, row - at) :].to_pylist():
                        row += 1
                        yield column.content(value, f"{name} row {row}"), (row, 0)
                    at += batch.num_rows
            first += rows
    except (arrow.ArrowException, OSError) as error:
        raise StoreError(f"{name} is not a readable Parquet file: {error}") from error
    except UnicodeDecodeError as error:
        raise SettingError(
            f"{name} holds text behind row {row} that is not UTF-8; convert it first"
        ) from error


def _decode(where: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SettingError(
            f"{where} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error


def _json(where: str, line: bytes) -> Any:
    try:
        return json.loads(_decode(where, line))
    except json.JSONDecodeError as error:
        raise SettingError(f"{where} is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise SettingError(f"{where} is not JSON that can be read: too deeply nested") from error
