"""Ctrl-C and SIGTERM while a command is in something slow that Python cannot leave: it ends.

Each command runs in a fork of this process. The slow step is C code that takes minutes and answers
no signal, in the place of a read, a digest or a layer's forward pass.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import PreTrainedModel

from residual_saes.conf.command import start
from residual_saes.data import durable, stopping
from residual_saes.data.errors import exit_code
from residual_saes.data.store import codec
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.store import Store
from residual_saes.harvest.command import command
from residual_saes.harvest.model import ModelConfig, load
from tests.analyze.conftest import tiny_run  # noqa: F401 (a fixture)
from tests.forked import start_forked
from tests.harvest.test_command import tiny
from tests.harvest.test_encoder import tree

PATIENCE_S = 30.0  # of these tests: a command that does not answer fails them
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
HARVEST = ["model=tiny", "text=tiny", "tokens=3000", "context=64", "layer=5"]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("stopping") / "s.zarr"
    command(tiny(store))
    return store


class Slow:
    """A function that never returns, in C code; it tells a file that it has begun."""

    def __init__(self, begun: Path) -> None:
        self._begun = begun

    def __call__(self, *_: Any, **__: Any) -> Any:
        self._begun.touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def stopped(
    arguments: list[str], slow_down: Callable[[Slow], object], signum: int, folder: Path
) -> tuple[int, str]:
    """Run a command line, signal it in its slow step; its exit code and what it printed."""
    program, *rest = arguments
    begun, printed = folder / "begun", folder / "printed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads
        child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            for stream in (1, 2):
                os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            sys.argv = [program, *rest]
            GlobalHydra.instance().clear()
            stopping.told.clear()  # an earlier test's command may have been stopped
            slow_down(Slow(begun))
            start(program, f"{program}.command")
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    deadline = time.monotonic() + PATIENCE_S
    ended = 0
    signalled = False
    while not ended and time.monotonic() < deadline:
        if not signalled and begun.exists():
            os.kill(child, signum)
            signalled = True
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail(f"no end within {PATIENCE_S} s: {printed.read_text()}")
    assert signalled, printed.read_text()
    return os.waitstatus_to_exitcode(status), printed.read_text()


def slow_layer(slow: Slow) -> None:
    """Every decoder layer of the embedded model."""
    family = type(load(ModelConfig("embedded", dtype="float32")).blocks[0])
    family.forward = slow  # type: ignore[method-assign]


def slow_loading(slow: Slow) -> None:
    PreTrainedModel.from_pretrained = slow  # type: ignore[method-assign]


def slow_digest(slow: Slow) -> None:
    durable.digest_file = slow  # type: ignore[assignment]


def slow_check(slow: Slow) -> None:
    LocalPlace.digest = slow  # type: ignore[method-assign]


def slow_fit(slow: Slow) -> None:
    codec.fit = slow  # type: ignore[assignment]


def slow_download(slow: Slow) -> None:
    huggingface_hub.snapshot_download = slow


PHASES: dict[str, tuple[list[str], Callable[[Slow], object]]] = {
    "downloading": (["model.path=me/model"], slow_download),
    "loading": ([], slow_loading),
    "digest": ([], slow_digest),
    "self-check": ([], slow_layer),
    "codec": (["codec=int8"], slow_fit),
    "verify": (["action=verify"], slow_check),
    "verify, recomputing": (["action=verify"], slow_layer),
    "repair": (["action=repair"], slow_check),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_slow_phase_is_left(phase: str, harvested: Path, tmp_path: Path) -> None:
    overrides, slow_down = PHASES[phase]
    there = any("action=" in override for override in overrides)
    store = harvested if there else tmp_path / "s.zarr"
    signum = SIGNALS[list(PHASES).index(phase) % len(SIGNALS)]
    arguments = ["harvest", *HARVEST, *overrides, f"store={store}"]
    code, printed = stopped(arguments, slow_down, signum, tmp_path)
    assert code == exit_code(signum), printed
    assert printed.count("stopped by") == 1
    assert "Traceback" not in printed


def test_generating_answers_is_left(tiny_run: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["analyze", "study=gsm8k", f"run={tiny_run}", "problems=tiny", "device=cpu"]
    code, printed = stopped(arguments, slow_layer, signal.SIGINT, tmp_path)
    assert code == 130, printed
    assert printed.count("stopped by SIGINT") == 1
    assert "Traceback" not in printed


def packed(path: Path, text: str) -> Path:
    """A text that a process reads, for it is compressed."""
    path.write_bytes(gzip.compress(text.encode(), compresslevel=1))
    return path


def test_waiting_for_text_is_left_by_the_reader_too(tmp_path: Path) -> None:
    """One document of 40 MB is tokenised in one call, in a process of its own."""
    path = packed(tmp_path / "long.txt.gz", "a small text about nothing at all. " * 1_200_000)
    store = tmp_path / "s.zarr"
    line = [sys.executable, "-m", "harvest", *HARVEST, f"text.path={path}"]
    with subprocess.Popen([*line, f"store={store}"], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (store / "commits").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=PATIENCE_S)  # also until the reader is gone
    assert process.returncode == 143
    assert "Traceback" not in printed


def test_an_engine_signals_every_process_of_a_step(tmp_path: Path) -> None:
    """The reader of the text hears SIGTERM first, and is not what ends the command."""
    store, whole = tmp_path / "s.zarr", tmp_path / "whole.zarr"
    documents = "".join(f"Tom has {number} apples and buys 4 more.\n" for number in range(400))
    text = f"text.path={packed(tmp_path / 'some.txt.gz', documents)}"
    files = [tmp_path / "stdout", tmp_path / "stderr"]
    rank = start_forked("-m", "harvest", *HARVEST, text, f"store={store}", files=files)
    children = Path(f"/proc/{rank}/task/{rank}/children")
    deadline = time.monotonic() + PATIENCE_S
    while not [*store.glob("commits/spine/*.json")] and time.monotonic() < deadline:
        time.sleep(0.002)
    (reader,) = map(int, children.read_text().split())
    for pid, signum in (
        (reader, signal.SIGSTOP),  # or it might be done
        (reader, signal.SIGTERM),
        (rank, signal.SIGTERM),
        (reader, signal.SIGCONT),
    ):
        os.kill(pid, signum)
    _, status = os.waitpid(rank, 0)
    assert os.waitstatus_to_exitcode(status) == 143, files[1].read_text()
    assert Store.open(store).missing([5])
    command(tiny(store, text))
    command(tiny(whole, text))
    assert tree(store) == tree(whole)


def test_what_is_worth_the_wait_is_waited_for() -> None:
    """A commit ends before the process does; the same signal again does not wait."""
    program = """
import os, signal, sys, time
from residual_saes.data import stopping
stopping.watch()
signal.signal(signal.SIGTERM, lambda *_: None)
with stopping.holding():
    for _ in range(int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3 * stopping.GRACE_S)
    print("committed", flush=True)
time.sleep(60)
"""
    for signals, committed in ((1, "committed\n"), (2, "")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(signals)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (143, committed)
        assert done.stderr.count("stopped by SIGTERM") == 1


def test_leaving_waits_for_what_threads_finish() -> None:
    program = """
import threading, time
from residual_saes.data import stopping
def finish():
    with stopping.holding():
        begun.set()
        time.sleep(3 * stopping.GRACE_S)
        print("committed", flush=True)
begun = threading.Event()
threading.Thread(target=finish, daemon=True).start()
begun.wait()
stopping.told.set()
stopping.leave(SystemExit(143))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (143, "committed\n")


def test_a_server_ends_by_an_interrupt() -> None:
    program = """
import os, signal, sys, time
from residual_saes.data import stopping
stopping.watch()
stopping.expected.set()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(3 * stopping.GRACE_S)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_torch_is_single_threaded_here() -> None:
    """Forks beside running threads would hang."""
    assert torch.get_num_threads() == 1
