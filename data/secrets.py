"""Passwords, keys and tokens: they belong in the environment, in no setting and in no output.

A setting that holds one is refused before anything records it. What a library says may hold one
too: a server's address with its query, a header of a request. So what is printed, and what an
exception carries out of a command, goes through `redacted`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

MASK = "***"
BELONG = "keys and passwords belong in the environment, never in a setting (docs/harvest.md, Keys)"
_NAMED = (
    r"(?:[\w.-]*[_.-])?(?:(?:auth|access|session|security|hf|hub|api|sas|bearer|refresh|id)?token"
    r"|secret|password|passwd|passphrase|credentials?|signature|sig|authorization"
    r"|(?:api|access|account|private|secret|storage|sas|master)[_-]?key(?:[_-]?id)?|connection[_-]?string)"
)
_IS_NAMED = re.compile(_NAMED, re.IGNORECASE)
# What a text may hold, with the group that is the secret. Spans are bounded: with open ones a line
# of 200,000 letters took minutes.
_KINDS = {
    "a user or password in a URL": re.compile(
        r"(?<![a-z\d])[a-z][a-z\d+.-]{0,20}:/{1,3}"
        r"(?![^\s/@:]{0,500}:\d{1,5}/)"  # behind HOST:PORT/ an @ is of the path
        r"([^\s/?#@:'\"]{0,500}:[^\s?#@'\"]{0,500}|[^\s/?#@'\"]{1,500})@",
        re.IGNORECASE,
    ),
    "a signed URL": re.compile(
        rf"[?&;#](?:{_NAMED}|x-(?:amz|goog|ms)-[\w-]+|policy|key-pair-id)=([^&\s'\"<>]+)",
        re.IGNORECASE,
    ),
    "a header with a key": re.compile(
        r"\b(?:authorization['\"]?\s*[:=]\s*['\"]?(?:basic\s|bearer\s)?|bearer\s(?=\S*\d))\s*"
        r"([\w.~+/=-]{8,})",
        re.IGNORECASE,
    ),
    "an access token": re.compile(
        r"(?<![A-Za-z\d])(hf_[A-Za-z\d]{20,}|gh[oprsu]_[A-Za-z\d]{20,}|github_pat_\w{20,}"
        r"|A[KS]IA[A-Z\d]{16}|sk-[\w-]{20,}|glpat-[\w-]{20,}|ya29\.[\w-]{20,})"
    ),
}
_SHORTEST = 8  # characters of a variable's value that is taken for a secret
_SERVICES = ("AWS_", "AZURE_", "GOOGLE_", "GCP_", "HF_", "HUGGING", "WANDB_")
_FILE = "GOOGLE_APPLICATION_CREDENTIALS"  # whose value is a path
_URL = re.compile(r"[a-z][a-z\d+.-]*://|(?:s3|gs|az|hf|file|https?):/", re.IGNORECASE)
_VARIABLE = re.compile(r"oc\.env:\s*['\"]?(\w+)")


def kind_in(text: str) -> str | None:
    """Which kind of secret a text holds, in a few words; None if there is none.

    Percent signs hide nothing.
    """
    for plain in _spelled(text):
        for variable in _VARIABLE.findall(plain):
            if is_name(variable):
                return f"the value of {variable}"
        for variable, value in _of_environment():
            if value in plain:
                return f"the value of {variable}"
        for kind, pattern in _KINDS.items():
            if pattern.search(plain):
                return kind
    return None


def kind_in_url(url: str) -> str | None:
    """The same of a URL that names a place. It has no user, no query and no fragment."""
    if not (scheme := _URL.match(url)):
        return kind_in(url)
    for plain in _spelled(url[scheme.end() :]):
        host = plain.lstrip("/").partition("/")[0]
        for mark, what in {"@": "a user", ":": "a user or a port"}.items():
            if mark in host:
                return f"{what} in a URL"
        for mark, what in {"?": "a query", "#": "a fragment"}.items():
            if mark in plain:
                return f"{what} in a URL"
    return kind_in(url)


def kind_in_settings(settings: Any, name: str = "") -> tuple[str, str] | None:
    """The first of nested settings that holds a secret, and its kind; None if none does."""
    if isinstance(settings, Mapping):
        items = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list | tuple):
        items = [("", value) for value in settings]
    else:
        kind = kind_in(settings) if isinstance(settings, str) else None
        return (name, kind) if kind else None
    for key, value in items:
        inner = ".".join(filter(None, (name, key)))
        if value is not None and is_name(key):
            return inner, "what its name says"
        if found := kind_in_settings(value, inner):
            return found
    return None


def is_name(name: str) -> bool:
    """Whether a setting or a variable of this name is a secret."""
    return _IS_NAMED.fullmatch(name) is not None


def redacted(text: str) -> str:
    """`text` with MASK in the place of each secret."""
    for _, value in _of_environment():
        text = text.replace(value, MASK)
    for pattern in _KINDS.values():
        text = pattern.sub(_masked, text)
    return text


def cleaned(error: BaseException) -> BaseException:
    """`error` without secrets; without its causes too, where one of them holds some.

    A launcher's log and the interpreter print an exception with all that led to it.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if all(redacted(text) == text for text in map(str, chain)):
        return error
    error.args = tuple(redacted(part) if isinstance(part, str) else part for part in error.args)
    text = str(error)
    if redacted(text) != text:  # its class keeps the text elsewhere
        error = RuntimeError(redacted(f"{type(error).__name__}: {text}"))
    error.__cause__ = error.__context__ = None
    return error


def _masked(match: re.Match[str]) -> str:
    start, end = (position - match.start() for position in match.span(1))
    return match[0][:start] + MASK + match[0][end:]


def _spelled(text: str) -> Iterator[str]:
    """`text` as it is, and with its percent signs undone as often as they are doubled."""
    yield text
    for _ in range(4):
        plain = unquote(text)
        if plain == text:
            return
        text = plain
        yield text


def _of_environment() -> Iterator[tuple[str, str]]:
    """Variables of services that hold secrets, with their values."""
    for name, value in os.environ.items():
        is_secret = name.startswith(_SERVICES) and is_name(name) and name != _FILE
        if is_secret and len(value) >= _SHORTEST:
            yield name, value
