"""The statistics of a whole layer: those of all training units together, and of all held-out ones.

They follow from the units' own, which are 0.12 MB each at width 2560: 1.9 GB for a billion tokens,
too much to read whenever a layer is opened. So the harvest merges them once, in the order of the
units, and whoever finds them missing does it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.rows.split import HELD_OUT, TRAINING, parts
from data.store import records
from data.store.kinds import ORDINARY
from data.store.moments import Moments, merge_all
from data.store.store import KINDS, Store


class Summary(NamedTuple):
    """Statistics of one complete layer by [TRAINING, HELD_OUT] x [BOS, OUTLIER, ORDINARY]."""

    counts: NDArray[np.int64]  # (2, 3) rows
    norm_sums: NDArray[np.float64]  # (2, 3) of their norms
    moments: NDArray[np.float64]  # (2, 3, 2, d) mean, sum of squared deviations

    def of(self, part: int, kinds: tuple[int, ...]) -> Moments:
        """Moments of the rows of some kinds."""
        chosen = (
            Moments(int(self.counts[part, kind]), *self.moments[part, kind]) for kind in kinds
        )
        return merge_all(chosen, self.moments.shape[-1])


def read(store: Store, layer: int) -> Summary:
    """The summary of a complete layer; made anew if the harvest was stopped before it could."""
    key = _key(layer)
    if not store.place.exists(key):
        return make(store, layer)
    body = records.decode(store.place.read(key), f"{store.name}/{key}")
    moments = store.array(f"summary_{layer}").read(store.place, 0, 2)
    return Summary(np.array(body["counts"]), np.array(body["norm_sums"]), moments)


def write(store: Store, layer: int) -> None:
    """Commit the summary of a complete layer, if it is not there."""
    if store.place.exists(_key(layer)):
        return
    summary = make(store, layer)
    objects = store.write(f"summary_{layer}", 0, summary.moments)
    counts, norm_sums = summary.counts.tolist(), summary.norm_sums.tolist()
    store.commit(_key(layer), {"counts": counts, "norm_sums": norm_sums, "objects": objects})


def make(store: Store, layer: int, of: Sequence[Sequence[int]] | None = None) -> Summary:
    """Merge the units' statistics.

    Args:
        of: [training, held-out] units; None: all.
    """
    counts, norm_sums = np.zeros((2, KINDS), np.int64), np.zeros((2, KINDS))
    moments = np.zeros((2, KINDS, 2, store.d_model))
    for part, units in enumerate(parts(store) if of is None else of):
        merged = [Moments.empty(store.d_model)] * KINDS
        for unit in units:
            merged = [
                whole.merge(one)
                for whole, one in zip(merged, store.unit_moments(layer, unit), strict=True)
            ]
            norm_sums[part] += store.norm_sums(layer, unit)
        counts[part] = [one.count for one in merged]
        moments[part] = [[one.mean, one.m2] for one in merged]
    return Summary(counts, norm_sums, moments)


def variance_lost(store: Store, layer: int) -> float | None:
    """Squared error of a lossy codec over the variance of the ordinary rows it stored; None for a
    lossless one.
    """
    if store.manifest["codec"] != "int8":
        return None
    whole = read(store, layer)
    spread = sum(float(whole.of(part, (ORDINARY,)).m2.sum()) for part in (TRAINING, HELD_OUT))
    return sum(store.lost(layer, unit) for unit in range(store.units)) / spread


def _key(layer: int) -> str:
    return f"commits/summaries/{layer:05d}.json"
