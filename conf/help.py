"""What --help prints: a command's settings as conf/ has them, comments and all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from residual_saes.conf.schema import File, command_file, groups, options


def described(command: str, arguments: Sequence[str]) -> str:
    """Every setting of a command, the options of its groups, and the settings of those chosen.

    Args:
        command: its settings are in conf/COMMAND.yaml.
        arguments: the command line's; GROUP=NAME among them chooses.
    """
    asked = dict(word.split("=", 1) for word in arguments if "=" in word)
    own = command_file(command)
    chosen = {**groups(own), **asked}
    for group in groups(own):
        chosen = {**chosen, **_overridden(group, chosen[group]), **asked}
    parts = [f"# {own.about}", own.settings]
    for group in groups(own):
        parts += _group(group, chosen[group])
    return "\n\n".join(parts)


def _overridden(group: str, chosen: str | None) -> dict[str, str]:
    """The default options of other groups that an option brings: override /GROUP@_global_.GROUP."""
    overridden: dict[str, str] = {}
    file = options(group).get(str(chosen))
    for default in file.defaults if file else ():
        if isinstance(default, str):
            overridden |= _overridden(group, default)
        else:
            ((key, name),) = default.items()
            overridden[key.removeprefix("override /").split("@")[0]] = name
    return overridden


def _group(group: str, chosen: str | None) -> Iterator[str]:
    """The options of a group, a line each, then the settings of the chosen one."""
    known = options(group)
    lines = [f"{group}={name:<18} # {file.about}" for name, file in known.items()]
    yield "\n".join(lines)
    if chosen in known:
        yield from _settings(group, chosen, known)


def _settings(
    group: str, name: str, known: Mapping[str, File], package: str | None = None
) -> Iterator[str]:
    """The settings of an option, behind those of the options that it builds on.

    Args:
        package: where they go; None: where its file says.
    """
    file = known[name]
    for default in file.defaults:
        base, _, inner = str(default).partition("@")
        if base in known:
            yield from _settings(group, base, known, f"{group}.{inner}" if inner else None)
    if file.settings:
        heading = f"{package or file.package or group}:  # {name}"
        yield f"{heading}\n{textwrap.indent(file.settings, '  ')}"
