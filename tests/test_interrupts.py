"""Ctrl-C before a command has begun: no traceback, whatever is being imported."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# Runs a module as `python -m` does, and interrupts itself when that asks for what is slow.
_INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name in ("torch", "hydra"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["harvest", "train", "analyze", "train.export", "train.publish"])
def test_an_early_interrupt_is_quiet(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, module],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # whoever runs the tests
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
