"""The statistics of a whole hook point: of all training units together, and of all held-out ones.

They follow from the units' own, which are 0.12 MB each at width 2560. A billion tokens have 1.9 GB
of them: too much to read whenever a reader is opened. So the harvest merges them once, in the order
of the units. A process that finds no summary merges them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.data.rows.split import HELD_OUT, TRAINING, parts
from residual_saes.data.site import HookPoint, Point
from residual_saes.data.store import records
from residual_saes.data.store.arrays import KINDS
from residual_saes.data.store.kinds import ORDINARY
from residual_saes.data.store.moments import Moments, merge_all
from residual_saes.data.store.store import Store


class Summary(NamedTuple):
    """Statistics of one complete hook point by [TRAINING, HELD_OUT] x [BOS, OUTLIER, ORDINARY]."""

    counts: NDArray[np.int64]  # (2, 3) rows
    norm_sums: NDArray[np.float64]  # (2, 3) sums of their norms
    moments: NDArray[np.float64]  # (2, 3, 2, d) mean, sum of squared deviations

    def of(self, part: int, kinds: tuple[int, ...]) -> Moments:
        """Moments of the rows of some kinds."""
        chosen = [
            Moments(int(self.counts[part, kind]), *self.moments[part, kind]) for kind in kinds
        ]
        return merge_all(chosen, self.moments.shape[-1])


def read(store: Store, point: Point) -> Summary:
    """The summary of a complete hook point; merged again if the harvest was stopped before it."""
    key = _key(point)
    try:
        data = store.place.read(key)
    except FileNotFoundError:
        return make(store, point)
    record = records.decode(data, f"{store.name}/{key}")
    moments = store.arrays.summary(point).read(store.place, 0, 2)
    return Summary(np.array(record["counts"]), np.array(record["norm_sums"]), moments)


def exists(store: Store, point: Point) -> bool:
    """Whether the summary of a hook point is committed."""
    return store.place.exists(_key(point))


def write(store: Store, point: Point) -> None:
    """Commit the summary of a complete hook point, if it is not there."""
    if exists(store, point):
        return
    summary = make(store, point)
    record = {
        "counts": summary.counts.tolist(),
        "norm_sums": summary.norm_sums.tolist(),
        "objects": store.write(store.arrays.summary(point), 0, summary.moments),
    }
    store.commit(_key(point), record)


def make(store: Store, point: Point, of: Sequence[Sequence[int]] | None = None) -> Summary:
    """Merge the units' statistics.

    Args:
        of: [training, held-out] units; None: all.
    """
    summary = Summary(
        counts=np.zeros((2, KINDS), np.int64),
        norm_sums=np.zeros((2, KINDS)),
        moments=np.zeros((2, KINDS, 2, store.d_model)),
    )
    for part, units in enumerate(parts(store) if of is None else of):
        merged = [Moments.empty(store.d_model)] * KINDS
        of_units = store.unit_moments(point, units)
        for unit, of_unit in zip(units, of_units, strict=True):
            merged = list(map(Moments.merge, merged, of_unit))
            summary.norm_sums[part] += store.norm_sums(point, unit)
        for kind, moments in enumerate(merged):
            summary.counts[part, kind] = moments.count
            summary.moments[part, kind] = moments.mean, moments.m2
    return summary


def variance_lost(store: Store, point: Point) -> float | None:
    """The share of the ordinary rows' variance that a lossy codec lost; None if lossless.

    That is the squared error of storing them over their squared deviations from the mean.
    """
    if store.lossless:
        return None
    summary = read(store, point)
    squares = [summary.of(part, (ORDINARY,)).m2.sum() for part in (TRAINING, HELD_OUT)]
    lost = sum(store.lost(point, unit) for unit in range(store.units))
    return lost / sum(map(float, squares))


def _key(point: Point) -> str:
    return f"commits/summaries/{HookPoint.of(point).record_name}.json"
