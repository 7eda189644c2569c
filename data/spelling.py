"""How messages write our own commands: in the way in which the running one was started.

Source and files that are written say `python -m harvest`, which works in a clone. After
`residual-saes ...`, and in Python, messages say `residual-saes harvest`, which works anywhere.
"""

from __future__ import annotations

import os
import re

VARIABLE = "RESIDUAL_SAES_COMMAND"  # also for processes that a command starts
CONSOLE = "residual-saes"
_OURS = re.compile(
    r"\bpython -m (?:residual_saes\.)?(?:train\.)?(harvest|train|analyze|export|publish)\b(?!\.\w)"
)


def use_console() -> None:
    """From now on have messages say `residual-saes COMMAND`."""
    os.environ[VARIABLE] = CONSOLE


def spelled(text: str) -> str:
    """`text` with each command as the user can give it."""
    command = os.environ.get(VARIABLE)
    return _OURS.sub(rf"{CONSOLE} \1", text) if command == CONSOLE else text
