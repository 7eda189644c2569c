"""Rounds: which units of a stream training shuffles together.

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

from residual_saes.data.errors import StoreError
from residual_saes.data.journal import Progress
from residual_saes.data.rows import summary
from residual_saes.data.rows.follower import Follower, FollowsNobody
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import EXCLUDED, Policy, training_units
from residual_saes.data.rows.summary import Summary
from residual_saes.data.store import retention
from residual_saes.data.store.kinds import BOS
from residual_saes.data.store.store import Store


class Rounds(Protocol):
    """The rounds of one stream, which is cut into batches."""

    rows: int  # kept rows of one pass; in a ring, a lower bound
    most_units: int  # in a round
    # Of each source: of the training rows and of the held-out rows.
    statistics: list[Summary]

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
        """Raise StoreError unless every source is complete."""
        self._batch = batch
        self._units = training_units(kept.store)
        for source in kept.sources:
            source.require_complete()
        self.rows = int(kept.of_chunks(self._units).sum())
        self.most_units = len(self._units)
        self.statistics = [summary.read(*source) for source in kept.sources]

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


class Counted(NamedTuple):
    """What the records do not say of the rows of one unit."""

    kept: NDArray[np.int64]  # (C,) rows to serve of every inner chunk
    excluded: int  # rows that drop_tokens alone leaves out
    energy: float  # sum of their squared norms, in the first source


@dataclass(frozen=True)
class KeptRows:
    """Which rows of some sources a reader serves: those that the policy keeps in every source."""

    sources: Sequence[Source]
    policy: Policy
    _counted: dict[int, Counted] = field(default_factory=dict)  # by unit, as far as asked for

    @property
    def store(self) -> Store:
        """The store whose tokens the rows are of; a second one has the same."""
        return self.sources[0].store

    def of_chunks(self, units: Sequence[int]) -> NDArray[np.int64]:
        """(units, C) rows to serve of every inner chunk of some committed units.

        The records count them, but with drop_tokens, and where several sources drop rows of one
        chunk: these may be the same rows or not.
        """
        units = list(units)
        own = [self._of_records(source, units) for source in self.sources]
        kept: NDArray[np.int64] = np.minimum.reduce(own)
        unsure = np.zeros(kept.shape, np.bool_)
        if len(own) > 1:
            candidates = self._rows_of_chunks(units)
            drops = [self._drops(source, units, candidates) for source in self.sources]
            unsure = np.sum(drops, axis=0) > 1
        if self.policy.drop_tokens:
            unsure[:] = True
        index = np.flatnonzero(unsure.any(1))
        if len(index):
            counted = self.counted([units[at] for at in index])
            kept[index] = np.stack([of_unit.kept for of_unit in counted])
        return kept

    def _of_records(self, source: Source, units: Sequence[int]) -> NDArray[np.int64]:
        """(units, C) rows that the policy keeps of one source, whatever their token."""
        # Kind by kind, for all units at once: 0.05 s for a billion tokens' million chunks, where a
        # loop over units takes 0.4 s.
        of_kinds = [source.counts(units, kind) for kind in self.policy.kinds]
        kept: NDArray[np.int64] = np.sum(of_kinds, axis=0, dtype=np.int64)
        return kept

    def _rows_of_chunks(self, units: Sequence[int]) -> NDArray[np.int64]:
        """(units, C) stored rows of every inner chunk."""
        chunk = self.store.manifest["chunk"]
        rows = self.store.ledger.spine_rows[units].astype(np.int64) * self.store.context
        of_chunks: NDArray[np.int64] = rows[:, None] - np.arange(self.store.chunks) * chunk
        return of_chunks.clip(0, chunk)

    def _drops(
        self, source: Source, units: Sequence[int], candidates: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """(units, C) whether a source drops rows that are not BOS, which all sources have."""
        kinds = {BOS, *self.policy.kinds}
        there: NDArray[np.int64] = np.sum([source.counts(units, kind) for kind in kinds], axis=0)
        return there < candidates

    def are_shared(self, units: Sequence[int]) -> bool:
        """Whether no source drops a row of some units that another one keeps."""
        if len(self.sources) == 1:
            return True
        kept = self.of_chunks(units).sum()
        return all(self._of_records(source, units).sum() == kept for source in self.sources)

    def counted(self, units: Sequence[int]) -> list[Counted]:
        """What the kinds and tokens of each unit say: some 3 ms a unit."""
        fresh = [unit for unit in units if unit not in self._counted]
        progress = Progress(quiet_s=5.0)
        with ThreadPoolExecutor(self.store.place.threads) as pool:
            for unit, counted in zip(fresh, pool.map(self._count, fresh), strict=True):
                self._counted[unit] = counted
                progress.show(f"rows to keep: counted in {len(self._counted):,} units")
        progress.close()
        return [self._counted[unit] for unit in units]

    def _count(self, unit: int) -> Counted:
        kinds = self.policy.kinds_in(self.sources, unit)
        chunk = self.store.manifest["chunk"]
        served = np.flatnonzero(np.isin(kinds, self.policy.kinds))
        kept = np.bincount(served // chunk, minlength=self.store.chunks)
        excluded = np.flatnonzero(kinds >= EXCLUDED)
        energy = 0.0
        if len(excluded):
            norms = self.sources[0].norms(unit)[excluded].astype(np.float64)
            energy = float(np.square(norms).sum())
        return Counted(kept, len(excluded), energy)

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
    """The rounds of some sources, by the retention; waits for the first round of a ring.

    Args:
        batch: rows per batch.
        poll_s: seconds between looks for what a harvest commits.

    Raises:
        SettingError: a batch is larger than a round of a ring.
        StoreError: a source is incomplete, or not in the ring.
    """
    for source in kept.sources:
        retention.refuse_thin(source.store.place, "training")
    if retention.read(kept.store.place).span is None:
        return Passes(kept, batch)
    from residual_saes.data.rows.groups import Groups

    return Groups(kept, batch, poll_s)
