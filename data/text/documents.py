"""Documents, and how one file's documents are read from any position on.

A position is (rows, bytes): rows of the file already read and, for .jsonl, the bytes they take. A
restart needs nothing else. A .jsonl file goes on with a seek, a .parquet file at the row group that
holds the row, and a .txt file is one document.
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
Position = tuple[int, int]  # rows read, bytes read

LINES = (".jsonl", ".json")
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a chat. Some templates turn the role into a token (`<|ROLE|>`), so every other
word is refused."""

_SHAREGPT = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_BATCH_ROWS = 1024  # decoded at a time: a row group may hold a million


class Document(NamedTuple):
    """One document of a source."""

    content: Content
    after: State  # the state of the source behind this document


class TextSource(Protocol):
    """Where text comes from: documents in a fixed order, endless or not.

    A source never shuffles. Rows are shuffled when they are written and read, where shuffling is
    exact.
    """

    @property
    def chats(self) -> bool:
        """Whether some documents are chats: then the chat template decides their tokens."""
        ...

    def identity(self) -> dict[str, Any]:
        """The manifest's JSON entry for this source. Equal identities give equal documents."""
        ...

    def documents(self, state: State) -> Iterator[Document]:
        """The documents behind `state`; None is the beginning."""
        ...


@dataclass(frozen=True)
class Column:
    """The column of a table that holds the documents."""

    name: str
    chat: bool = False  # each row holds a list of messages instead of text
    setting: str = "field"  # the setting by which the user names this column

    @classmethod
    def chosen(cls, field: str, messages: str | None, prefix: str = "") -> Column:
        """The column that `messages` names, or `field` where `messages` is None."""
        if messages is None:
            return cls(field, chat=False, setting=f"{prefix}field")
        return cls(messages, chat=True, setting=f"{prefix}messages")

    def identity(self) -> dict[str, str]:
        """The manifest's entry for the column."""
        return {"messages" if self.chat else "field": self.name}

    def document(self, row: Any, where: str) -> Content:
        """The document in `row`, a mapping from column names to cells.

        Raises:
            SettingError: the row lacks the column, or the cell holds neither text nor messages.
        """
        if not isinstance(row, Mapping) or self.name not in row:
            have = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise SettingError(f"{where} has no {self.setting}={self.name!r}; it has {have}")
        return self.content(row[self.name], where)

    def content(self, cell: Any, where: str) -> Content:
        """The document in a cell of this column.

        Raises:
            SettingError: the cell holds neither text nor messages.
        """
        if cell is None:
            raise SettingError(
                f"{where}: {self.name!r} is null; drop such rows first, or name another column "
                f"with {self.setting}="
            )
        if self.chat:
            return _messages(cell, f"{where}: {self.name!r}")
        if not isinstance(cell, str):
            hint = "; a list of messages is named by messages=" if isinstance(cell, list) else ""
            raise SettingError(
                f"{where}: {self.name!r} holds {type(cell).__name__}, not text{hint}"
            )
        return cell


def _messages(cell: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(cell, list):
        raise SettingError(
            f"{where} holds {type(cell).__name__}, not a list of messages; plain text is named by "
            "field="
        )
    return [_message(message, f"{where} message {number}") for number, message in enumerate(cell)]


def _message(message: Any, where: str) -> dict[str, str]:
    """One message as {role, content}; ShareGPT's {from, value} is translated."""
    pair = message if isinstance(message, dict) else {}
    names = ("role", "content") if "role" in pair else ("from", "value")
    role, content = map(pair.get, names)
    if not isinstance(role, str) or not isinstance(content, str):
        raise SettingError(
            f"{where} must have text as role and content (or as from and value); drop such rows "
            "first"
        )
    role = _SHAREGPT.get(role, role)
    if role not in ROLES:
        allowed = ", ".join((*ROLES, *_SHAREGPT))
        raise SettingError(f"{where} is by {role[:40]!r}; allowed are {allowed}")
    return {"role": role, "content": content}


def characters(content: Content) -> int:
    """Length of a document in characters."""
    if isinstance(content, str):
        return len(content)
    return sum(len(message["content"]) for message in content)


# -- files -----------------------------------------------------------------------------------------


def read_files(
    names: Sequence[str], open_file: Callable[[str], BinaryIO], column: Column, state: State
) -> Iterator[Document]:
    """The documents of several files in order, behind `state` = [file, rows, bytes]."""
    first, rows, nbytes = state or (0, 0, 0)
    for number, name in enumerate(names[first:], first):
        start = (rows, nbytes) if number == first else (0, 0)
        with closing(open_file(name)) as file:
            for content, position in read(file, name, column, start):
                yield Document(content, [number, *position])


def read(
    file: BinaryIO, name: str, column: Column, start: Position
) -> Iterator[tuple[Content, Position]]:
    """The documents of a file behind `start`, each with the position behind it.

    Args:
        file: opened for reading, able to seek.
        name: the file's name in messages; its ending tells the format.

    Raises:
        SettingError: not UTF-8, not JSON, no such column, or neither text nor messages in it.
        StoreError: not a readable Parquet file.
    """
    if name.endswith(".parquet"):
        return _parquet(file, name, column, start[0])
    if name.endswith(LINES):
        return _lines(file, name, column, start)
    return _whole(file, name, start)


def _whole(file: BinaryIO, name: str, start: Position) -> Iterator[tuple[Content, Position]]:
    if start[0] == 0:
        data = file.read()
        yield _decode(name, data), (1, len(data))


def _lines(
    file: BinaryIO, name: str, column: Column, start: Position
) -> Iterator[tuple[Content, Position]]:
    row, byte = start
    file.seek(byte)
    for line in file:
        row += 1
        byte += len(line)
        if line.strip():
            where = f"{name} line {row}"
            yield column.document(_json(where, line), where), (row, byte)


def _parquet(
    file: BinaryIO, name: str, column: Column, start: int
) -> Iterator[tuple[Content, Position]]:
    """The documents behind row `start`; row groups that end before it are not read."""
    import pyarrow as arrow
    from pyarrow import parquet

    row = start  # rows read: what the messages below name
    try:
        # Without pre_buffer, this thread reads a group's column in one request when it is needed.
        table = parquet.ParquetFile(file, pre_buffer=False)
        if column.name not in table.schema_arrow.names:
            column.document(dict.fromkeys(table.schema_arrow.names), name)  # raises
        group_start = 0
        for group in range(table.num_row_groups):
            group_rows = table.metadata.row_group(group).num_rows
            if row < group_start + group_rows:
                batch_start = group_start
                for batch in table.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=[column.name]
                ):
                    unread = batch.column(column.name)[max(0, row - batch_start) :]
                    for cell in unread.to_pylist():
                        row += 1
                        yield column.content(cell, f"{name} row {row}"), (row, 0)
                    batch_start += batch.num_rows
            group_start += group_rows
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
