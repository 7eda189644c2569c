"""What --help prints: a command's settings as conf/ has them, comments and all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import takewhile
from typing import Any, NamedTuple

import yaml

_CONF = resources.files("residual_saes.conf")
_PACKAGE = "# @package "
_HIDDEN = ("defaults", "hydra", "name")  # what Hydra alone reads, and an option's own name


class File(NamedTuple):
    """A YAML file of conf/, as --help shows it."""

    about: str  # the comment at its top, on one line
    package: str | None  # where its settings go; None: into its group
    defaults: list[Any]  # files that it builds on
    settings: str  # each with the comment behind it


def read(path: Traversable) -> File:
    """Read a file of conf/."""
    lines = path.read_text().splitlines()
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
    return File(
        about=" ".join(comment.removeprefix("#").strip() for comment in comments),
        package=package,
        defaults=(yaml.safe_load(path.read_text()) or {}).get("defaults", []),
        settings="\n".join(shown).strip(),
    )


def described(command: str, arguments: Sequence[str]) -> str:
    """Every setting of a command, the options of its groups, and the settings of those chosen.

    Args:
        command: its settings are in conf/COMMAND.yaml.
        arguments: the command line's; GROUP=NAME among them chooses.
    """
    asked = dict(word.split("=", 1) for word in arguments if "=" in word)
    own = read(_CONF / f"{command}.yaml")
    chosen = {**_groups(own), **asked}
    for group in _groups(own):
        chosen = {**chosen, **_overridden(group, chosen[group]), **asked}
    parts = [f"# {own.about}", own.settings]
    for group in _groups(own):
        parts += _group(group, chosen[group])
    return "\n\n".join(parts)


def _groups(file: File) -> dict[str, str | None]:
    """The groups of a command, each with its default option."""
    groups: dict[str, str | None] = {}
    for default in file.defaults:
        if isinstance(default, dict):
            groups |= default
    return {group: name for group, name in groups.items() if not group.startswith("override ")}


def _overridden(group: str, chosen: str | None) -> dict[str, str]:
    """The default options of other groups that an option brings: override /GROUP@_global_.GROUP."""
    path = _CONF / group / f"{chosen}.yaml"
    overridden: dict[str, str] = {}
    for default in read(path).defaults if path.is_file() else ():
        if isinstance(default, str):
            overridden |= _overridden(group, default)
        else:
            ((key, name),) = default.items()
            overridden[key.removeprefix("override /").split("@")[0]] = name
    return overridden


def _group(group: str, chosen: str | None) -> Iterator[str]:
    """The options of a group, a line each, then the settings of the chosen one."""
    files = sorted(path.name for path in (_CONF / group).iterdir() if path.name.endswith(".yaml"))
    options = {name.removesuffix(".yaml"): read(_CONF / group / name) for name in files}
    lines = [f"{group}={name:<18} # {file.about}" for name, file in options.items()]
    yield "\n".join(lines)
    if chosen in options:
        yield from _settings(group, chosen, options)


def _settings(
    group: str, name: str, options: Mapping[str, File], package: str | None = None
) -> Iterator[str]:
    """The settings of an option, behind those of the options that it builds on.

    Args:
        package: where they go; None: where its file says.
    """
    file = options[name]
    for default in file.defaults:
        base, _, inner = str(default).partition("@")
        if base in options:
            yield from _settings(group, base, options, f"{group}.{inner}" if inner else None)
    if file.settings:
        heading = f"{package or file.package or group}:  # {name}"
        yield f"{heading}\n{textwrap.indent(file.settings, '  ')}"
