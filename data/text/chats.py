"""Chats: messages as plain JSON values, and what else their row gives to the chat template.

Every field of a message reaches the template: `tool_calls`, `reasoning_content`, `name`,
`tool_call_id` and whatever else is there. Fields that are null are as if absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from residual_saes.data.errors import DocumentError

ROLES = (
    *("system", "developer", "user", "assistant", "tool"),
    *("function", "ipython", "observation", "environment"),
)
"""Who may speak in a chat: the last four give a tool's results to some templates. Some templates
turn the role into a token (`<|ROLE|>`), so every other word is refused."""

VARIABLES = ("tools", "documents", "chat_template_kwargs")
"""Columns beside the messages that reach the template."""

_SHAREGPT = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_SPEAKERS = ("system", "developer", "user", "human")  # who must say something
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of a content's parts that are text
_DEPTH = 64  # of lists and mappings in each other: templates recurse, and Python stops at 1,000

Message = dict[str, Any]  # {role, content, ...}; content is text or a list of text parts


@dataclass(frozen=True)
class Chat:
    """Messages whose row gives the template more than themselves."""

    messages: list[Message]
    variables: dict[str, Any]  # of the template: tools, documents, and others by their names


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, the keys of mappings among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value in which `change` was applied to every text that `strings` gives."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): with_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_strings(inner, change) for inner in value]
    return value


def characters_of(messages: list[Message]) -> int:
    """Characters of everything that the messages say, without the names of their fields."""
    said = 0
    for message in messages:
        for name, value in message.items():
            if name != "role":
                said += sum(map(len, strings(value)))
    return said


# -- from a row ------------------------------------------------------------------------------------


def messages_of(cell: Any, where: str) -> list[Message]:
    """The messages in a cell, as {role, content, ...}; ShareGPT's {from, value} is translated.

    The cell may be JSON in text.

    Raises:
        DocumentError: the cell holds no chat.
    """
    cell = _parsed(cell)
    if not isinstance(cell, list):
        raise DocumentError(
            "not a chat",
            f"{where} holds {type(cell).__name__}, not a list of messages; plain text is named by "
            "field=",
        )
    return [_message(message, f"{where} message {number}") for number, message in enumerate(cell)]


def variables_of(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row gives to the template beside its messages.

    These are `tools` (a list of JSON schemas), `documents` (where it is a list of mappings, as
    templates read it) and the entries of `chat_template_kwargs`. `tools` and
    `chat_template_kwargs` may be JSON in text.

    Raises:
        DocumentError: `tools` or `chat_template_kwargs` is something else.
    """
    variables: dict[str, Any] = {}
    if given := _parsed(row.get("chat_template_kwargs")):
        if not isinstance(given, dict):
            raise DocumentError("not a chat", f"{where}: chat_template_kwargs is no mapping")
        variables |= plain(given, where)
    if tools := _parsed(row.get("tools")):
        if not _are_mappings(tools):
            raise DocumentError("not a chat", f"{where}: tools is no list of JSON schemas")
        variables["tools"] = plain(tools, where)
    documents = row.get("documents")
    if documents and _are_mappings(documents):
        variables["documents"] = plain(documents, where)
    return variables


def _parsed(cell: Any) -> Any:
    """A cell that may be JSON in text; text that is no JSON is given back as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell) if cell.strip() else None
    except (ValueError, RecursionError):
        return cell


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(inner, dict) for inner in value)


def _message(message: Any, where: str) -> Message:
    fields: Message = {}
    for name, value in message.items() if isinstance(message, dict) else ():
        if value is not None:
            fields[name] = value
    names = ("role", "content") if "role" in fields else ("from", "value")
    role, content = (fields.pop(name, None) for name in names)
    # OpenAI's form has no content beside a call; Gemma 4's has none beside `tool_responses`.
    silent = content is None and role not in _SPEAKERS and any(fields.values())
    if isinstance(content, list):
        content = [_part(part, where) for part in content]
    if not isinstance(role, str) or not (silent or isinstance(content, str | list)):
        raise DocumentError(
            "not a chat",
            f"{where} must have text as role and content (or as from and value)",
        )
    role = _SHAREGPT.get(role, role)
    if role not in ROLES:
        allowed = ", ".join((*ROLES, *_SHAREGPT))
        raise DocumentError("not a chat", f"{where} is by {role[:40]!r}; allowed are {allowed}")
    said = {} if silent else {"content": content}
    return {**plain(fields, where), "role": role, **said}


def _part(part: Any, where: str) -> dict[str, str]:
    """A part of a message's content as {type: text, text}."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    given = part if isinstance(part, dict) else {}
    kind = given.get("type") or "text"
    text = given.get("text")
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise DocumentError(
            "not a chat", f"{where} has a part of type {str(kind)[:40]!r}; only text can be read"
        )
    return {"type": "text", "text": text}


def plain(value: Any, where: str, depth: int = _DEPTH) -> Any:
    """A cell's value in the types of JSON: dates and long numbers become text, bytes go.

    Raises:
        DocumentError: it is nested deeper than `depth`.
    """
    if depth == 0:
        raise DocumentError("nested too deep", f"{where} nests more than {_DEPTH} levels")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner, where, depth - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, where, depth - 1) for inner in value]
    return None if isinstance(value, bytes) else str(value)
