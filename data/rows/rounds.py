"""Rounds: which units of a layer training shuffles together.

Inside a round the reader (data/rows/reader.py) shuffles; between rounds nothing is mixed. Of a
whole store each round is a pass over all training units, without end. Of a ring each round is the
next `span` training units, and the stream ends with the last one (data/rows/groups.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import StoreError
from data.journal import Progress
from data.rows import summary
from data.rows.follower import Follower, FollowsNobody
from data.rows.split import EXCLUDED, Policy, require_complete, training_units
from data.rows.summary import Summary
from data.store import retention
from data.store.store import Store


class Rounds(Protocol):
    """The rounds of one layer's stream, which is cut into batches."""

    rows: int  # kept rows of one pass; in a ring, a lower bound
    most_units: int  # in a round
    statistics: Summary  # of the training rows and of the held-out rows

    def units(self, number: int) -> list[int]:
        """The units of a round."""
        ...

    def ready(self, number: int) -> bool:
        """Whether every unit of a round can be read now."""
        ...

    def locate(self, batch: int) -> tuple[int, int]:
        """The round in which a batch begins, and how many of the round's rows come before it."""
        ...

    def has(self, batch: int) -> bool:
        """Whether all rows of a batch can be read now, or none will follow."""
        ...

    def ended(self) -> StoreError:
        """Why a round is not ready."""
        ...

    def follower(self, name: str, run: str) -> Follower:
        """How a training run follows the harvest; nothing is registered yet.

        Args:
            name: of the run's registration, safe as a file's name.
            run: what users are told that the harvest waits for.
        """
        ...


class Passes:
    """The rounds of a whole store: passes over all training units, one after another."""

    def __init__(self, kept: KeptRows, batch: int) -> None:
        """Raise StoreError unless the layer is complete."""
        self._batch = batch
        self._units = training_units(kept.store)
        require_complete(kept.store, kept.layer)
        self.rows = int(kept.of_chunks(self._units).sum())
        self.most_units = len(self._units)
        self.statistics = summary.read(kept.store, kept.layer)

    def units(self, number: int) -> list[int]:
        return self._units

    def ready(self, number: int) -> bool:
        return True

    def locate(self, batch: int) -> tuple[int, int]:
        return divmod(batch * self._batch, self.rows)

    def has(self, batch: int) -> bool:
        return True

    def ended(self) -> StoreError:
        raise AssertionError("the passes over a whole store have no end")

    def follower(self, name: str, run: str) -> Follower:
        return FollowsNobody()


class Excluded(NamedTuple):
    """The rows of one unit that drop_tokens alone leaves out."""

    of_chunks: NDArray[np.int64]  # (C,) of every inner chunk
    energy: float  # sum of their squared norms


@dataclass(frozen=True)
class KeptRows:
    """Which rows of a layer a reader serves, as the store's records count them."""

    store: Store
    layer: int
    policy: Policy
    _excluded: dict[int, Excluded] = field(default_factory=dict)  # by unit, as far as asked for

    def of_chunks(self, units: Sequence[int]) -> NDArray[np.int64]:
        """(units, C) rows to serve of every inner chunk of some committed units."""
        counts = self.store.ledger.point(self.layer).chunks
        # Kind by kind, for all units at once: 0.05 s for a billion tokens' million chunks, where a
        # loop over units takes 0.4 s.
        of_kinds = [counts[units, :, kind] for kind in self.policy.kinds]
        kept: NDArray[np.int64] = np.sum(of_kinds, axis=0, dtype=np.int64)
        if self.policy.drop_tokens and len(units):
            kept -= np.stack([excluded.of_chunks for excluded in self.excluded(units)])
        return kept

    def excluded(self, units: Sequence[int]) -> list[Excluded]:
        """What drop_tokens leaves out of each unit. Records do not have it: some 3 ms a unit."""
        fresh = [unit for unit in units if unit not in self._excluded]
        progress = Progress(quiet_s=5.0)
        with ThreadPoolExecutor(self.store.place.threads) as pool:
            for unit, excluded in zip(fresh, pool.map(self._count_excluded, fresh), strict=True):
                self._excluded[unit] = excluded
                progress.show(f"drop_tokens: counted in {len(self._excluded):,} units")
        progress.close()
        return [self._excluded[unit] for unit in units]

    def _count_excluded(self, unit: int) -> Excluded:
        kinds = self.policy.kinds_of(self.store, self.layer, unit)
        rows = np.flatnonzero(kinds >= EXCLUDED)
        chunks = rows // self.store.manifest["chunk"]
        norms = self.store.norms(self.layer, unit)[rows].astype(np.float64)
        counts = np.bincount(chunks, minlength=self.store.chunks)
        return Excluded(counts, float(np.square(norms).sum()))

    def candidates(self, units: Sequence[int]) -> int:
        """Rows of some units, less those that are dropped as BOS or by their token.

        They are known before the rows are made.
        """
        ledger = self.store.ledger
        tokens = int(ledger.spine_rows[units].sum(dtype=np.int64)) * self.store.context
        rows = tokens - int(ledger.pieces[units].sum()) * self.policy.drop_bos
        if self.policy.drop_tokens:
            rows -= sum(map(self._tokens_dropped, units))
        return rows

    def _tokens_dropped(self, unit: int) -> int:
        """Tokens of a unit that drop_tokens names, less those that are dropped as BOS."""
        dropped = self.policy.tokens_dropped(self.store, unit)
        if self.policy.drop_bos:
            dropped &= ~self.store.piece_starts(unit).ravel()
        return int(dropped.sum())


def rounds_of(kept: KeptRows, batch: int, poll_s: float) -> Rounds:
    """The rounds of a layer, by the store's retention; waits for the first round of a ring.

    Args:
        batch: rows per batch.
        poll_s: seconds between looks for what a harvest commits.

    Raises:
        SettingError: a batch is larger than a round of a ring.
        StoreError: the layer is incomplete, or not in the ring.
    """
    if retention.read(kept.store.place).span is None:
        return Passes(kept, batch)
    from data.rows.groups import Groups

    return Groups(kept, batch, poll_s)
