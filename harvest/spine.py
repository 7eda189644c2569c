"""The spine (which token stands where) as one harvesting process follows it.

One process of all ranks reads the text: the child of the rank that holds the claim. All ranks
follow what it commits.
"""

from __future__ import annotations

import time

from data.errors import StopRequest
from data.journal import tell
from data.store.claims import SPINE, Claims
from data.store.store import Store
from data.text.documents import TextSource
from harvest.encoder import Bad, left_out
from harvest.spine_writer import SpineProcess
from harvest.tokens import Tokenizer

# Seconds between looks for other processes' commits. A look lists all records: 40 ms for 30,000.
POLL_S = 0.1


class Spine:
    """The spine of a store. A context manager: leaving it ends the process that writes it."""

    def __init__(
        self,
        store: Store,
        claims: Claims,
        source: TextSource,
        tokenizer: Tokenizer,
        stop: StopRequest,
        bad: Bad = "stop",
    ) -> None:
        self._store = store
        self._claims = claims
        self._source = source
        self._tokenizer = tokenizer
        self._stop = stop
        self._bad: Bad = bad
        self._process: SpineProcess | None = None
        self._refreshed = 0.0  # time.monotonic() of the last look

    def __enter__(self) -> Spine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stop()
            self._claims.release(SPINE)

    def ready(self, unit: int) -> bool:
        """Whether the spine of `unit` is committed, as of the last POLL_S."""
        rows = self._store.ledger.spine_rows
        if not rows[unit] and time.monotonic() - self._refreshed > POLL_S:
            self.follow()
        return bool(rows[unit])

    def wait_for(self, unit: int) -> None:
        """Return once the spine of `unit` is committed.

        Raises:
            StoreError: the text failed.
            Interrupted: a signal came.
        """
        while not self._store.spine_complete and not self.ready(unit):
            self._pause()

    def wait(self) -> None:
        """Return once the whole spine is committed; raises like `wait_for`."""
        while not self._store.spine_complete:
            self._pause()

    def _pause(self) -> None:
        self._stop.check()
        self.follow()
        time.sleep(POLL_S)

    def follow(self) -> None:
        """Take in what is committed, and start the writing process if nobody else has.

        Raises:
            StoreError: the text failed.
        """
        self._refreshed = time.monotonic()
        self._store.refresh()
        if self._store.spine_complete:
            return
        if self._process is None:
            if self._claims.take(SPINE):
                self._process = SpineProcess(self._store, self._source, self._tokenizer, self._bad)
        elif self._process.finished():
            self._store.refresh()


def tell_end(store: Store) -> None:
    """Tell the user if the text had less than was asked for, and what was left out of it."""
    tell(*left_out(store))
    end = store.spine_end
    if end is not None and end.ended_early:
        planned = store.planned_rows * store.context
        tell(f"the text ended at {store.rows:,} of {planned:,} tokens: the store ends there")
