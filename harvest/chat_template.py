"""Chats as a model's template renders them, with its special tokens told from the messages' text.

A message that spells a special token (`<bos>`) must stay text. So characters that could become
part of a special token are replaced by private characters while the template runs. Special tokens
in the rendered text are then the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from data import durable
from data.errors import SettingError, first_line

Chat = Sequence[dict[str, str]]  # messages (role, content)

# Templates that print today's date (Llama 3's) get this one, their own default: a store must not
# depend on the day.
_TODAY = {
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
    "%a": "Fri",
}
_CALENDAR = (
    "{% macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{field}', '{value}')" for field, value in _TODAY.items())
    + " }}{%- endmacro +%}"
)
_PRIVATE = 0xF0000  # first code point of the two private planes


class Spellings:
    """The spellings of special tokens, and where a text contains them."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        """Take the token id of each spelling."""
        self.ids = dict(ids)
        self._lengths = sorted({len(spelling) for spelling in ids}, reverse=True)
        first_letters = sorted({re.escape(spelling[0]) for spelling in ids})
        self._first_letter = re.compile("|".join(first_letters) or "(?!)")
        self._beginnings: set[str] = set()
        self._ends: set[str] = set()
        for spelling in ids:
            for cut in range(1, len(spelling)):
                self._beginnings.add(spelling[:cut])
                self._ends.add(spelling[cut:])

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of each special token: leftmost, then longest, as tokenizers match."""
        stop = 0
        for match in self._first_letter.finditer(text):
            start = match.start()
            if start < stop:
                continue
            for length in self._lengths:
                if text[start : start + length] in self.ids:
                    stop = min(start + length, len(text))
                    yield start, stop
                    break

    def split(self, text: str) -> list[str]:
        """The text in parts: text, special token, text, ..., text."""
        parts: list[str] = []
        behind = 0
        for start, stop in self.find(text):
            parts += [text[behind:start], text[start:stop]]
            behind = stop
        return [*parts, text[behind:]]

    def suspects(self, text: str) -> set[int]:
        """Indices of characters that could become part of a special token in a template.

        These are whole special tokens, a token's end where the text starts, and a token's start
        where the text ends. Templates trim white space, so the ends are those of the trimmed text.
        """
        indices: set[int] = set()
        for start, stop in self.find(text):
            indices.update(range(start, stop))
        first = len(text) - len(text.lstrip())
        last = len(text.rstrip())
        longest = min(self._lengths[0] if self._lengths else 0, last - first)
        for length in range(longest, 0, -1):
            if text[first : first + length] in self._ends:
                indices.update(range(first, first + length))
                break
        for length in range(longest, 0, -1):
            if text[last - length : last] in self._beginnings:
                indices.update(range(last - length, last))
                break
        return indices


class ChatTemplate:
    """A model's chat template."""

    def __init__(self, inner: Any, folder: Path, spellings: Spellings) -> None:
        """Take transformers' tokenizer, its folder for messages, and its special tokens."""
        self._inner = inner
        self._folder = folder
        self._spellings = spellings

    @cached_property
    def text(self) -> str:
        """The template.

        Raises:
            SettingError: the model has none.
        """
        try:
            return str(self._inner.get_chat_template())
        except ValueError as error:
            raise SettingError(
                f"messages= names chats, and {self._folder} has no chat template; take the "
                "instruction-tuned model (Gemma's end in -it), or name a column of plain text with "
                "field="
            ) from error

    @cached_property
    def digest(self) -> str:
        """Digest of the template, which decides a chat's tokens beside the tokenizer's digest."""
        return durable.digest(self.text.encode())

    def parts(self, chat: Chat, *, reply: bool) -> list[str]:
        """A chat as rendered: text, special token, text, ..., text.

        Args:
            reply: end with the beginning of the model's turn.

        Raises:
            SettingError: the template refuses the chat.
        """
        masked, unmask = self._masked(chat)
        rendered = self._render(masked, reply) if chat else ""
        parts = self._spellings.split(rendered)
        parts[0::2] = [text.translate(unmask) for text in parts[0::2]]
        return parts

    def _masked(self, chat: Chat) -> tuple[list[dict[str, str]], dict[int, str]]:
        """The chat with suspects replaced by private characters, and the table that undoes it."""
        used = set(chain.from_iterable(message["content"] for message in chat))
        suspects = [self._spellings.suspects(message["content"]) for message in chat]
        letters: set[str] = set()
        for message, indices in zip(chat, suspects, strict=True):
            letters.update(message["content"][index] for index in indices)
        unused = (chr(code) for code in count(_PRIVATE) if chr(code) not in used)
        mask = dict(zip(sorted(letters), unused, strict=False))
        masked: list[dict[str, str]] = []
        for message, indices in zip(chat, suspects, strict=True):
            content = list(message["content"])
            for index in indices:
                content[index] = mask[content[index]]
            masked.append({**message, "content": "".join(content)})
        return masked, {ord(hidden): letter for letter, hidden in mask.items()}

    def _render(self, chat: Chat, reply: bool) -> str:
        from jinja2 import TemplateError

        dated = "strftime_now" in self.text
        template = _CALENDAR + self.text if dated else self.text
        try:
            rendered = self._inner.apply_chat_template(
                list(chat), chat_template=template, tokenize=False, add_generation_prompt=reply
            )
            return str(rendered)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            begins = next((message["content"][:60] for message in chat), "")
            raise SettingError(
                f"the chat template of {self._folder} refuses the chat that begins {begins!r}: "
                f"{first_line(error)}; drop such chats first, or name a column of plain text with "
                "field="
            ) from error
