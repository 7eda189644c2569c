"""Documents into token ids, with a model's own tokenizer and chat template, without the model.

A document never makes special tokens: text that spells one (`<bos>`) stays text. In a chat only the
template makes special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data import durable
from data.errors import SettingError, first_line
from data.text.documents import Content
from harvest.chat_template import Chat, ChatTemplate, Spellings


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer in a model's folder.

    It unpickles without transformers, whose import takes seconds.
    """

    folder: Path
    bos: int  # the token that starts each piece
    digest: str  # of everything that decides the ids of a text
    backend: Any = field(repr=False)  # of the package tokenizers
    stand_in: bool = False  # whether `bos` is an EOS, where there is no BOS

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder.

        Raises:
            SettingError: there is none, or it has no fast form, or no token to start pieces with.
        """
        inner = load_tokenizer(folder)
        if not hasattr(inner, "backend_tokenizer"):
            raise SettingError(
                f"{type(inner).__name__} has no fast form (tokenizer.json); convert it with "
                "transformers"
            )
        backend = inner.backend_tokenizer
        digest = durable.digest(backend.to_str().encode())
        # Models whose tokenizer has no BOS (Qwen) put their end-of-text token before a document.
        bos = inner.bos_token_id if inner.bos_token_id is not None else inner.eos_token_id
        if bos is None:
            raise SettingError(
                f"the tokenizer of {folder} has neither a BOS nor an EOS token to start pieces with"
            )
        backend.no_truncation()
        backend.no_padding()
        return cls(folder, bos, digest, backend, stand_in=inner.bos_token_id is None)

    def __reduce__(self) -> tuple[Any, tuple[Path, int, str, str, bool]]:
        return _unpickled, (
            self.folder,
            self.bos,
            self.digest,
            self.backend.to_str(),
            self.stand_in,
        )

    @cached_property
    def inner(self) -> Any:
        """transformers' tokenizer, which knows the chat template."""
        return load_tokenizer(self.folder)

    @property
    def template_digest(self) -> str:
        """Digest of the chat template, which decides a chat's ids beside `digest`.

        Raises:
            SettingError: the model has no chat template.
        """
        return self._template.digest

    def encode(self, contents: list[Content], *, reply: bool = False) -> list[list[int]]:
        """Token ids of documents, without BOS.

        Args:
            reply: chats end with the beginning of the model's turn.

        Raises:
            SettingError: a chat, and the model has no chat template, or one that refuses it.
        """
        texts = [content for content in contents if isinstance(content, str)]
        chats = [content for content in contents if not isinstance(content, str)]
        text_ids = iter(self._text_ids(texts))
        chat_ids = iter(self._chat_ids(chats, reply) if chats else [])
        encoded: list[list[int]] = []
        for content in contents:
            ids = next(text_ids if isinstance(content, str) else chat_ids)
            assert self._own_bos not in ids, "a document must not encode to BOS"
            encoded.append(ids)
        return encoded

    # -- text --------------------------------------------------------------------------------------

    def _text_ids(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of each text; a spelled special token becomes one only if `special`."""
        self.backend.encode_special_tokens = not special
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    # -- chats -------------------------------------------------------------------------------------

    @cached_property
    def _spellings(self) -> Spellings:
        """Special tokens by their spelling; added tokens such as Qwen's `<think>` are words."""
        added = self.backend.get_added_tokens_decoder()
        ids: dict[str, int] = {}
        for number, token in added.items():
            if token.special and token.content:
                ids[token.content] = number
        return Spellings(ids)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.inner, self.folder, self._spellings)

    @property
    def _own_bos(self) -> int | None:
        """BOS; None if an EOS stands in for it, because templates end turns with EOS."""
        return None if self.stand_in else self.bos

    def _chat_ids(self, chats: Sequence[Chat], reply: bool) -> list[list[int]]:
        """Ids of chats as the template renders them, without BOS.

        The whole rendered text is encoded at once. If that gives a special token which is not the
        template's, the parts between the template's are encoded one by one, as text.
        """
        rendered = [self._template.parts(chat, reply=reply) for chat in chats]
        wholes = ["".join(parts) for parts in rendered]
        special = set(self._spellings.ids.values())
        encoded: list[list[int]] = []
        for parts, ids in zip(rendered, self._text_ids(wholes, special=True), strict=True):
            expected = [self._spellings.ids[part] for part in parts[1::2]]
            if [token for token in ids if token in special] != expected:
                ids = self._joined(parts[0::2], expected)
            encoded.append(self._without_bos(ids))
        return encoded

    def _joined(self, texts: Sequence[str], between: Sequence[int]) -> list[int]:
        """Ids of `texts`, each encoded as text, with the special tokens `between` them."""
        first, *others = self._text_ids(texts)
        ids = list(first)
        for token, text in zip(between, others, strict=True):
            ids += [token, *text]
        return ids

    def _without_bos(self, ids: list[int]) -> list[int]:
        if ids and ids[0] == self.bos:
            ids = ids[1:]
        return [token for token in ids if token != self._own_bos]


def _unpickled(folder: Path, bos: int, digest: str, backend: str, stand_in: bool) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(folder, bos, digest, Backend.from_str(backend), stand_in)


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer from a model's folder.

    Raises:
        SettingError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(f"{folder} has no loadable tokenizer: {first_line(error)}") from error
