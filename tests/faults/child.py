"""Work in a forked child: everything is imported already, and nothing that dies takes the tests
with it.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.data.errors import Interrupted, PipelineError


def in_child(body: Callable[[], object], said: Path | None = None) -> int:
    """Start `body` in a forked child; its process id.

    Args:
        said: the file for what it prints, which is thrown away otherwise.
    """
    with warnings.catch_warnings():
        # 3.12 warns of threads; none runs at this point.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        gc.freeze()  # a collection need not look at what was there: 0.3 s with torch imported
        out = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT, 0o666)
        for number in (1, 2):
            os.dup2(out, number)
        assert sys.__stdout__ and sys.__stderr__
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's own hold what is said
        body()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Answer(NamedTuple):
    """What came of some work."""

    value: Any  # what the work returned
    refusal: str | None  # the message with which it was refused
    broken: str | None  # the traceback, or how else it broke
    said: str  # what it printed

    @property
    def refused(self) -> bool:
        return self.refusal is not None


def ask(work: Callable[[], Any], limit_s: int = 60) -> Answer:
    """Do `work` in a child, for its answer: what it returns, a refusal, or a traceback."""
    with tempfile.TemporaryDirectory() as folder:
        said, file = Path(folder, "said"), Path(folder, "answer")
        code = outcome(in_child(lambda: _answer(work, limit_s, file), said))
        printed = said.read_text(errors="replace")
        if not file.exists():
            how = "it hung" if code == -signal.SIGALRM else f"it ended with {code}"
            return Answer(None, None, f"{how}\n{printed}", printed)
        value, refusal, broken = pickle.loads(file.read_bytes())
    return Answer(value, refusal, broken, printed)


def _answer(work: Callable[[], Any], limit_s: int, file: Path) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit_s)
    value = refusal = broken = None
    try:
        value = work()
    except (PipelineError, Interrupted) as error:
        refusal = str(error)
    except BaseException:
        broken = traceback.format_exc()
    file.write_bytes(pickle.dumps((value, refusal, broken)))
