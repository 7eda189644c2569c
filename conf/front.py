"""What `residual-saes` answers without a command: its overview, version and completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import metadata

from residual_saes.conf import completion
from residual_saes.conf.command import run_command
from residual_saes.data.errors import SettingError

Commands = Mapping[str, tuple[str, str]]  # of each command its module, and what it is for
_USAGE = """
Settings are NAME=VALUE. A small model that is built in, from text to report:
  residual-saes harvest model=tiny text=tiny tokens=2e5 store=activations/tiny.zarr
  residual-saes train store=activations/tiny.zarr sae=tiny run=runs/tiny
  residual-saes analyze study=report run=runs/tiny

Your own model and text, each a folder; each command ends with the next one:
  residual-saes harvest model.path=FOLDER text.path=FOLDER

  residual-saes help COMMAND       all settings of a command
  residual-saes completion SHELL   for bash: eval "$(residual-saes completion bash)"
  residual-saes --version"""


def answer(name: str, words: Sequence[str], commands: Commands) -> None:
    """Print what was asked for, or that it is no command."""
    run_command(lambda: print(_answered(name, words, commands)))


def _answered(name: str, words: Sequence[str], commands: Commands) -> str:
    if name in ("help", "--help", "-h"):
        return overview(commands)
    if name in ("version", "--version", "-V"):
        return f"residual-saes {metadata.version('residual-saes')}"
    if name == "completion":
        return completion.script(" ".join(words))
    if name == "complete":  # for the scripts of shells
        return "\n".join(completion.complete(" ".join(words), [*commands]))
    named = [word for word in words if word in commands]
    near = [*get_close_matches(name, commands, 1, 0.5), *named]
    known = f"it is one of {', '.join(commands)}"
    meant = f"did you mean `residual-saes {near[0]}`?" if near else known
    raise SettingError(f"'{name}' is no command; {meant}")


def overview(commands: Commands) -> str:
    """What `residual-saes` alone says."""
    lines = [f"  residual-saes {name:<9} {about}" for name, (_, about) in commands.items()]
    return "\n".join(["Sparse autoencoders on what a language model computes.", "", *lines, _USAGE])
