"""The settings that the YAML files of conf/ have: names, defaults and the options of groups.

Read without Hydra, which takes longer, for what must be answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import takewhile
from typing import Any, NamedTuple

import yaml

_CONF = resources.files("residual_saes.conf")
_PACKAGE = "# @package "
_HIDDEN = ("defaults", "hydra", "name")  # what Hydra alone reads, and an option's own name
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C's is ten times as fast


class File(NamedTuple):
    """A YAML file of conf/."""

    about: str  # the comment at its top, on one line
    package: str | None  # where its settings go; None: into its group
    defaults: list[Any]  # files that it builds on
    settings: str  # each with the comment behind it, as --help shows it
    values: dict[str, Any]  # each with its default, under its dotted name inside the file


def command_file(command: str) -> File:
    """The file of a command."""
    return _read(_CONF / f"{command}.yaml")


@cache
def options(group: str) -> dict[str, File]:
    """The files of a group by name."""
    files = sorted((path.name, path) for path in (_CONF / group).iterdir())
    return {
        name.removesuffix(".yaml"): _read(path) for name, path in files if name.endswith(".yaml")
    }


def _read(path: Traversable) -> File:
    text = path.read_text()
    lines = text.splitlines()
    comments = list(takewhile(lambda line: line.startswith("#"), lines))
    package = None
    if comments and comments[0].startswith(_PACKAGE):
        package = comments.pop(0).removeprefix(_PACKAGE)
    shown = list[str]()
    block = "#"
    for line in lines:
        if line and not line.startswith(" "):
            block = line.partition(":")[0]
        if block not in _HIDDEN and not block.startswith("#"):
            shown.append(line)
    parsed = yaml.load(text, _LOADER) or {}
    plain = {key: value for key, value in parsed.items() if key not in _HIDDEN}
    return File(
        about=" ".join(comment.removeprefix("#").strip() for comment in comments),
        package=package,
        defaults=parsed.get("defaults", []),
        settings="\n".join(shown).strip(),
        values=flat(plain),
    )


def flat(values: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{under}{key}.")
        else:
            found[f"{under}{key}"] = value
    return found


def groups(file: File) -> dict[str, str | None]:
    """The groups of a command, each with its default option."""
    found: dict[str, str | None] = {}
    for default in file.defaults:
        if isinstance(default, dict):
            found |= default
    return {group: name for group, name in found.items() if not group.startswith("override ")}


def of_option(group: str, name: str, package: str | None = None) -> dict[str, Any]:
    """The settings of one option with their defaults, those included that it builds on."""
    file = options(group)[name]
    values: dict[str, Any] = {}
    for default in file.defaults:
        base, _, inner = str(default).partition("@")
        if base in options(group):
            values |= of_option(group, base, f"{group}.{inner}" if inner else package)
    where = package or file.package or group
    return values | {f"{where}.{key}": value for key, value in file.values.items()}


def defaults(command: str, chosen: Mapping[str, str | None]) -> dict[str, Any]:
    """The settings of a command with their defaults, where these options are chosen."""
    file = command_file(command)
    values: dict[str, Any] = dict(file.values)
    for group, default in groups(file).items():
        name = chosen.get(group, default)
        if name in options(group):
            values |= of_option(group, str(name))
    return values


@cache
def everywhere(command: str) -> dict[str, tuple[str, ...]]:
    """Every setting of a command, with the options GROUP=NAME that have it; (): it always does."""
    file = command_file(command)
    found: dict[str, tuple[str, ...]] = dict.fromkeys(file.values, ())
    for group in groups(file):
        for name in options(group):
            for setting in of_option(group, name):
                if found.get(setting, True):
                    found[setting] = (*found.get(setting, ()), f"{group}={name}")
    return found
