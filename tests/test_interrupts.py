"""Ctrl-C before a command has begun: no traceback, whatever is being imported."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from residual_saes.conf.command import run_command
from residual_saes.data import stopping
from residual_saes.data.errors import Interrupted, StopRequest, StoreError

# Runs a module as `python -m` does, and interrupts itself when that asks for what is slow.
_INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name in ("torch", "hydra"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["harvest", "train", "analyze", "train.export", "train.publish"])
def test_an_early_interrupt_is_quiet(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, module],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # whoever runs the tests
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    """As a job's that a script has started behind `&`."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, "train.export", "--help"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 0 and "saelens" in done.stdout


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_an_engines_early_notice_is_one_line(signum: int) -> None:
    program = _INTERRUPTED.replace("signal.SIGINT", str(int(signum)))
    done = subprocess.run(
        [sys.executable, "-c", program, "train.export"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (75, 1)


def test_a_notice_that_a_launcher_answers_is_its_own() -> None:
    """submitit puts a job back into the queue at SIGUSR2."""
    heard: list[int] = []
    former = signal.signal(signal.SIGUSR2, lambda signum, _: heard.append(signum))
    try:
        with StopRequest() as stop:
            stopping.answer_signals()
            run_command(lambda: signal.raise_signal(signal.SIGUSR2))
            stop.check()
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert heard == [signal.SIGUSR2]


def test_a_command_can_be_interrupted_again(capsys: pytest.CaptureFixture[str]) -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        stopping.answer_signals()
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, former)
    assert stopped.value.code == 130 and "stopped by SIGINT" in capsys.readouterr().err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(error: BaseException) -> int:
        def command() -> None:
            raise error

        with pytest.raises(SystemExit) as stopped:
            run_command(command)
        return stopped.value.code

    assert raises(StoreError("lost")) == 2 and capsys.readouterr().err == "error: lost\n"
    assert raises(Interrupted(signal.SIGTERM)) == 143
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
