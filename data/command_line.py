"""The command line as a person typed it, and others that may be typed next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from residual_saes.data import rank
from residual_saes.data.errors import SettingError
from residual_saes.data.rank import Rank


class _Typed:
    """Of this process: the words that start its stage, as `python -m train`, and the others."""

    stage = ""
    words: Sequence[str] = ()
    arguments: Sequence[str] = ()


_typed = _Typed()


def take(stage: str, arguments: Sequence[str]) -> None:
    """Keep what was typed: `arguments` behind the words that start `stage`."""
    _typed.stage = stage
    _typed.arguments = tuple(arguments)
    _typed.words = _words(stage, list(arguments))


def again() -> str:
    """The same command, quoted for a shell; "" if an engine started several processes."""
    alone = _typed.stage and _rank().world == 1
    return shlex.join([*_typed.words, *_typed.arguments]) if alone else ""


def of(stage: str, *settings: str) -> str:
    """The command of a stage, started as this one was; "" for all processes but the first."""
    if not _typed.stage or _rank().rank:
        return ""
    *before, last = _typed.words
    name = last.removesuffix(_typed.stage) + stage
    return shlex.join([*before, name, *settings])


def opening(page: Path) -> str:
    """The command that opens a page in a browser; "" for all processes but the first."""
    if not _typed.stage or _rank().rank:
        return ""
    python = _typed.words[0] if "-m" in _typed.words else "python3"
    return shlex.join([python, "-m", "webbrowser", str(page)])


def _words(stage: str, arguments: list[str]) -> list[str]:
    words = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    is_ours = [*words, *arguments] == sys.orig_argv and words[-1].split(".")[-1] == stage
    if not is_ours:  # started by another program, in its process
        return ["python", "-m", stage]
    if "-m" not in words[:-1]:  # a script, which the shell started by its first line
        words = words[1:]
        program = Path(words[0]).name
        words[0] = program if shutil.which(program) == words[0] else words[0]
    return words


def _rank() -> Rank:
    try:
        return rank.here()
    except SettingError:  # a variable of an engine is no number; whoever needs it says so
        return Rank()
