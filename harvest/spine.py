"""The spine (which token stands where) as one harvesting process follows it.

One process of all ranks reads the text: the rank that holds the claim, or its child. All ranks
follow what it commits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import tell
from residual_saes.data.site import HookPoint
from residual_saes.data.store.claims import SPINE, Claims
from residual_saes.data.store.manifest import exists
from residual_saes.data.store.place import place_of
from residual_saes.data.store.store import Store
from residual_saes.data.text.documents import TextSource
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.encoder import Bad, left_out
from residual_saes.harvest.spine_thread import SpineThread, is_small
from residual_saes.harvest.spine_writer import Begun, SpineProcess
from residual_saes.harvest.tokens import Tokenizer
from residual_saes.harvest.waiting import Waiting, pause


@contextmanager
def begun(config: HarvestConfig, source: TextSource) -> Iterator[Begun | None]:
    """The process that will read the text of a new store, while the model is loaded and checked.

    It loads its libraries meanwhile, for .6 s of a core. None: the text is small, or it may be
    another rank's work, or be read already.
    """
    place = place_of(config.store)
    unneeded = config.world > 1 or exists(place) or is_small(source, config.tokens, place)
    ahead = None if unneeded else SpineProcess.begin()
    try:
        yield ahead
    finally:
        if ahead:
            ahead.end()


class Spine:
    """The spine of a store. A context manager: leaving it ends whatever writes it."""

    def __init__(
        self,
        store: Store,
        points: Sequence[HookPoint],
        claims: Claims,
        source: TextSource,
        tokenizer: Tokenizer,
        stop: StopRequest,
        bad: Bad = "stop",
        begun: Begun | None = None,
    ) -> None:
        self._store = store
        self._points = points
        self._claims = claims
        self._source = source
        self._tokenizer = tokenizer
        self._stop = stop
        self._bad: Bad = bad
        self._begun = begun
        self._process: SpineProcess | SpineThread | None = None
        self._due = 0.0  # time.monotonic() of the next look
        self._waiting = Waiting()

    def __enter__(self) -> Spine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stop()
            self._claims.release(SPINE)

    def _reader(self) -> SpineProcess | SpineThread:
        """Whatever writes the spine from now on."""
        work = (self._store, self._source, self._tokenizer, self._bad)
        if is_small(self._source, self._store.manifest["tokens"], self._store.place):
            return SpineThread(*work)
        return SpineProcess(*work, self._begun)

    def ready(self, missing: Mapping[int, list[HookPoint]]) -> dict[int, list[HookPoint]]:
        """Those of the missing units whose spine is committed, as of the last look."""
        rows = self._store.ledger.spine_rows
        return {unit: points for unit, points in missing.items() if rows[unit]}

    def wait_for(self, unit: int) -> None:
        """Return once the spine of `unit` is committed.

        Raises:
            StoreError: the text failed.
            Interrupted: a signal came.
        """
        while not self._store.spine_complete and not self._store.ledger.spine_rows[unit]:
            self._wait()

    def wait(self) -> None:
        """Return once the whole spine is committed; raises like `wait_for`."""
        while not self._store.spine_complete:
            self._wait()

    def _wait(self) -> None:
        self._waiting.on("the text")
        self.pause()

    def pause(self) -> None:
        """Sleep until a look is due, and look."""
        pause(self._due - time.monotonic(), self._stop)
        self.follow()

    def is_due(self) -> bool:
        """Whether enough time has passed since the last look."""
        return time.monotonic() >= self._due

    def follow(self) -> None:
        """Take in what is committed, if that is due; see to it that the spine is written.

        Raises:
            StoreError: the text failed.
        """
        if not self.is_due():
            return
        # A listing of a bucket is a request for every 1,000 names.
        requests = self._store.look(self._points)
        self._due = time.monotonic() + self._claims.poll_s * max(1, requests)
        if self._store.spine_complete:
            return
        if self._process is None:
            if self._claims.take(SPINE):
                self._process = self._reader()
        elif self._process.finished():
            self._store.refresh()


def tell_end(store: Store) -> None:
    """Tell the user if the text had less than was asked for, and what was left out of it."""
    tell(*left_out(store))
    end = store.spine_end
    if end is not None and end.ended_early:
        planned = store.planned_rows * store.context
        tell(f"the text ended at {store.rows:,} of {planned:,} tokens: the store ends there")
