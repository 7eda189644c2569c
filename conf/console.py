"""`residual-saes COMMAND ...`, the console command: what `python -m harvest` does, from any folder.

Nothing is imported before `_begin`, and nothing that takes time before a command is known: help is
instant, Ctrl-C ends the process without a traceback, and files of the user's have no effect.
"""

import os
import signal
import sys
from importlib import import_module

# Each with the module that carries it out, and what it is for.
COMMANDS = {
    "harvest": ("harvest.command", "a language model's activations on a text, into a store"),
    "train": ("train.command", "sparse autoencoders from a store, into runs"),
    "analyze": ("analyze.command", "what a trained SAE is worth: studies, pages, a report"),
    "export": ("train.export.command", "an SAE in the files of SAELens and other libraries"),
    "publish": ("train.publish.command", "a run as a repository of the Hugging Face Hub"),
}


def main() -> None:
    """Run the command that the command line names."""
    _begin()
    import_module("residual_saes.data.spelling").use_console()
    name, *words = sys.argv[1:] or ["help"]
    if name in ("help", "--help", "-h") and words:
        name, *words = [*words, "--help"]
    if name in COMMANDS:
        sys.argv[1:] = words
        run(name)
    else:
        import_module("residual_saes.conf.front").answer(name, words, COMMANDS)


def run(name: str) -> None:
    """Run one of `COMMANDS` with the settings of the command line."""
    _begin()
    module, _ = COMMANDS[name]
    import_module("residual_saes.conf.command").start(name, f"residual_saes.{module}")


def _begin() -> None:
    """Have Ctrl-C end the process, and import nothing of the working directory.

    `python -m` puts that first, where a json.py may be.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a command answers signals itself
    ours = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    try:
        if sys.path[0] == os.getcwd() != ours:
            del sys.path[0]
    except OSError:  # the folder is gone
        pass
