"""Commands in a process of their own, forked from this one, which spares 4 to 8 s of imports.

The few tests of what a new interpreter does at its start run one.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from subprocess import CompletedProcess

from hydra.core.global_hydra import GlobalHydra

from residual_saes.data import stopping
from residual_saes.train import stream


def run_forked(*command: str, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run `python COMMAND`: `-m MODULE` or `-c CODE` with arguments."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        _, status = os.waitpid(start_forked(*command, files=files, cwd=cwd), 0)
        code = os.waitstatus_to_exitcode(status)
        out, err = (file.read_text() for file in files)
    return CompletedProcess(command, code, out, err)


def start_forked(*command: str, files: list[Path], cwd: Path | None = None) -> int:
    """Start `python COMMAND`, with stdout and stderr to `files`; the process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads
        child = os.fork()
    if child:
        return child
    code = 99
    try:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        code = run_here(*command, cwd=cwd)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_here(*command: str, cwd: Path | None = None) -> int:
    """The exit code of `python COMMAND` in this process, which was forked for it."""
    _as_new(cwd)
    return _run(*command)


def _as_new(cwd: Path | None) -> None:
    """Make this process what a new interpreter would be."""
    gc.freeze()  # a collection need not look at what was there: 0.3 s with torch imported
    assert sys.__stdout__ and sys.__stderr__
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    os.chdir(cwd or os.curdir)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for event in (stopping.told, stopping.expected):
        event.clear()
    for opened in (stream.store_at, stream.rows_of):
        opened.cache_clear()
    GlobalHydra.instance().clear()


def _run(option: str, what: str, *arguments: str) -> int:
    """The exit code of `python OPTION WHAT ARGUMENTS`."""
    sys.argv = [what, *arguments]
    try:
        if option == "-m":
            # Loaded here for another test already, which changes nothing.
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
