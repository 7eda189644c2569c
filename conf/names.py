"""Settings whose values are names: what was typed is the name.

Hydra would read `run=20240101` as a number, `store=2024_01_02` as the number 20240102, `run=a=b` as
a mistake. So such values get Hydra's quotes before Hydra reads the command line. What keeps its
meaning: `null`, an empty value, a value that is quoted already, ${...} inside a value, and in a
multirun commas and functions such as choice(a,b).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote as percent
from urllib.parse import unquote

from residual_saes.data import secrets
from residual_saes.data.errors import SettingError
from residual_saes.data.neutral import neutral

# Paths, stores, runs, repositories, revisions, columns, ids: any text is one.
NAMES = (
    *("run", "out", "start", "store", "repo", "problems"),
    *("model.path", "model.revision", "answers.examples"),
    *("text.path", "text.field", "text.messages", "text.sources.*.*"),
    *("study.other", "study.corpus", "study.null_run", "study.features"),
    *("study.texts", "study.label", "study.group"),
    "study.to",
    *("study.author", "study.creator", "study.model", "study.release", "study.set"),
    *("hydra.run.dir", "hydra.sweep.dir"),
)
# Lists of names, in brackets. A value without brackets is one name, commas and all: an arm's
# directory has commas.
LISTS = ("runs", "study.others", "study.words")
# A name, or in brackets a list of several names; one name in brackets has brackets.
_NAME_OR_LIST = ("store",)
# Names of files and folders: of what a command writes or needs, and of what may be something else
# too, such as a hub id, unless it is there.
_PATHS = ("run", "out", "start", "store", "text.path", "text.sources.*.path")
_MAYBE_PATHS = (
    *("model.path", "problems", "answers.examples", "runs"),
    *("study.other", "study.others", "study.corpus", "study.null_run", "study.features"),
    *("study.texts", "study.to"),
)
_NUMBERS = ("text.sources.*.weight",)  # settings that NAMES would match
# Of a command: settings that are any text whatever, `null` and ${...} too. Hydra would take `text=`
# for a choice of conf/text, and reads signs in every value. So they travel through it in percent
# signs under TYPED, a name that no group has, and `typed` gives them back.
LITERAL = {"analyze": ("text", "prompt")}
TYPED = "typed"

_WORD = re.compile(r"[^\s\[\],'\"]+")
_KEY = re.compile(r"[{,]\s*['\"]?([\w.-]+)['\"]?\s*:")
_MULTIRUN = ("-m", "--multirun")
_SWEEP = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)
_QUOTED = re.compile(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"", re.DOTALL)
_CLOSES = {"[": "]", "{": "}", "(": ")"}


def quoted(arguments: Sequence[str], command: str = "") -> list[str]:
    """A command line with the values of all names in the quotes that Hydra wants.

    Options are neutral: the parser repeats those that it does not know.

    Args:
        command: whose `LITERAL` settings are not Hydra's to read.
    """
    multirun = any(argument in _MULTIRUN for argument in arguments)
    plain = [neutral(word) if word.startswith("-") else word for word in arguments]
    literal = LITERAL.get(command, ())
    return [_hidden(word, literal) or _argument(word, multirun) for word in plain]


def typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the `LITERAL` ones as they were typed."""
    plain = dict(settings)
    for name, value in plain.pop(TYPED, {}).items():
        plain[name] = unquote(value, errors="surrogatepass")
    return plain


def _hidden(argument: str, literal: Sequence[str]) -> str | None:
    """A `LITERAL` setting as Hydra can carry it; None: the argument is none."""
    key, sign, value = argument.partition("=")
    name = key.lstrip("+")
    if not sign or name not in literal:
        return None
    return f"++{TYPED}.{name}='{percent(value, safe='', errors='surrogatepass')}'"


def require_no_secret(arguments: Sequence[str], command: str = "") -> None:
    """Refuse a command line with a secret in it, before anything records or repeats it.

    Raises:
        SettingError: names the setting, and not the secret.
    """
    for argument in arguments:
        key, sign, value = argument.partition("=")
        name = key.lstrip("+~")
        is_plain = sign and re.fullmatch(r"[\w./@-]+", name) and not secrets.kind_in(name)
        kind = secrets.kind_in(argument)
        is_literal = name in LITERAL.get(command, ())
        has_keys = value.startswith(("{", "[{")) and not is_literal
        inner = _KEY.findall(value) if has_keys else []
        if value and any(map(secrets.is_name, (re.split(r"[./]", name)[-1], *inner))):
            kind = "a secret by its name"
        elif _is_in(name, NAMES) or _is_in(name, LISTS):
            kinds = map(secrets.kind_in_url, _WORD.findall(value))
            kind = kind or next(filter(None, kinds), None)
        if kind:
            where = f"{name}=" if is_plain else "the command line"
            raise SettingError(f"{where} holds {kind}; {secrets.BELONG}")


def texts(settings: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Settings with all names as text: `run=${sae.k}` gives Hydra's settings a number."""
    plain: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{under}{key}"
        if isinstance(value, Mapping):
            plain[key] = texts(value, f"{name}.")
        elif isinstance(value, list) and _is_in(name, (*LISTS, *_NAME_OR_LIST)):
            plain[key] = [_text(item) for item in value]
        else:
            plain[key] = _text(value) if _is_name(name) or _is_in(name, LISTS) else value
    return plain


def absolute(name: str, value: str, folder: str) -> str:
    """A setting's value; if it is a relative path, the absolute one as from `folder`.

    URLs, `~`, dots and ${...} stay. A path may stand behind the kind of an SAE, as in saelens:PATH.
    """
    key = name.lstrip("+")
    kind, colon, path = value.partition(":")
    if colon and re.fullmatch(r"[a-z_]\w*", kind):
        there = _is_in(key, _PATHS) and os.path.exists(os.path.join(folder, path))
        return f"{kind}:{os.path.join(folder, path)}" if there else value
    whole = os.path.join(folder, value)
    if value in ("", ".", "..") or value.startswith(("~", "${")):
        return value
    if _is_in(key, _PATHS) or (_is_in(key, _MAYBE_PATHS) and os.path.exists(whole)):
        return whole
    return value


def is_path(name: str) -> bool:
    """Whether a setting's value may be the path of something that is there."""
    return _is_in(name, (*_PATHS, *_MAYBE_PATHS))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_name(name: str) -> bool:
    return _is_in(name, NAMES) and not _is_in(name, _NUMBERS)


def _argument(argument: str, multirun: bool) -> str:
    key, sign, value = argument.partition("=")
    name = key.lstrip("+")
    if not sign or not value:
        return argument
    if _is_in(name, LISTS):
        return f"{key}={_listed(value) if _is_bracketed(value) else quote(value)}"
    if not _is_name(name):
        return argument
    quoted_name = _name_or_list if _is_in(name, _NAME_OR_LIST) else quote
    if not multirun:
        return f"{key}={quoted_name(value)}"
    if _SWEEP.fullmatch(value):
        return argument
    return f"{key}={','.join(map(quoted_name, _split(value)))}"


def _is_in(name: str, patterns: Sequence[str]) -> bool:
    group, dot, setting = name.partition(".")
    if group == "study":  # study=all has study.NAME.SETTING
        name = f"{group}{dot}{setting.rpartition('.')[2]}"
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_bracketed(value: str) -> bool:
    return value.startswith("[") and value.endswith("]")


def _name_or_list(value: str) -> str:
    """A list of several names in quotes; anything else as one name."""
    several = _is_bracketed(value) and len(list(_split(value[1:-1]))) > 1
    return _listed(value) if several else quote(value)


def _listed(value: str) -> str:
    """A list in brackets with its items in quotes."""
    items = (item.strip() for item in _split(value[1:-1]))
    return f"[{','.join(map(quote, items))}]"


def quote(value: str) -> str:
    """One name in quotes; as it is if it is null, empty or quoted already."""
    if value.lower() in ("", "null") or _QUOTED.fullmatch(value):
        return value
    # A backslash stands for itself, but before a quote it must be doubled.
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", value)
    return "'" + doubled.replace("'", "\\'") + "'"


def _split(value: str) -> Iterator[str]:
    """The parts of `value` between commas that stand outside of quotes and brackets."""
    start = 0
    end = 0
    expected: list[str] = []  # brackets that are open
    while end < len(value):
        if not expected and value[end] == ",":
            yield value[start:end]
            start = end + 1
        elif expected and value[end] == expected[-1]:
            expected.pop()
        elif value[end] in _CLOSES:
            expected.append(_CLOSES[value[end]])
        elif end == start and (whole := _QUOTED.match(value, end)):
            end = whole.end() - 1
        end += 1
    yield value[start:]
