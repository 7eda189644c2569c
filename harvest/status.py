"""How far a store is, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from residual_saes.data import order
from residual_saes.data.journal import duration, size
from residual_saes.data.rows import split, summary
from residual_saes.data.rows.reader import WINDOW
from residual_saes.data.site import HookPoint
from residual_saes.data.store import retention
from residual_saes.data.store.arrays import rows_name
from residual_saes.data.store.kinds import BOS, ORDINARY, OUTLIER
from residual_saes.data.store.ledger import RESIDUALS
from residual_saes.data.store.place import Place
from residual_saes.data.store.store import Store
from residual_saes.data.store.thin import Thin
from residual_saes.harvest.encoder import left_out

_SAMPLED = 8  # units whose documents are counted
_RECENT = 20  # newest records, whose times give the present rate
_MASSIVE = 50.0  # median deviations: a channel whose mean is farther from 0 dominates every norm


def status(place: Place) -> Iterator[str]:
    """How far a store is and what is in it, in lines."""
    store = Store.open(place)
    yield _spine_status(store)
    yield from left_out(store)
    for point in store.points:
        yield from _point_status(store, point)
    retained = retention.read(place)
    yield from retained.status(place, store.units)
    if not isinstance(retained, Thin) and (rate := _rate(store)):
        yield rate


def _spine_status(store: Store) -> str:
    end = store.spine_end
    pieces = int(store.ledger.pieces.sum())
    tokens = int(store.ledger.spine_rows.sum()) * store.context
    model = store.manifest["model"]["id"]
    spine = f"{tokens:,} tokens"
    if end is None:
        spine += f" of {store.rows:,}, still being read"
    elif not store.spine_complete:
        spine += ", units of the text missing: harvest again"
    if end and end.ended_early:
        spine += f", where the text ended ({store.planned_rows * store.context:,} were asked for)"
    return f"{store.name}: {spine}, in {pieces:,} pieces of documents, model {model}"


def _point_status(store: Store, point: HookPoint) -> Iterator[str]:
    committed = store.committed(point)
    nbytes = store.ledger.nbytes[rows_name(point)]
    retained = retention.read(store.place)
    kept = [unit for unit in np.flatnonzero(committed).tolist() if not retained.is_freed(unit)]
    rows = int(store.ledger.spine_rows.astype(np.int64)[kept].sum()) * store.context
    yield (
        f"{point}: {int(committed.sum())} of {store.units} units, {size(nbytes)} "
        f"({nbytes / max(rows, 1):,.0f} bytes a token, codec {store.manifest['codec']})"
    )
    if store.complete(point):
        for line in point_statistics(store, point):
            yield f"    {line}"
        yield f"    a training batch mixes about {effective_documents(store):,.0f} documents"
    if halved := np.count_nonzero(store.batches(point)):
        batch = store.manifest["batch"]
        yield f"    {halved} units were made with less than batch={batch} (oom=halve)"


def point_statistics(store: Store, point: HookPoint) -> Iterator[str]:
    """Norms, kinds of rows and massive channels of a complete hook point, in lines."""
    whole = summary.read(store, point)
    counts = whole.counts.sum(0)
    ordinary = whole.of(split.TRAINING, (ORDINARY,))
    deviation = np.sqrt(ordinary.variance)
    gamma = float(np.linalg.norm(ordinary.mean) / np.linalg.norm(deviation))
    massive = np.flatnonzero(np.abs(ordinary.mean) > _MASSIVE * np.median(deviation))
    norms = whole.norm_sums.sum(0) / np.maximum(counts, 1)
    yield (
        f"mean norm {norms[ORDINARY]:.4g} (BOS {norms[BOS]:.4g}, outliers {norms[OUTLIER]:.4g}); "
        f"gamma = |mean| / |deviation| = {gamma:.3g}"
    )
    bad = store.non_finite(point)
    listed = ", ".join(map(str, massive[:8])) or "none"
    if len(massive) > 8:
        listed += f" and {len(massive) - 8} more"
    yield (
        f"{counts[BOS]:,} BOS, {counts[OUTLIER]:,} outliers, {bad:,} not finite; massive channels "
        f"(|mean| > {_MASSIVE:g} median deviations): {listed}"
    )
    if (lost := summary.variance_lost(store, point)) is not None:
        yield f"share of variance lost by codec={store.manifest['codec']}: {lost:.2e}"


def effective_documents(store: Store) -> float:
    """Documents that a training batch mixes: 1 / P(two of its rows are of one document).

    Two rows of the reader's window come from one chunk with probability 1/K, and else from one unit
    with 1/U. Rows of one unit share a document with probability sum (n_d / n)^2, since they were
    permuted in it; its mean is taken over a few units.
    """
    same_document: list[float] = []
    retained = retention.read(store.place)
    units_there = retained.kept if isinstance(retained, Thin) else range(store.units)
    for index in order.permutation(len(units_there), 0)[:_SAMPLED]:
        _, counts = np.unique(store.document(units_there[int(index)]), return_counts=True)
        shares = counts.astype(np.float64) / counts.sum()
        same_document.append(float(np.square(shares).sum()))
    span = retained.span or store.units
    units = min(span, store.units)  # units that are shuffled together
    window = min(WINDOW, units * store.chunks)  # chunks
    same_unit = 1 / window + (1 - 1 / window) / units
    return float(1 / (same_unit * np.mean(same_document)))


def _rate(store: Store) -> str | None:
    """Tokens/s by the times of the newest records; None where they tell nothing."""
    times = sorted(store.place.times(RESIDUALS))[-_RECENT:]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    rate = (len(times) - 1) * store.unit_tokens / (times[-1] - times[0])
    lacking = store.lacking(store.points)
    left = f", {duration(lacking * store.unit_tokens / rate)} to go at this rate" if lacking else ""
    return f"last {len(times)} commits: {rate:,.0f} tokens/s{left}"
