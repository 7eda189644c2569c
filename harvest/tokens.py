"""Documents into token ids, with a model's own tokenizer and chat template, without the model.

A document never makes special tokens: text that spells one (`<bos>`) stays text. In a chat only the
template makes special tokens.

Some vocabularies have their BOS as an ordinary word too (a chess model's `;`). Where a text begins
with it, that one is left out: each document gets its BOS when it is packed. Further ones are
ordinary tokens of the text: pieces are told apart by their document's number, never by BOS.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from residual_saes.data import durable
from residual_saes.data.errors import DocumentError, SettingError, StoreError
from residual_saes.data.foreign import reading
from residual_saes.data.text.chats import Chat, Message
from residual_saes.data.text.documents import Content
from residual_saes.harvest.chat_template import ChatTemplate, Spellings, Turns

_WAY_OUT = "copy or download it again"
_ADDED = 50_000  # Emu3, whose pictures are tokens, has 33,000
_GROWTH = 1e6  # of a text by a normalizer: that of published ones is below 4

Ids = list[int] | DocumentError  # token ids of a document, or why it has none


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
    vocabulary: int | None = None  # ids that the model has embeddings for; None: not known

    @classmethod
    def load(cls, folder: Path, vocabulary: int | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder.

        Args:
            vocabulary: ids that the model has embeddings for. A tokenizer may have more, such as a
                pad token that was added for fine-tuning: a document is refused only if it uses one.

        Raises:
            SettingError: there is none, or it has no fast form, or no token to start pieces with.
        """
        return cls._of(load_tokenizer(folder), folder, vocabulary)

    @classmethod
    def of_loaded(cls, given: Any, vocabulary: int | None = None) -> Tokenizer:
        """One that transformers has loaded, and that is left as it is; raises as `load`."""
        # Encoding changes settings of the backend.
        tokenizer = cls._of(copy.deepcopy(given), Path(given.name_or_path), vocabulary)
        tokenizer.__dict__["inner"] = given
        return tokenizer

    @classmethod
    def _of(cls, inner: Any, folder: Path, vocabulary: int | None) -> Tokenizer:
        if not hasattr(inner, "backend_tokenizer"):
            raise SettingError(
                f"{type(inner).__name__} has no fast form (tokenizer.json); convert it with "
                "transformers"
            )
        backend = inner.backend_tokenizer
        _require_steady(backend, folder)
        digest = durable.digest(backend.to_str().encode())
        # Models whose tokenizer has no BOS (Qwen) put their end-of-text token before a document.
        bos = inner.bos_token_id if inner.bos_token_id is not None else inner.eos_token_id
        if bos is None:
            raise SettingError(
                f"the tokenizer of {folder} has neither a BOS nor an EOS token to start pieces with"
            )
        if vocabulary is not None and bos >= vocabulary:
            raise SettingError(
                f"the tokenizer of {folder} starts pieces with token {bos}, and the model has "
                f"embeddings for {vocabulary:,}; take the tokenizer that belongs to the model"
            )
        backend.no_truncation()
        backend.no_padding()
        return cls(folder, bos, digest, backend, inner.bos_token_id is None, vocabulary)

    def __reduce__(self) -> tuple[Any, tuple[Path, int, str, str, bool, int | None]]:
        return _unpickled, (
            self.folder,
            self.bos,
            self.digest,
            self.backend.to_str(),
            self.stand_in,
            self.vocabulary,
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

    @property
    def turns(self) -> Turns:
        """How `encode` puts prompts in turns, where chats end with the beginning of a reply.

        Raises:
            SettingError: the model has no chat template, and its tokenizer no turns that are known.
        """
        return self._template.turns

    def encode(self, contents: list[Content], *, reply: bool = False) -> list[list[int]]:
        """Token ids of documents, without the BOS that each begins with.

        Args:
            reply: chats are prompts: they end with the beginning of the model's turn. Without a
                chat template they are in built-in turns, see `turns`.

        Raises:
            DocumentError: the first document that has no ids.
            SettingError: a chat, and the model has no chat template, or no `turns` for a prompt.
        """
        encoded: list[list[int]] = []
        for ids in self.attempt(contents, reply=reply):
            if isinstance(ids, DocumentError):
                raise ids
            encoded.append(ids)
        return encoded

    def attempt(self, contents: Sequence[Content], *, reply: bool = False) -> list[Ids]:
        """Like `encode`, with a `DocumentError` in the place of each document that has no ids.

        It has none if the chat template refuses it, if the tokenizer cannot encode it, or if the
        model has no embedding for one of its tokens.
        """
        texts = [content for content in contents if isinstance(content, str)]
        chats = [content for content in contents if not isinstance(content, str)]
        text_ids = map(self._without_first, self._text_ids(texts))
        chat_ids = iter(self._chat_ids(chats, reply) if chats else [])
        encoded: list[Ids] = []
        for content in contents:
            ids = next(text_ids if isinstance(content, str) else chat_ids)
            encoded.append(self._embedded(ids))
        return encoded

    def _without_first(self, ids: Ids) -> Ids:
        """`ids` less a BOS at their beginning."""
        return ids if isinstance(ids, DocumentError) or ids[:1] != [self.bos] else ids[1:]

    def _embedded(self, ids: Ids) -> Ids:
        """`ids` if the model has an embedding for each of them."""
        if isinstance(ids, DocumentError) or self.vocabulary is None:
            return ids
        largest = max(ids, default=0)
        if largest < self.vocabulary:
            return ids
        return DocumentError(
            "tokens without an embedding",
            f"it has token {largest} ({self.backend.id_to_token(largest)!r}), and the model has "
            f"embeddings for {self.vocabulary:,}",
        )

    # -- text --------------------------------------------------------------------------------------

    def _text_ids(self, texts: Sequence[str], special: bool = False) -> list[Ids]:
        """Ids of each text; a spelled special token becomes one only if `special`."""
        self.backend.encode_special_tokens = not special
        try:
            with reading("the tokenizer cannot encode it", "leave it out"):
                encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except StoreError:  # it does not tell which text it was
            return [self._ids_alone(text) for text in texts]
        return [encoding.ids for encoding in encodings]

    def _ids_alone(self, text: str) -> Ids:
        try:
            with reading("the tokenizer cannot encode it", "leave it out"):
                (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=False)
        except StoreError as refusal:
            try:
                text.encode()
            except UnicodeEncodeError as half:
                reason = f"it holds half of a surrogate pair (character {half.start})"
                return DocumentError("not Unicode", reason)
            return DocumentError("not in the vocabulary", str(refusal))
        ids: list[int] = encoding.ids
        return ids

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

    def _chat_ids(self, chats: Sequence[list[Message] | Chat], reply: bool) -> list[Ids]:
        """Ids of chats as the template renders them, without the template's BOS tokens.

        The whole rendered text is encoded at once. If that gives a special token which is not the
        template's, the parts between the template's are encoded one by one, as text.
        """
        rendered = [self._parts(chat, reply) for chat in chats]
        wholes = ["" if isinstance(parts, DocumentError) else "".join(parts) for parts in rendered]
        special = set(self._spellings.ids.values())
        encoded: list[Ids] = []
        for parts, ids in zip(rendered, self._text_ids(wholes, special=True), strict=True):
            if isinstance(parts, DocumentError) or isinstance(ids, DocumentError):
                encoded.append(parts if isinstance(parts, DocumentError) else ids)
                continue
            expected = [self._spellings.ids[part] for part in parts[1::2]]
            if [token for token in ids if token in special] == expected:
                first = int(ids[:1] == [self.bos])
                encoded.append([token for token in ids[first:] if token != self._own_bos])
            else:
                encoded.append(self._without_first(self._joined(parts[0::2], expected)))
        return encoded

    def _parts(self, chat: list[Message] | Chat, reply: bool) -> list[str] | DocumentError:
        try:
            return self._template.parts(chat, reply=reply)
        except DocumentError as error:
            return error

    def _joined(self, texts: Sequence[str], between: Sequence[int]) -> Ids:
        """Ids of `texts`, each encoded as text, with the special tokens `between` them but BOS."""
        ids: list[int] = []
        for number, text in enumerate(self._text_ids(texts)):
            if isinstance(text, DocumentError):
                return text
            if number and between[number - 1] != self._own_bos:
                ids.append(between[number - 1])
            ids += text
        return ids


def _unpickled(
    folder: Path, bos: int, digest: str, backend: str, stand_in: bool, vocabulary: int | None
) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(folder, bos, digest, Backend.from_str(backend), stand_in, vocabulary)


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer from a model's folder.

    Raises:
        SettingError: there is none.
    """
    from transformers import AutoTokenizer

    with reading(f"{folder} has no loadable tokenizer", _WAY_OUT, SettingError):
        _require_few_added(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _require_few_added(folder: Path) -> None:
    """Raise ValueError for more added tokens than transformers takes in within a minute."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and path.read_bytes().count(b'"single_word"') > _ADDED:
            raise ValueError(f"{name} has more than {_ADDED:,} added tokens")


def _require_steady(backend: Any, folder: Path) -> None:
    """Raise SettingError if a tokenizer makes a text much longer before it cuts it in tokens."""
    with reading(f"the tokenizer of {folder}", _WAY_OUT, SettingError):
        growth = _growth(
            json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {}
        )
    if growth > _GROWTH:
        raise SettingError(
            f"the tokenizer of {folder} makes texts up to {growth:.3g} times as long; {_WAY_OUT}"
        )


def _growth(normalizer: Mapping[str, Any]) -> float:
    """How many times as long a text may become by tokenizer.json's `normalizer`."""
    growth = 1.0
    for inner in normalizer.get("normalizers", ()):
        growth *= _growth(inner)
    added = normalizer.get("content") or normalizer.get("prepend") or ""
    replaced = normalizer.get("pattern", {}).get("String")
    # A regular expression may match nothing, so everywhere; so may an empty text.
    return growth * max(1.0, len(added) / len(replaced) if replaced else len(added) + bool(added))
