"""`residual-saes COMMAND ...`, the console command: `python -m harvest` and the others, anywhere.

Until a command is known, nothing is imported that takes time. So help is instant, and Ctrl-C ends
the process without a traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module, metadata

from residual_saes.data import spelling

# Each with the module that carries it out, and what it is for.
COMMANDS = {
    "harvest": ("harvest.command", "a language model's activations on a text, into a store"),
    "train": ("train.command", "sparse autoencoders from a store, into runs"),
    "analyze": ("analyze.command", "what a trained SAE is worth: studies, pages, a report"),
    "export": ("train.export.command", "an SAE in the files of SAELens and other libraries"),
    "publish": ("train.publish.command", "a run as a repository of the Hugging Face Hub"),
}
_HELP = """
Settings are NAME=VALUE:
  residual-saes harvest model=tiny text=tiny tokens=2e5 store=activations/tiny.zarr
  residual-saes train store=activations/tiny.zarr sae=tiny run=runs/tiny
  residual-saes analyze study=report run=runs/tiny

  residual-saes help COMMAND   all settings of a command
  residual-saes --version"""
_ASKS_HELP = ("help", "--help", "-h")
_ASKS_VERSION = ("version", "--version", "-V")


def main() -> None:
    """Run the command that the command line names."""
    _end_quietly()
    spelling.use_console()
    name, *words = sys.argv[1:] or ["help"]
    if name in _ASKS_HELP and words:
        name, *words = [*words, "--help"]
    if name in _ASKS_HELP:
        _answer(overview())
    elif name in _ASKS_VERSION:
        _answer(f"residual-saes {metadata.version('residual-saes')}")
    elif name in COMMANDS:
        sys.argv[1:] = words
        run(name)
    else:
        _refuse(name, words)


def run(name: str) -> None:
    """Run one of `COMMANDS` with the settings of the command line."""
    _end_quietly()
    module, _ = COMMANDS[name]
    import_module("residual_saes.conf.command").start(name, f"residual_saes.{module}")


def overview() -> str:
    """What `residual-saes` alone says."""
    lines = [f"  residual-saes {name:<9} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["Sparse autoencoders on what a language model computes.", "", *lines, _HELP])


def _answer(text: str) -> None:
    import_module("residual_saes.conf.command").run_command(lambda: print(text))


def _refuse(name: str, words: Sequence[str]) -> None:
    command = import_module("residual_saes.conf.command")
    near = get_close_matches(name, COMMANDS, 1, 0.5)
    known = ", ".join(COMMANDS)
    first = [word for word in words if word in COMMANDS]
    meant = f"did you mean `residual-saes {' '.join((near or first)[:1])}`?"

    def refuse() -> None:
        raise command.SettingError(
            f"'{name}' is no command; {meant if near or first else f'it is one of {known}'}"
        )

    command.run_command(refuse)


def _end_quietly() -> None:
    """Until a command answers signals itself, have Ctrl-C end the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
