"""Writing the spine: text into packed rows of tokens, committed unit by unit.

It happens in a process of its own, but for a small text (harvest/spine_thread.py). Reading,
tokenising and packing run ahead there, without waiting for the interpreter lock of the process that
feeds the device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

import numpy as np

from residual_saes.data import child, machine
from residual_saes.data.errors import Interrupted, StoreError, TemporaryError, first_line
from residual_saes.data.journal import tell
from residual_saes.data.stopping import GRACE_S
from residual_saes.data.store.place import Place
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.text import packing, retry
from residual_saes.data.text.documents import TextSource
from residual_saes.harvest.encoder import Bad, Encoder
from residual_saes.harvest.tokens import Tokenizer


class Stop(Protocol):
    """Whoever may end the writing."""

    def check(self) -> None:
        """Raise to stop."""
        ...


def write_spine(
    store: Store,
    source: TextSource,
    tokenizer: Tokenizer,
    stop: Stop | None = None,
    bad: Bad = "stop",
) -> None:
    """Commit the missing spine units, and the spine's end.

    Args:
        stop: checked before every unit.
        bad: what becomes of a document that cannot be stored.

    Raises:
        DocumentError: a document cannot be stored, and bad=stop.
        StoreError: the text ends before one row is full.
    """
    ended = False
    while not ended and not store.ledger.spine_rows[: store.units].all():
        ended = _fill_gap(store, source, tokenizer, stop, bad)
    if store.spine_end is None:
        rows = int(store.ledger.spine_rows.sum())
        if rows == 0:
            raise StoreError(
                f"the text ends before one row of context={store.context} tokens is full; give "
                "more text"
            )
        store.close_spine(SpineEnd(rows, ended_early=rows < store.planned_rows))


def _fill_gap(
    store: Store, source: TextSource, tokenizer: Tokenizer, stop: Stop | None, bad: Bad
) -> bool:
    """Write units from the first missing one to the next that is there; True if the text ended."""
    unit, cursor = store.spine_cursor()
    max_tokens = store.manifest["text"].get("max_tokens")
    documents = Encoder(tokenizer, bad, max_tokens).ids(source, cursor.state)
    rows = packing.pack(documents, cursor, store.context, tokenizer.bos)
    unit_rows = store.unit_tokens // store.context
    while unit < store.units and not store.ledger.spine_rows[unit]:
        if stop is not None:
            stop.check()
        wanted = min(unit_rows, store.spine_rows - unit * unit_rows)
        block = list(islice(rows, wanted))
        if block:
            tokens = np.stack([row.tokens for row in block])
            document = np.stack([row.document for row in block])
            store.commit_spine(unit, tokens, document, block[-1].end)
        if len(block) < wanted:
            return True
        unit += 1
    return False


def written(
    where: str | Place, source: TextSource, tokenizer: Tokenizer, stop: Stop, bad: Bad
) -> Exception | None:
    """Write the spine of the store at `where`; None, or the failure as the user is told it.

    Raises:
        Interrupted: `stop` did.
    """
    try:
        write_spine(Store.open(where), source, tokenizer, stop, bad)
    except Exception as error:
        failure: Exception | None = machine.answer(error)
        if failure is None:
            traceback.print_exc()  # a defect of ours: what a text can cause is a PipelineError
            reason = f"{type(error).__name__}: {first_line(error)}"
            failure = RuntimeError(f"the text could not be stored ({reason})")
        return failure
    return None


# -- the child, seen from its parent ---------------------------------------------------------------


# Engines send these to every process of a step. The child answers none: its parent says when to
# stop, and if that is gone, the end of the line does.
_SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2),
)
_DEATHS = 3  # of children, one behind the other, between which nothing was committed


@contextmanager
def _blocked() -> Iterator[None]:
    """Hold signals back in this thread; a process that is begun meanwhile never has them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Begun(NamedTuple):
    """A child process that loads what it needs, and waits for its work."""

    line: Connection
    child: subprocess.Popen[bytes]

    def end(self) -> None:
        """End the child, behind the unit that it is writing if that takes no second."""
        self.line.close()
        self.child.wait()


class SpineProcess:
    """A child process that writes a store's spine. One that dies is started again."""

    def __init__(
        self,
        store: Store,
        source: TextSource,
        tokenizer: Tokenizer,
        bad: Bad = "stop",
        begun: Begun | None = None,
    ) -> None:
        """Give the work to `begun`, or to a new child."""
        self._store = store
        self._work = (store.name, source, tokenizer, bad)
        self._deaths = 0  # since the last commit
        self._committed = 0  # units at the last death
        self._start(begun or self.begin())

    @staticmethod
    def begin() -> Begun:
        """A child without work yet."""
        # A new interpreter: a fork would copy threads' locks and a GPU's context. Not by
        # multiprocessing, which would run the parent's main module there again, and so import
        # torch: 4 seconds of both cores.
        line, theirs = Pipe()
        command = child.command("residual_saes.harvest.spine_writer", str(theirs.fileno()))
        # In a process group of its own, which a terminal's Ctrl-Z does not reach.
        with _blocked():
            process = subprocess.Popen(
                command, env=child.environment(), pass_fds=[theirs.fileno()], process_group=0
            )
        theirs.close()
        return Begun(line, process)

    def _start(self, begun: Begun) -> None:
        self._line, self._child = begun
        with suppress(BrokenPipeError, ConnectionResetError):  # it died: `finished` sees that
            self._line.send(self._work)

    def finished(self) -> bool:
        """Whether the child has written all.

        Raises:
            PipelineError: it failed; what it raised.
            TemporaryError: it died, again and again.
            RuntimeError: a defect.
        """
        if not self._line.poll():
            return False
        try:
            failure = self._line.recv()
        except (EOFError, ConnectionResetError):
            self._start_again()
            return False
        if failure is not None:
            raise failure
        return True

    def _start_again(self) -> None:
        """Start the child that has died again, as long as one commits something before it dies."""
        code = self._child.wait()
        self._line.close()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._store.refresh()
        committed = int(np.count_nonzero(self._store.ledger.spine_rows))
        self._deaths = self._deaths + 1 if committed == self._committed else 1
        self._committed = committed
        _, cursor = self._store.spine_cursor()
        death = (
            f"the process that reads the text was ended ({how}) behind document {cursor.document:,}"
        )
        if self._deaths == _DEATHS:
            raise TemporaryError(
                f"{death}, {_DEATHS} times; what it committed is intact, and the same command goes "
                "on. If it ends there again, one of the next documents is more than the machine's "
                "memory or the tokenizer can take: begin another store= with a text without it, or "
                "in shorter documents"
            )
        tell(f"{death}; it is started again")
        self._start(self.begin())

    def stop(self) -> None:
        """End the child: see `Begun`."""
        Begun(self._line, self._child).end()


# -- the child itself ------------------------------------------------------------------------------


class Parent:
    """The parent seen from its child: gone once it closes its end of the line."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def check(self) -> None:
        """Raise `Interrupted` if the parent is gone."""
        self.sleep(0.0)

    def sleep(self, seconds: float) -> None:
        """Sleep; raise `Interrupted` as soon as the parent is gone."""
        if self._line.poll(seconds):
            raise Interrupted(signal.SIGTERM)


def work(
    line: Connection, name: str, source: TextSource, tokenizer: Tokenizer, bad: Bad = "stop"
) -> None:
    """Write the spine of the store `name`, and answer with None or the failure."""
    parent = Parent(line)
    retry.sleep = parent.sleep  # a server may ask for ten minutes
    try:
        failure = written(name, source, tokenizer, parent, bad)
    except Interrupted:
        return
    # A parent that is gone reads no answer. Its next start finds what is committed.
    with suppress(BrokenPipeError, ConnectionResetError):
        line.send(failure)


def end_with_parent(line: Connection) -> None:
    """End this process soon after its parent is gone, whatever it waits for.

    What is committed survives that.
    """
    with suppress(OSError):  # the line is closed here: the work is done
        line.poll(None)
        time.sleep(GRACE_S)
        os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as line, suppress(EOFError):  # the parent may be gone already
        arguments = line.recv()
        threading.Thread(target=end_with_parent, args=(line,), daemon=True).start()
        work(line, *arguments)
