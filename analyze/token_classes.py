"""The class of text that each id of a vocabulary stands for: English, other, digits, or code.

Of `other` some scripts are told apart: those in which the reference SAE's card found early layers
to speak.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

from residual_saes.harvest.tokens import Tokenizer

CLASSES = ("english", "other", "digit", "code")  # each id has exactly one
# Each is a part of `other`, by the first word of its characters' Unicode names.
SCRIPTS = {"chinese": "CJK", "bengali": "BENGALI", "hindi": "DEVANAGARI", "arabic": "ARABIC"}
REST = "rest"  # of `other`
NAMES = (*CLASSES, *SCRIPTS, REST)
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


def script_of(text: str) -> str | None:
    """Which of SCRIPTS all letters outside ASCII are of; None if there is none, or of several."""
    letters = [character for character in text if _is_foreign(character)]
    first_words = {_first_word(character) for character in letters}
    for name, word in SCRIPTS.items():
        if first_words == {word}:
            return name
    return None


def _first_word(character: str) -> str:
    """Of the character's name; ARABIC of ARABIC-INDIC and EXTENDED ARABIC-INDIC digits too."""
    name = unicodedata.name(character, "").removeprefix("EXTENDED ")
    return re.split("[ -]", name)[0]


def members(tokenizer: Tokenizer, size: int) -> NDArray[np.bool_]:
    """(size, len(NAMES)) which of the classes and scripts each id is of.

    Ids that the tokenizer does not have are `code`.
    """
    ids = [[token] for token in range(size)]
    texts = tokenizer.backend.decode_batch(ids, skip_special_tokens=False)
    found = np.zeros((size, len(NAMES)), bool)
    for token, text in enumerate(texts):
        kind = class_of(text)
        found[token, NAMES.index(kind)] = True
        if kind == "other":
            found[token, NAMES.index(script_of(text) or REST)] = True
    return found
