"""The class of text that each id of a vocabulary stands for: English, other, digits, or code."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

from harvest.tokens import Tokenizer

CLASSES = ("english", "other", "digit", "code")
_WORD = re.compile(r"['\u2019-]?[A-Za-z]+(?:['\u2019-][A-Za-z]+)*")
_CAMEL = re.compile(r"[a-z][A-Z]")
_NUMBER = re.compile(r"[.,]?[0-9]+(?:[.,][0-9]+)*[.,]?")
_FOREIGN = ("L", "M", "N")  # general categories: letters, marks, numbers


def class_of(text: str) -> str:
    """The class of a token that decodes to `text`; every text has exactly one.

    White space around the text does not count. The first that fits:
        other    a letter, mark or number outside ASCII (é and ² too), or bytes that are no UTF-8 by
                 themselves
        english  one word of the letters A-Z, with apostrophes and hyphens, not in camelCase. The
                 script alone decides: "und" is English here
        digit    a number of the digits 0-9, with points and commas
        code     all else: punctuation, symbols, white space, mixtures of letters, digits and signs,
                 special tokens, and ids without text
    """
    bare = text.strip()
    if any(map(_is_foreign, bare)):
        return "other"
    if _WORD.fullmatch(bare):
        return "code" if _CAMEL.search(bare) else "english"
    return "digit" if _NUMBER.fullmatch(bare) else "code"


def _is_foreign(character: str) -> bool:
    if character == "\N{REPLACEMENT CHARACTER}":
        return True
    return ord(character) > 127 and unicodedata.category(character)[0] in _FOREIGN


def classes(tokenizer: Tokenizer, size: int) -> NDArray[np.int64]:
    """(size,) the number in CLASSES of each id's class.

    Ids that the tokenizer does not have are `code`.
    """
    ids = [[token] for token in range(size)]
    texts = tokenizer.backend.decode_batch(ids, skip_special_tokens=False)
    return np.array([CLASSES.index(class_of(text)) for text in texts], np.int64)
