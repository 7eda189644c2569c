"""Waiting for the units that other ranks have in hand."""

from __future__ import annotations

import time
from collections.abc import Sequence

from data.journal import duration, tell
from data.store.claims import Claims
from data.store.store import Store
from harvest.spine import POLL_S

PATIENCE_S = 60.0  # without a commit by another rank
PATIENCE_UNITS = 10  # or this many times the seconds of a unit here, if that is longer


class Others:
    """The other ranks of a store.

    Without locks, nobody knows whether a rank lives. A rank that commits nothing for long then
    counts as dead, and its units are taken over.
    """

    def __init__(self, claims: Claims, patience_s: float = PATIENCE_S) -> None:
        self._claims = claims
        self._patience_s = patience_s
        self._missing = -1  # units, at the last look
        self._since = time.monotonic()  # since when that number has not changed
        self.unit_s = 0.0  # seconds that this process took for its last unit

    def wait(self, store: Store, layers: Sequence[int]) -> None:
        """Wait a moment for other ranks' commits; take over from ranks that count as dead."""
        missing = len(store.missing(layers))
        if missing != self._missing:
            self._missing = missing
            self._since = time.monotonic()
        silence = time.monotonic() - self._since
        patience = max(self._patience_s, PATIENCE_UNITS * self.unit_s)
        if not self._claims.exact and silence > patience:
            tell(
                f"no other rank has committed anything for {duration(silence)}: taking over their "
                f"{missing} units"
            )
            self._claims.take_over()
        time.sleep(POLL_S)
