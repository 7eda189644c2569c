"""Texts that a user gives by hand: as they are typed, in a file, or as chats.

What's 3+4, {really}?                     a text, to the last sign
@notes.txt, @questions.jsonl              a text; a text or a chat a line (`text`, `messages`)
["a text", "another"]                     JSON: several texts
[{"role": "user", "content": "Hello"}]    JSON: a chat, in the model's own template
@@home                                    the text `@home`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from residual_saes.data.errors import DocumentError, SettingError
from residual_saes.data.text.chats import Chat, messages_of
from residual_saes.data.text.documents import Column, Content
from residual_saes.data.text.formats import FORMATS, format_of, read_files
from residual_saes.harvest.tokens import Tokenizer

MOST = 100  # texts at a time


def contents(setting: str, value: Any) -> list[Content]:
    """The texts and chats that `value` means; at least one.

    Args:
        setting: its name in messages.

    Raises:
        SettingError: it means none, or the file cannot be read.
    """
    if value is None or value == "":
        state = "missing" if value is None else "empty"
        example = f'{setting}="Tom has 7 apples"'
        raise SettingError(f"{setting}= is {state}; give a text, such as {example}, or @FILE")
    if not isinstance(value, str):
        return _of_json(setting, value) or [str(value)]
    if value.startswith("@@"):
        return [value[1:]]
    if value.startswith("@"):
        return _of_file(setting, Path(value[1:]))
    try:
        parsed = json.loads(value) if value.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        parsed = None
    return _of_json(setting, parsed) or [value]


def _of_json(setting: str, value: Any) -> list[Content]:
    """Texts and chats in a JSON value; none if it has another form."""
    items = [value] if _is_chat(value) else value
    if not isinstance(items, list) or not all(isinstance(x, str) or _is_chat(x) for x in items):
        return []
    found: list[Content] = []
    for number, item in enumerate(items, 1):
        is_text = isinstance(item, str)
        found.append(item if is_text else messages_of(item, f"{setting}= number {number}"))
    return found


def _is_chat(value: Any) -> bool:
    """Whether it is a list of messages: mappings that say who speaks."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in value)


def _of_file(setting: str, path: Path) -> list[Content]:
    if not path.is_file() or format_of(path.name) is None:
        state = "has another ending" if path.is_file() else "is no file"
        raise SettingError(
            f"{setting}=@{path}: {path} {state}; give a file that ends with {', '.join(FORMATS)}, "
            f"or {setting}=@@... for a text that begins with @"
        )
    read = _read(path, Column("messages", chat=True))
    first = read[0] if read else None
    has_chats = not isinstance(first, DocumentError) or first.kind != "no such column"
    if format_of(path.name) == ".txt" or not has_chats:
        read = _read(path, Column("text"))
    error = next((each for each in read if isinstance(each, DocumentError)), None)
    if error:
        raise SettingError(f"{setting}=@{path}: {error}")
    if not read or len(read) > MOST:
        holds = f"more than {MOST} texts" if read else "no text"
        raise SettingError(f"{setting}=@{path} holds {holds}; give 1 to {MOST}")
    return cast(list[Content], read)


def _read(path: Path, column: Column) -> list[Content | DocumentError]:
    """The first texts of a file, one more than `MOST` at most."""
    documents = read_files([str(path)], _open, column, None)
    return [document.content for document in islice(documents, MOST + 1)]


def _open(name: str) -> BinaryIO:
    return Path(name).open("rb")


def is_chat(content: Content) -> bool:
    """Whether a text is a chat."""
    return not isinstance(content, str)


def sequences(
    setting: str,
    texts: Sequence[Content],
    tokenizer: Tokenizer,
    most: int,
    *,
    reply: bool = False,
) -> list[list[int]]:
    """Token ids of each text, behind one BOS, as a store has documents.

    Args:
        setting: its name in messages.
        most: tokens of a text, with BOS.
        reply: chats end with the beginning of the model's turn.

    Raises:
        SettingError: a text is empty, or too long, or has no ids; or the model has no chats.
    """
    found = []
    for number, ids in enumerate(tokenizer.attempt(texts, reply=reply), 1):
        name = f"{setting}=" if len(texts) == 1 else f"{setting}= number {number}"
        if isinstance(ids, DocumentError):
            raise SettingError(f"{name} cannot be read: {ids}")
        if not ids:
            raise SettingError(f"{name} is empty: it gives no token; give some text")
        if len(ids) >= most:
            raise SettingError(
                f"{name} has {len(ids) + 1:,} tokens with BOS, and the context is {most:,}; "
                "shorten it, or split it into several"
            )
        found.append([tokenizer.bos, *ids])
    return found


def label(content: Content) -> str:
    """A text in a line: of a chat what its last message says."""
    messages = content.messages if isinstance(content, Chat) else content
    if isinstance(messages, str):
        return messages
    said = messages[-1].get("content", "")
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
