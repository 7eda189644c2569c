"""The spine: which token stands where. One process reads the text; all that make residuals follow
what it commits.

Reading, tokenising and packing run ahead in a process of their own, so that neither waits for the
interpreter of the one that feeds the device.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from data.errors import Interrupted, PipelineError, StopRequest, StoreError
from data.journal import tell
from data.store import claims
from data.store.claims import Claims
from data.store.store import SpineEnd, Store
from data.text import packing, retry
from data.text.documents import TextSource
from harvest.tokens import Tokenizer

POLL_S = (
    0.1  # between looks for what other processes commit; a look lists all records, 40 ms for 30,000
)


def write(store: Store, source: TextSource, tokenizer: Tokenizer, stop: Any = None) -> None:
    """Commit the spine units that are missing, and the spine's end.

    Args:
        stop: its `check` is called before every unit and raises to stop.

    Raises:
        StoreError: the text gives out before one row is full.
    """
    ended = False
    while not ended and not store.ledger.spine_rows[: store.units].all():
        ended = _fill_gap(store, source, tokenizer, stop)
    if store.spine_end is None:
        rows = int(store.ledger.spine_rows.sum())
        if rows == 0:
            raise StoreError(
                f"the text ends before one row of context={store.context} tokens is full; give more text"
            )
        store.close_spine(SpineEnd(rows, ended_early=rows < store.planned_rows))


def _fill_gap(store: Store, source: TextSource, tokenizer: Tokenizer, stop: Any) -> bool:
    """Write from the first missing unit to the next that is there; whether the text came to its
    end.
    """
    unit, cursor = store.spine_cursor()
    documents = packing.tokenized(source.documents(cursor.state), tokenizer.encode)
    rows = packing.pack(documents, cursor, store.context, tokenizer.bos)
    unit_rows = store.unit_tokens // store.context
    while unit < store.units and not store.ledger.spine_rows[unit]:
        if stop is not None:
            stop.check()
        wanted = min(unit_rows, store.spine_rows - unit * unit_rows)
        block = list(islice(rows, wanted))
        if block:
            tokens, document = (
                np.stack([row.tokens for row in block]),
                np.stack([row.document for row in block]),
            )
            store.commit_spine(unit, tokens, document, block[-1].end)
        if len(block) < wanted:
            return True
        unit += 1
    return False


class _Parent:
    """Stops the writing process when the one that started it is gone or closes its end of the
    line.
    """

    def __init__(self, line: Connection) -> None:
        self._line = line

    def check(self) -> None:
        self.pause(0.0)

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the order to stop."""
        if self._line.poll(seconds):
            raise Interrupted(signal.SIGTERM)


def _work(line: Connection, name: str, source: TextSource, tokenizer: Tokenizer) -> None:
    """The writing process: answers with None, or with what a user is to be told of its failure."""
    parent = _Parent(line)
    retry.sleep = parent.pause  # a server may ask for ten minutes of patience
    try:
        write(Store.open(name), source, tokenizer, parent)
        _answer(line, None)
    except PipelineError as error:
        _answer(line, str(error))
    except Interrupted:
        pass


def _answer(line: Connection, failure: str | None) -> None:
    """To a parent that has left already there is nothing to say: what is committed, its next start
    will find.
    """
    with suppress(BrokenPipeError, ConnectionResetError):
        line.send(failure)


class Spine:
    """The spine as one of many processes sees it. A context manager: leaving it ends the writing
    process.
    """

    def __init__(
        self,
        store: Store,
        rights: Claims,
        source: TextSource,
        tokenizer: Tokenizer,
        stop: StopRequest,
    ) -> None:
        self._store, self._claims, self._stop = store, rights, stop
        self._job = source, tokenizer
        self._writer: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._looked = 0.0

    def __enter__(self) -> Spine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.close()
        if self._writer is not None:
            self._writer.wait()
            self._claims.release(claims.SPINE)

    def ready(self, unit: int) -> bool:
        """Whether the spine of `unit` is committed, as of a moment ago."""
        rows = self._store.ledger.spine_rows
        if not rows[unit] and time.monotonic() - self._looked > POLL_S:
            self.follow()
        return bool(rows[unit])

    def wait(self, unit: int | None = None) -> None:
        """Come back when the spine of `unit` is committed; None: all of it.

        Raises:
            StoreError: the text failed, or ended before `unit`.
            Interrupted: a signal came.
        """
        while not self._store.spine_complete and not (unit is not None and self.ready(unit)):
            self._stop.check()
            self.follow()
            time.sleep(POLL_S)

    def follow(self) -> None:
        """Take in what is committed, and see to it that somebody goes on writing."""
        self._looked = time.monotonic()
        self._store.refresh()
        if self._store.spine_complete:
            return
        if self._writer is None:
            if self._claims.take(claims.SPINE):
                self._start()
            return
        assert self._line is not None
        if self._line.poll():
            self._hear(self._line)

    def _start(self) -> None:
        # A new interpreter: a fork would copy threads' locks and a GPU's context. And not by
        # multiprocessing, which would run the parent's main module there again, and so import
        # torch: 4 seconds of both cores.
        self._line, theirs = Pipe()
        command = [sys.executable, "-m", "harvest.spine", str(theirs.fileno())]
        # In a group of its own, where Ctrl-C does not reach it: the parent says when to stop.
        self._writer = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0)
        theirs.close()
        self._line.send((self._store.name, *self._job))

    def _hear(self, line: Connection) -> None:
        try:
            failure = line.recv()
        except EOFError as error:
            raise StoreError(
                "the process that reads the text died; what it committed is intact: run the same command again"
            ) from error
        if failure is not None:
            raise StoreError(failure)
        self._store.refresh()


def tell_end(store: Store) -> None:
    """Say so if the text had less than was asked for."""
    end = store.spine_end
    if end is not None and end.ended_early:
        planned = store.planned_rows * store.context
        tell(f"the text ended at {store.rows:,} of {planned:,} tokens: the store ends there")


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as end, suppress(EOFError):  # the parent may be gone already
        _work(end, *end.recv())
