"""Looking at a store: is every byte what was committed, how far is it, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data import order
from data.journal import duration, size
from data.rows import split, summary
from data.rows.reader import WINDOW
from data.store import retention
from data.store.arrays import rows_name
from data.store.kinds import BOS, ORDINARY, OUTLIER
from data.store.ledger import RESIDUALS
from data.store.place import Place
from data.store.store import Store

_SAMPLED = 8  # units whose documents are counted
_RECENT = 20  # units from whose records' times the present rate is taken
# deviations of the median channel: a channel whose mean is farther from 0 dominates every norm
_MASSIVE = 50.0


def status(place: Place) -> Iterator[str]:
    """How far a store is and what is in it, in lines."""
    store = Store.open(place)
    end, pieces = store.spine_end, int(store.ledger.pieces.sum())
    tokens = int(store.ledger.spine_rows.sum()) * store.context
    spine = f"{tokens:,} tokens" + ("" if end else f" of {store.rows:,}, still being read")
    if end and not store.spine_complete:
        spine += ", units of the text missing: harvest again"
    if end and end.ended_early:
        spine += f", where the text ended ({store.planned_rows * store.context:,} were asked for)"
    yield f"{store.name}: {spine}, in {pieces:,} pieces of documents, model {store.manifest['model']['id']}"
    for layer in store.layers:
        yield from _layer_status(store, layer)
    yield from retention.read(place).status(place, store.units)
    if rate := _rate(store):
        yield rate


def _layer_status(store: Store, layer: int) -> Iterator[str]:
    committed = store.committed(layer)
    nbytes = sum(store.place.sizes(rows_name(layer)).values())
    retained = retention.read(store.place)
    kept = [unit for unit in np.flatnonzero(committed).tolist() if not retained.is_freed(unit)]
    rows = int(store.ledger.spine_rows.astype(np.int64)[kept].sum()) * store.context
    yield (
        f"layer {layer}: {int(committed.sum())} of {store.units} units, {size(nbytes)} "
        f"({nbytes / max(rows, 1):,.0f} bytes a token, codec {store.manifest['codec']})"
    )
    if store.complete(layer):
        yield from (f"    {line}" for line in layer_statistics(store, layer))
        yield f"    a training batch mixes about {effective_documents(store):,.0f} documents"
    if halved := np.count_nonzero(store.batches(layer)):
        yield f"    {halved} units were made with less than batch={store.manifest['batch']} (oom=halve)"


def layer_statistics(store: Store, layer: int) -> Iterator[str]:
    """What a complete layer's rows are like."""
    whole = summary.read(store, layer)
    counts, sums = whole.counts.sum(0), whole.norm_sums.sum(0)
    ordinary = whole.of(split.TRAINING, (ORDINARY,))
    deviation = np.sqrt(ordinary.variance)
    gamma = float(np.linalg.norm(ordinary.mean) / np.linalg.norm(deviation))
    massive = np.flatnonzero(np.abs(ordinary.mean) > _MASSIVE * np.median(deviation))
    norms = sums / np.maximum(counts, 1)
    yield (
        f"mean norm {norms[ORDINARY]:.4g} (BOS {norms[BOS]:.4g}, outliers {norms[OUTLIER]:.4g}); "
        f"gamma = |mean| / |deviation| = {gamma:.3g}"
    )
    bad = store.non_finite(layer)
    yield (
        f"{counts[BOS]:,} BOS, {counts[OUTLIER]:,} outliers, {bad:,} not finite; massive channels "
        f"(|mean| > {_MASSIVE:g} median deviations): {', '.join(map(str, massive[:8])) or 'none'}"
        + (f" and {len(massive) - 8} more" if len(massive) > 8 else "")
    )
    if (lost := summary.variance_lost(store, layer)) is not None:
        yield f"share of variance lost by codec={store.manifest['codec']}: {lost:.2e}"


def effective_documents(store: Store) -> float:
    """1 / P(two rows of a training batch are of one document), for the reader's window; from a few
    units.

    Two rows of a window come from one chunk with probability 1/K and else from one unit with 1/U;
    rows of one unit share a document with probability sum (n_d / n)^2, since they were permuted in
    it.
    """
    share = []
    for unit in order.permutation(store.units, 0)[:_SAMPLED]:
        counts = np.unique(store.document(int(unit)), return_counts=True)[1].astype(np.float64)
        share.append(np.square(counts / counts.sum()).sum())
    span = retention.read(store.place).span or store.units
    units = min(span, store.units)  # that are shuffled together
    window = min(WINDOW, units * store.chunks)
    same_unit = 1 / window + (1 - 1 / window) / units
    return float(1 / (same_unit * np.mean(share)))


def _rate(store: Store) -> str | None:
    """Tokens per second by the times of the newest records; for show only."""
    times = sorted(store.place.times(RESIDUALS))[-_RECENT:]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    rate = (len(times) - 1) * store.unit_tokens / (times[-1] - times[0])
    lacking = len(store.missing(store.layers))
    left = f", {duration(lacking * store.unit_tokens / rate)} to go at this rate" if lacking else ""
    return f"last {len(times)} commits: {rate:,.0f} tokens/s{left}"
