"""Tab completion of `residual-saes`: the scripts of the shells, and the words that they ask for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence

from residual_saes.conf import schema
from residual_saes.conf.early import CHOICES
from residual_saes.conf.names import is_path
from residual_saes.data.errors import SettingError
from residual_saes.data.site import SITES

# What each shell runs once. A word that ends with = or / goes on, so no space comes behind it.
SHELLS = {
    "bash": """_residual_saes() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n' word i
    COMPREPLY=($(residual-saes complete "$line" 2>/dev/null))
    word="${line##*[[:space:]]}"
    for i in "${!COMPREPLY[@]}"; do
        [[ ${COMPREPLY[i]} == *[=/] ]] || COMPREPLY[i]+=" "
        # bash replaces what stands behind the last = alone
        [[ $word != *=* || $COMP_WORDBREAKS != *=* ]] ||
            COMPREPLY[i]="${COMPREPLY[i]#"${word%=*}="}"
    done
}
complete -o nospace -F _residual_saes residual-saes""",
    "zsh": """_residual_saes() {
    local word
    for word in ${(f)"$(residual-saes complete "$LBUFFER" 2>/dev/null)"}; do
        if [[ $word == *[=/] ]]; then compadd -S '' -- $word; else compadd -- $word; fi
    done
}
compdef _residual_saes residual-saes""",
    "fish": "complete -c residual-saes -f -a '(residual-saes complete (commandline -cp))'",
}
_FOLDERS = {"store": "activations", "run": "runs", "runs": "runs"}  # where these are by default


def script(shell: str) -> str:
    """What a shell runs to complete the words of `residual-saes`.

    Raises:
        SettingError: it is another shell.
    """
    if shell not in SHELLS:
        got = f", and not for '{shell}'" if shell else "; name one"
        raise SettingError(f"completion is for {', '.join(SHELLS)}{got}")
    return SHELLS[shell]


def complete(line: str, commands: Sequence[str]) -> list[str]:
    """The words that the last one of a command line may become."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote is open
        words = line.split()
    word = "" if line[-1:].isspace() else words.pop()
    begun = words[1:]
    return sorted(each for each in _candidates(begun, word, commands) if each.startswith(word))


def _candidates(begun: Sequence[str], word: str, commands: Sequence[str]) -> Iterator[str]:
    """Words for the place behind those that are begun, of which `word` is the beginning."""
    if not begun:
        yield from (*commands, "help", "completion", "--help", "--version")
    elif begun[0] == "completion":
        yield from SHELLS
    elif begun[0] == "help":
        yield from commands
    elif begun[0] in commands:
        name, sign, value = word.partition("=")
        if sign:
            for each in _values(begun[0], name, value):
                yield f"{name}={each}"
        else:
            yield from ("--help", "--multirun")
            yield from (f"{each}=" for each in _settings(begun) if f"{each}=" not in begun)


def _settings(begun: Sequence[str]) -> list[str]:
    """The settings of a command, with the options of groups that its line has chosen."""
    groups = schema.groups(schema.command_file(begun[0]))
    typed = dict(word.split("=", 1) for word in begun if "=" in word)
    names = [*groups, *schema.defaults(begun[0], {**groups, **typed})]
    return [name for name in names if name not in typed]


def _values(command: str, name: str, value: str) -> Iterator[str]:
    if name in schema.groups(schema.command_file(command)):
        yield from schema.options(name)
    elif is_path(name):
        yield from _paths(value or _FOLDERS.get(name, ""))
    elif name in CHOICES.get(command, {}):
        yield from CHOICES[command][name]
    elif name == "site":
        yield from SITES
    elif name == "device":
        yield from ("cpu", "cuda")
    elif isinstance(schema.defaults(command, {}).get(name), bool):
        yield from ("true", "false")


def _paths(begun: str) -> Iterator[str]:
    """Files and folders that a path may become. A store is no folder to go into."""
    folder = begun if begun and os.path.isdir(begun) else os.path.dirname(begun)
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(".") and not any(map(str.isspace, entry.name)):
            path = os.path.join(folder, entry.name)
            yield path + "/" * (entry.is_dir() and not path.endswith(".zarr"))
