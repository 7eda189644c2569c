"""Documents into token ids, with a model's own tokenizer and chat template, and without the model.

What a document says never becomes a special token: text that spells one (`<bos>`) stays text. In a
chat only the template puts special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from data import durable
from data.errors import SettingError, first_line
from data.text.documents import Content

# Templates that name today's date (Llama 3's) get this one, their own default: the store must not
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


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer in a model's folder. Another process gets it without transformers, whose import
    takes seconds.
    """

    folder: Path
    bos: int  # the token that starts each piece
    digest: str  # of everything that decides which ids a text gets
    backend: Any = field(repr=False)  # of the package tokenizers
    stand_in: bool = False  # whether `bos` is an EOS, for want of a BOS

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder.

        Raises:
            SettingError: there is none, or it has no fast form, or no token to start pieces with.
        """
        inner = load_tokenizer(folder)
        digest = tokenizer_digest(inner)
        # Models whose tokenizer has no BOS (Qwen) put their end-of-text token before a document.
        bos = inner.bos_token_id if inner.bos_token_id is not None else inner.eos_token_id
        if bos is None:
            raise SettingError(
                f"the tokenizer of {folder} has neither a BOS nor an EOS token to start pieces with"
            )
        inner.backend_tokenizer.no_truncation()
        inner.backend_tokenizer.no_padding()
        return cls(folder, bos, digest, inner.backend_tokenizer, inner.bos_token_id is None)

    def __reduce__(self) -> tuple[Any, tuple[Path, int, str, str, bool]]:
        return _revived, (self.folder, self.bos, self.digest, self.backend.to_str(), self.stand_in)

    @cached_property
    def inner(self) -> Any:
        """transformers' tokenizer, which knows the chat template."""
        return load_tokenizer(self.folder)

    @cached_property
    def template_digest(self) -> str:
        """Digest of the chat template, which decides a chat's ids beside `digest`.

        Raises:
            SettingError: the model has none.
        """
        return durable.digest(self._template.encode())

    @cached_property
    def _template(self) -> str:
        try:
            return str(self.inner.get_chat_template())
        except ValueError as error:
            raise SettingError(
                f"messages= names chats, and {self.folder} has no chat template; take the instruction-tuned model "
                "(Gemma's end in -it), or name a column of plain text with field="
            ) from error

    def encode(self, contents: list[Content], *, reply: bool = False) -> list[list[int]]:
        """Token ids of documents, without BOS.

        Args:
            reply: chats end with the beginning of the model's turn.

        Raises:
            SettingError: a chat, and the model has no chat template, or one that refuses it.
        """
        texts = [content for content in contents if isinstance(content, str)]
        chats = [content for content in contents if not isinstance(content, str)]
        plain, rendered = (
            iter(self._text_ids(texts)),
            iter(self._chat_ids(chats, reply) if chats else []),
        )
        found = [next(plain if isinstance(content, str) else rendered) for content in contents]
        assert not any(self._own_bos in ids for ids in found), "a document must not encode to BOS"
        return found

    # -- text --------------------------------------------------------------------------------------

    def _text_ids(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of each text; what spells a special token becomes one only if `special`."""
        self.backend.encode_special_tokens = not special
        return [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    @cached_property
    def _own_bos(self) -> int | None:
        """BOS, unless it is an EOS that stands in for it: a template ends turns with that."""
        return None if self.stand_in else self.bos

    # -- chats -------------------------------------------------------------------------------------

    @cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens by their spelling. Added tokens that are not special (`<think>` of Qwen)
        are words.
        """
        added = self.backend.get_added_tokens_decoder()
        return {
            token.content: number
            for number, token in added.items()
            if token.special and token.content
        }

    @cached_property
    def _beginnings(self) -> re.Pattern[str]:
        return re.compile(
            "|".join(sorted({re.escape(spelling[0]) for spelling in self._special})) or "(?!)"
        )

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(spelling) for spelling in self._special}, reverse=True)

    @cached_property
    def _partial(self) -> tuple[set[str], set[str]]:
        """Beginnings and ends of special tokens' spellings."""
        inner = [
            (spelling[:at], spelling[at:])
            for spelling in self._special
            for at in range(1, len(spelling))
        ]
        return {beginning for beginning, _ in inner}, {end for _, end in inner}

    def _spelled(self, text: str) -> Iterator[tuple[int, int]]:
        """Where `text` spells special tokens: (start, stop), the leftmost and the longest, as
        tokenizers match them.
        """
        behind = 0
        for found in self._beginnings.finditer(text):
            at = found.start()
            if at < behind:
                continue
            for length in self._lengths:
                if (spelling := text[at : at + length]) in self._special:
                    behind = at + len(spelling)
                    yield at, behind
                    break

    def _suspect(self, text: str) -> set[int]:
        """Places in a message that could become part of a special token: whole spellings, and
        halves at its ends.

        Templates trim, so ends are those of the text without the white space around it.
        """
        found = {at for start, stop in self._spelled(text) for at in range(start, stop)}
        beginnings, ends = self._partial
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        longest = range(min(self._lengths[0] if self._lengths else 0, last - first), 0, -1)
        head = next((n for n in longest if text[first : first + n] in ends), 0)
        tail = next((n for n in longest if text[last - n : last] in beginnings), 0)
        return found | set(range(first, first + head)) | set(range(last - tail, last))

    def _chat_ids(self, chats: Sequence[Sequence[dict[str, str]]], reply: bool) -> list[list[int]]:
        """Ids of chats as the template renders them, without BOS.

        What a message says is masked with private characters while the template runs, so that
        special tokens in the rendered text are the template's. If the whole text, unmasked, encodes
        to just these, that is the encoding; else its parts between them are encoded one by one, as
        text.
        """
        pieces, wholes = [], []
        for chat in chats:
            parts = self._rendered(chat, reply)
            pieces.append(parts)
            wholes.append("".join(parts))
        special = set(self._special.values())
        encoded = self._text_ids(wholes, special=True)
        for number, (parts, ids) in enumerate(zip(pieces, encoded, strict=True)):
            expected = [self._special[part] for part in parts[1::2]]
            if [token for token in ids if token in special] != expected:
                between = self._text_ids(parts[0::2])
                tokens = ([[token] for token in expected] + [[]]) if parts else []
                encoded[number] = list(
                    chain.from_iterable(a + b for a, b in zip(between, tokens, strict=True))
                )
        return [self._without_bos(ids) for ids in encoded]

    def _without_bos(self, ids: list[int]) -> list[int]:
        if ids and ids[0] == self.bos:
            ids = ids[1:]
        return [token for token in ids if token != self._own_bos]

    def _rendered(self, chat: Sequence[dict[str, str]], reply: bool) -> list[str]:
        """The rendered text in parts: text, special token, text, ..., text."""
        used = set(chain.from_iterable(message["content"] for message in chat))
        suspects = [self._suspect(message["content"]) for message in chat]
        letters = {
            message["content"][at]
            for message, places in zip(chat, suspects, strict=True)
            for at in places
        }
        free = (chr(code) for code in count(_PRIVATE) if chr(code) not in used)
        mask = dict(zip(sorted(letters), free, strict=False))
        masked = [
            {
                **message,
                "content": "".join(
                    mask[c] if at in places else c for at, c in enumerate(message["content"])
                ),
            }
            if places
            else message
            for message, places in zip(chat, suspects, strict=True)
        ]
        text = self._render(masked, reply) if chat else ""
        unmask = str.maketrans({hidden: letter for letter, hidden in mask.items()})
        parts, behind = [], 0
        for start, stop in self._spelled(text):
            parts += [text[behind:start].translate(unmask), text[start:stop]]
            behind = stop
        return [*parts, text[behind:].translate(unmask)]

    def _render(self, chat: Sequence[dict[str, str]], reply: bool) -> str:
        from jinja2 import TemplateError

        template = (
            self._template if "strftime_now" not in self._template else _CALENDAR + self._template
        )
        try:
            rendered = self.inner.apply_chat_template(
                list(chat), chat_template=template, tokenize=False, add_generation_prompt=reply
            )
            return str(rendered)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            begins = next((message["content"][:60] for message in chat), "")
            raise SettingError(
                f"the chat template of {self.folder} refuses the chat that begins {begins!r}: {first_line(error)}; "
                "drop such chats first, or name a column of plain text with field="
            ) from error


def _revived(folder: Path, bos: int, digest: str, backend: str, stand_in: bool) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(folder, bos, digest, Backend.from_str(backend), stand_in)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        SettingError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(f"{folder} has no loadable tokenizer: {first_line(error)}") from error


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that decides which ids a text gets.

    Raises:
        SettingError: it is a tokenizer in Python, which has no one description to digest.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise SettingError(
            f"{type(tokenizer).__name__} has no fast form (tokenizer.json); convert it with transformers"
        )
    return durable.digest(tokenizer.backend_tokenizer.to_str().encode())
