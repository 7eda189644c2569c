"""A small text, read by a thread of the harvest.

8,192 tokens take .2 s of a core; a process that reads them takes .6 s more, to load its libraries.
"""

from __future__ import annotations

import signal
import threading
from contextlib import suppress

from residual_saes.data.errors import Interrupted
from residual_saes.data.store.place import LocalPlace, Place
from residual_saes.data.store.store import Store
from residual_saes.data.text.documents import TextSource
from residual_saes.data.text.sources import plain_bytes
from residual_saes.harvest.encoder import Bad
from residual_saes.harvest.spine_writer import written
from residual_saes.harvest.tokens import Tokenizer

_MOST_TOKENS = 2**16  # of a store: 1.5 s of a core, beside forward passes that take far more
_MOST_BYTES = 2**26  # of the files: memory that a document may take


def is_small(source: TextSource, tokens: int, place: Place) -> bool:
    """Whether a thread reads the text of a store of so many tokens.

    The text and the store are on this machine: a thread that waits for a server cannot be ended.
    """
    if tokens > _MOST_TOKENS or not isinstance(place, LocalPlace):
        return False
    size = plain_bytes(source)
    return size is not None and size <= _MOST_BYTES


class SpineThread:
    """A thread that writes a store's spine; used like a `SpineProcess`."""

    def __init__(self, store: Store, source: TextSource, tokenizer: Tokenizer, bad: Bad) -> None:
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        arguments = (store.place, source, tokenizer, bad)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    def _write(self, place: Place, source: TextSource, tokenizer: Tokenizer, bad: Bad) -> None:
        with suppress(Interrupted):  # by `stop`
            self._failure = written(place, source, tokenizer, self, bad)

    def check(self) -> None:
        """In the thread: raise `Interrupted` once it is to stop."""
        if self._stopped.is_set():
            raise Interrupted(signal.SIGTERM)

    def finished(self) -> bool:
        """Whether it has written all.

        Raises:
            PipelineError: it failed; what it raised.
            RuntimeError: a defect.
        """
        if self._thread.is_alive():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def stop(self) -> None:
        """End the thread, behind the unit that it is writing."""
        self._stopped.set()
        self._thread.join()
