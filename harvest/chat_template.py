"""Chats as a model's template renders them, with its special tokens told from the messages' text.

A message that spells a special token (`<bos>`) must stay text, in every field at any depth. So
characters that could become part of a special token are replaced by characters that the chat does
not use while the template runs. Special tokens in the rendered text are then the template's own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.data import durable
from residual_saes.data.errors import DocumentError, SettingError, first_line
from residual_saes.data.text.chats import Chat, Message, strings, with_strings
from residual_saes.harvest.bounded_template import bounded, install

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
# Where characters that stand for others are taken from: Yi syllables, which have no case, and which
# Python prints as they are where a template prints a list.
_STAND_INS = 0xA000
_PROBE = "abcdefgh"  # a content that shows which form a template reads
# The tokens that start and end a turn, by model family, and the template that their published
# templates agree on. Base models (google/gemma-4-E4B) have the tokens and no template.
_TURN_TOKENS = {
    "Gemma 4": ("<|turn>", "<turn|>"),
    "Gemma 2 and 3": ("<start_of_turn>", "<end_of_turn>"),
}
_TURNS = """\
{%- for message in messages -%}
{%- if message.role not in ('user', 'assistant') or message|length > 2 or tools or documents -%}
{{ raise_exception('the built-in turns have user and assistant, with a content each') }}
{%- endif -%}
{{ 'START' + ('user' if message.role == 'user' else 'model') + '\\n' + message.content + 'END\\n' }}
{%- endfor -%}
{{ 'STARTmodel\\n' if add_generation_prompt }}"""


class Turns(NamedTuple):
    """How prompts are put in turns."""

    name: str  # as results say it
    template: str
    built_in: bool  # not the tokenizer's own
    # The token that ends a built-in turn, as a base model's settings do not say; None: its own do.
    end: int | None = None

    @property
    def digest(self) -> str:
        return durable.digest(self.template.encode())


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
        """Digest of the template, which decides a chat's tokens beside the tokenizer's digest.

        Of a model's several templates it is of the default alone, as stores of before have it.
        """
        return durable.digest(self.text.encode())

    @cached_property
    def turns(self) -> Turns:
        """The format of prompts: the tokenizer's template, else the built-in one of its tokens.

        Raises:
            SettingError: there is neither.
        """
        if self._inner.chat_template:
            return Turns("the tokenizer's chat template", self.text, False)
        for family, (start, end) in _TURN_TOKENS.items():
            if {start, end} <= self._spellings.ids.keys():
                template = _TURNS.replace("START", start).replace("END", end)
                end_id = self._spellings.ids[end]
                return Turns(f"the built-in turns of {family}", template, True, end_id)
        raise SettingError(
            f"{self._folder} has no chat template, and its tokenizer no turns that are known here "
            f"({', '.join(start for start, _ in _TURN_TOKENS.values())}); give prompts as plain "
            "text (answers.prompt=lm_eval), or take the instruction-tuned model"
        )

    def parts(self, chat: list[Message] | Chat, *, reply: bool) -> list[str]:
        """A chat as rendered: text, special token, text, ..., text.

        Args:
            reply: it is a prompt: end with the beginning of the model's turn. See `turns`.

        Raises:
            DocumentError: the template refuses the chat.
            SettingError: there is no template.
        """
        whole = chat if isinstance(chat, Chat) else Chat(chat, {})
        if not whole.messages:
            return [""]
        masked, unmask = self._masked(self._fitted(whole))
        try:
            rendered = self._render(masked, reply)
        except Exception as error:  # whatever an expression of a template raises
            raise self._refusal(whole, error) from error
        parts = self._spellings.split(rendered)
        parts[0::2] = [text.translate(unmask) for text in parts[0::2]]
        return parts

    # -- contents in parts -------------------------------------------------------------------------

    def _fitted(self, chat: Chat) -> Chat:
        """The chat with its contents as text, or as text parts if the template reads nothing else.

        Text comes first, since many templates read parts from users alone: of a system message in
        parts Gemma 4's prints the Python list.
        """
        messages: list[Message] = []
        for message in chat.messages:
            content = message.get("content")
            if isinstance(content, list) and not self._reads_parts_alone:
                text = "".join(part["text"] for part in content)
                message = {**message, "content": text}
            elif isinstance(content, str) and self._reads_parts_alone:
                message = {**message, "content": [{"type": "text", "text": content}]}
            messages.append(message)
        return Chat(messages, chat.variables)

    @cached_property
    def _reads_parts_alone(self) -> bool:
        parts = [{"type": "text", "text": _PROBE}]
        return self._prints(parts) and not self._prints(_PROBE)

    def _prints(self, content: str | list[dict[str, str]]) -> bool:
        """Whether the template prints the probe in a user's content."""
        try:
            rendered = self._render(Chat([{"role": "user", "content": content}], {}), reply=False)
        except Exception:  # as in `parts`: the template does not read this form
            return False
        # A template for text prints a list as Python or JSON, so with quotation marks.
        return bool(re.search(rf"(?<!['\"]){_PROBE}(?!['\"])", rendered))

    # -- rendering ---------------------------------------------------------------------------------

    def _masked(self, chat: Chat) -> tuple[Chat, dict[int, str]]:
        """The chat with suspects replaced by stand-ins, and the table that undoes it."""
        used: set[str] = set()
        letters: set[str] = set()
        suspects: dict[str, set[int]] = {}
        for text in strings({"messages": chat.messages, "variables": chat.variables}):
            if text not in suspects:
                used.update(text)
                suspects[text] = self._spellings.suspects(text)
                letters.update(text[index] for index in suspects[text])
        unused = (chr(code) for code in count(_STAND_INS) if chr(code) not in used)
        mask = dict(zip(sorted(letters), unused, strict=False))

        def masked(text: str) -> str:
            if not suspects[text]:
                return text
            characters = list(text)
            for index in suspects[text]:
                characters[index] = mask[characters[index]]
            return "".join(characters)

        messages: list[Message] = []
        for message in chat.messages:
            # Roles are of a closed list, and templates compare them.
            messages.append({**with_strings(message, masked), "role": message["role"]})
        hidden = Chat(messages, with_strings(chat.variables, masked))
        return hidden, {ord(stand_in): letter for letter, stand_in in mask.items()}

    def _render(self, chat: Chat, reply: bool) -> str:
        """What the template makes of a chat; raises whatever the template raises."""
        if reserved := self._reserved & chat.variables.keys():
            raise ValueError(f"chat_template_kwargs has {min(reserved)}, which is no variable")
        tools = chat.variables.get("tools")
        text = self.turns.template if reply else self.text
        if tools is not None and not (reply and self.turns.built_in):
            text = str(self._inner.get_chat_template(tools=tools))
        install()
        texts = [*strings({"messages": chat.messages, "variables": chat.variables})]
        with bounded(texts):
            rendered = self._inner.apply_chat_template(
                chat.messages,
                chat_template=_CALENDAR + text if "strftime_now" in text else text,
                tokenize=False,
                add_generation_prompt=reply,
                **chat.variables,
            )
        return str(rendered)

    def _refusal(self, chat: Chat, error: Exception) -> SettingError:
        from jinja2 import TemplateSyntaxError

        if isinstance(error, SettingError):
            return error  # there is no template
        if isinstance(error, TemplateSyntaxError):
            return SettingError(
                f"the chat template of {self._folder} cannot be read: {first_line(error)}; "
                "download it again, or name a column of plain text with field="
            )
        contents = [message["content"] for message in chat.messages if message.get("content")]
        begins = contents[0] if contents and isinstance(contents[0], str) else str(contents[:1])
        return DocumentError(
            "refused by the chat template",
            f"the chat template of {self._folder} refuses the chat that begins {begins[:60]!r}: "
            f"{first_line(error)}",
        )

    @cached_property
    def _reserved(self) -> set[str]:
        """Names that mean something to transformers: a row must not set them."""
        names = inspect.signature(self._inner.apply_chat_template).parameters
        return {*names, "messages"} - {"tools", "documents"}
