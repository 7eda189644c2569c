"""Documents: what a source of text gives, and how a table's rows become documents.

A document that cannot be stored is given as a `DocumentError` in the place of its content. So a
source never ends at one: `text.bad` decides behind it (harvest/encoder.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from residual_saes.data.errors import DocumentError
from residual_saes.data.text.chats import (
    VARIABLES,
    Chat,
    Message,
    characters_of,
    messages_of,
    strings,
    variables_of,
)

State = Any  # a JSON value: where a source goes on; None is its beginning
Content = str | list[Message] | Chat  # plain text, or a chat

_NAMED = 20  # columns of a row that a message lists, at most


class Document(NamedTuple):
    """One document of a source."""

    content: Content | DocumentError  # the error: why it has none
    after: State  # the state of the source behind this document
    where: str = "a document"  # its place in messages: file and row


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

    @property
    def read(self) -> list[str]:
        """Every column that decides a document: a chat's row has more than messages to tell."""
        return list(dict.fromkeys([self.name, *VARIABLES])) if self.chat else [self.name]

    def document(self, row: Any, where: str) -> Content:
        """The document in `row`, a mapping from column names to cells.

        Args:
            where: the row's place in messages.

        Raises:
            DocumentError: the row lacks the column, or the cell holds neither text nor messages.
        """
        if not isinstance(row, Mapping) or self.name not in row:
            have = _listed(row) if isinstance(row, Mapping) else type(row).__name__
            raise DocumentError(
                "no such column", f"{where} has no {self.setting}={self.name!r}; it has {have}"
            )
        cell = row[self.name]
        if cell is None:
            raise DocumentError("null", f"{where}: {self.name!r} is null")
        if not self.chat:
            return _text(cell, f"{where}: {self.name!r}")
        messages = messages_of(cell, f"{where}: {self.name!r}")
        beside = {name: row[name] for name in VARIABLES if name in row and name != self.name}
        variables = variables_of(beside, where)
        return Chat(messages, variables) if variables else messages


def _text(cell: Any, where: str) -> str:
    if isinstance(cell, str):
        return cell
    hint = "; a list of messages is named by messages=" if isinstance(cell, list) else ""
    raise DocumentError("not text", f"{where} holds {type(cell).__name__}, not text{hint}")


def _listed(row: Mapping[Any, Any]) -> str:
    names = [str(name)[:40] for name in list(row)[:_NAMED]]
    return ", ".join([*names, *(["..."] if len(row) > _NAMED else [])]) or "nothing"


def characters(content: Content | DocumentError) -> int:
    """Length of a document in characters; 0 where there is none."""
    if isinstance(content, DocumentError):
        return 0
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Chat):
        beside = sum(map(len, strings(content.variables)))
        return characters_of(content.messages) + beside
    return characters_of(content)
