"""A process that does its share of the arms for a command: see beside.py."""

from __future__ import annotations

import json
import os
import sys
import threading

from residual_saes.analyze.studies.stage_gate_2.beside import study_named
from residual_saes.analyze.studies.stage_gate_2.study import do_share


def main() -> None:
    """Do the share that a line of the input names; end when the input does."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    do_share(study_named(asked), asked["share"])


def _end_with_the_command() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
