"""The table of all latents: a Parquet file of one row per latent, which pyarrow, pandas, polars or
DuckDB read.

    feature        uint32
    count          int64     rows in which it fires
    density        float64   count / rows
    mean, std      float64   of its activations where it fires (std of the population); null if it never does
    max            float32
    histogram      list<int64>, BINS long; the edges are in the file's metadata as JSON, under histogram_edges
    top            list<context>, the largest activations, one per document, descending
    quantiles      list<context with quantile>: of the quantile-th part of its activations in ascending order, some at
                   random; an activation's part is floor(parts * #(smaller activations) / count),
                   counted exactly
    raised, lowered   list<{token, logit, text}>, by analyze/directions.py; null without the language model
    neighbours     list<{feature, cosine}>, of the decoder's directions

A context is {document, position, value, peak, tokens, text, activations}: the tokens from `BEFORE`
before to `AFTER` behind its peak, as far as the document's piece goes, without BOS; `tokens[peak]`
is the peak, at `position` after the piece's BOS, and its activation `value`. A token whose row was
not encoded (run's policy) has activation 0. Activations beside the peak come from the inverted
index: nothing is encoded twice.

Block by block of latents, so memory is that of one block's contexts and one row group of the index.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analyze.contexts import AFTER, BEFORE
from analyze.studies.catalogue.index import BLOCK, Index, Postings
from analyze.studies.catalogue.state import Places, State, rank_within
from data import durable
from data.errors import StopRequest
from data.journal import Progress
from data.store.store import Store

_CONTEXT = {
    "document": pa.uint32(),
    "position": pa.uint32(),
    "value": pa.float32(),
    "peak": pa.uint8(),
    "tokens": pa.list_(pa.uint32()),
    "text": pa.list_(pa.string()),
    "activations": pa.list_(pa.float32()),
}
_LOGITS = pa.list_(pa.struct({"token": pa.uint32(), "logit": pa.float32(), "text": pa.string()}))
_SCHEMA = {
    "feature": pa.uint32(),
    "count": pa.int64(),
    "density": pa.float64(),
    "mean": pa.float64(),
    "std": pa.float64(),
    "max": pa.float32(),
    "histogram": pa.list_(pa.int64()),
    "top": pa.list_(pa.struct(_CONTEXT)),
    "quantiles": pa.list_(pa.struct({"quantile": pa.uint8(), **_CONTEXT})),
    "raised": _LOGITS,
    "lowered": _LOGITS,
    "neighbours": pa.list_(pa.struct({"feature": pa.uint32(), "cosine": pa.float32()})),
}


class Ranked(NamedTuple):
    """Of each latent some numbers with their scores, (F, K) each."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Content:
    """All that the table is made of."""

    store: Store
    index: Index
    state: State
    neighbours: Ranked
    logits: tuple[Ranked, Ranked] | None  # raised, lowered
    names: Callable[[int], str] | None  # what a token id says
    quantiles: int
    each: int  # of a quantile


class Picked(NamedTuple):
    """Places of a block's latents of which contexts are shown, by latent; (m,) each."""

    feature: NDArray[np.int64]
    token: NDArray[np.int64]  # flat position in the store's spine
    document: NDArray[np.uint32]
    value: NDArray[np.float32]
    quantile: NDArray[np.int64]


def write(path: Path, content: Content, stop: StopRequest) -> None:
    """Write the table, all at once."""
    edges = json.dumps([float(edge) for edge in content.state.edges])
    schema = pa.schema(_SCHEMA, {"histogram_edges": edges, "rows": str(content.state.rows)})
    durable.write(path, _encoded(schema, _blocks(content, stop)))


class _Sink(io.RawIOBase):
    """Takes what the Parquet writer writes until it is taken away."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        self._size += len(self.parts[-1])
        return len(self.parts[-1])

    def tell(self) -> int:
        return self._size

    def taken(self) -> list[bytes]:
        parts, self.parts = self.parts, []
        return parts


def _encoded(schema: pa.Schema, tables: Iterator[pa.Table]) -> Iterator[bytes]:
    sink = _Sink()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            yield from sink.taken()
    yield from sink.taken()


def _blocks(content: Content, stop: StopRequest) -> Iterator[pa.Table]:
    state, progress = content.state, Progress()
    top, sample, features = state.top.settled(), state.sample.settled(), len(state.count)
    for first in range(0, features, BLOCK):
        stop.check()
        block = slice(first, min(first + BLOCK, features))
        strongest = _flat(Places._make(column[block] for column in top), first)
        spread = _spread(content, Places._make(column[block] for column in sample), first)
        columns = {
            **_figures(state, block),
            "top": _contexts(content, strongest, block, with_quantile=False),
            "quantiles": _contexts(content, spread, block, with_quantile=True),
            **_logit_columns(content, block),
            "neighbours": _ranked(content.neighbours, block, ("feature", "cosine")),
        }
        yield pa.table(
            [columns[name].cast(kind) for name, kind in _SCHEMA.items()], schema=pa.schema(_SCHEMA)
        )
        progress.show(
            f"contexts of {block.stop:,}/{features:,} latents", last=block.stop == features
        )


def _figures(state: State, block: slice) -> dict[str, pa.Array]:
    count = state.count[block]
    lengths = np.arange(
        0, count.size * state.histogram.shape[1] + 1, state.histogram.shape[1], dtype=np.int32
    )
    return {
        "feature": pa.array(np.arange(block.start, block.stop)),
        "count": pa.array(count),
        "density": pa.array(count / max(state.rows, 1)),
        "mean": pa.array(state.mean[block], mask=count == 0),
        "std": pa.array(state.deviation[block], mask=count == 0),
        "max": pa.array(state.largest[block], mask=count == 0),
        "histogram": pa.ListArray.from_arrays(lengths, state.histogram[block].ravel()),
    }


# -- which places ----------------------------------------------------------------------------------


def _flat(places: Places, first: int) -> Picked:
    feature, rank = np.nonzero(places.key)
    columns = (column[feature, rank] for column in places[1:])
    return Picked._make([feature + first, *columns, np.zeros(len(feature), np.int64)])


def _spread(content: Content, sample: Places, first: int) -> Picked:
    """Of a block's samples at most `each` of every quantile, in its order."""
    every, count = _flat(sample, first), content.state.count
    smaller = _smaller(content.index, every, first)
    quantile = smaller * content.quantiles // count[every.feature]
    order = np.lexsort(
        (quantile, every.feature)
    )  # stable: in a quantile they stay in their random order
    rank = rank_within(every.feature[order] * content.quantiles + quantile[order])
    chosen = order[rank < content.each]
    return Picked._make(column[chosen] for column in every._replace(quantile=quantile))


def _smaller(index: Index, picked: Picked, first: int) -> NDArray[np.int64]:
    """(m,) how many of its latent's activations are smaller than each place's, over the whole
    index.
    """
    base = (picked.feature - first).astype(np.uint64) << np.uint64(32)
    wanted = base | picked.value.view(np.uint32)
    found = np.zeros(len(wanted), np.int64)
    for unit in index.units:
        block = index.block(unit, first // BLOCK)
        # Bits of positive floats are in the order of their values.
        keys = (block.feature.astype(np.uint64) - np.uint64(first)) << np.uint64(
            32
        ) | block.value.view(np.uint32)
        keys.sort()
        found += np.searchsorted(keys, wanted) - np.searchsorted(keys, base)
    return found


# -- contexts --------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """The tokens around m places of one unit, all in one row; lengths are the places'."""

    length: NDArray[np.int64]  # (m,)
    peak: NDArray[np.int64]  # (m,) which of its window's tokens is the place
    position: NDArray[np.int64]  # (m,) of the place after its piece's BOS
    tokens: NDArray[np.uint32]
    activations: NDArray[np.float32]


def _windows(
    store: Store, unit: int, block: Postings, feature: NDArray[np.int64], at: NDArray[np.int64]
) -> Windows:
    """What is around the tokens `at` (m,) of a unit.

    Args:
        block: where the block's latents fire in the unit.
        feature: (m,) the latent whose activations are shown.
    """
    starts = np.flatnonzero(store.piece_starts(unit).ravel())
    ids = store.tokens(unit).ravel()
    piece = np.searchsorted(starts, at, side="right") - 1
    low = np.maximum(starts[piece] + 1, at - BEFORE)
    high = np.minimum(np.append(starts, len(ids))[piece + 1], at + AFTER + 1)
    length = high - low
    inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    where = np.repeat(low, length) + inside
    keys = block.feature.astype(np.int64) * len(ids) + block.token
    wanted = np.repeat(feature, length) * len(ids) + where
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    activations = np.where(keys[found] == wanted, block.value[found], np.float32(0))
    return Windows(length, at - low, at - starts[piece], ids[where], activations)


def _contexts(
    content: Content, picked: Picked, block: slice, *, with_quantile: bool
) -> pa.ListArray:
    """One list of contexts per latent of a block."""
    index, parts, orders = content.index, list[Windows](), list[NDArray[np.int64]]()
    unit_of = picked.token // index.unit_tokens
    for unit in np.unique(unit_of).tolist():
        here = np.flatnonzero(unit_of == unit)
        at = picked.token[here] - unit * index.unit_tokens
        postings = index.block(unit, block.start // BLOCK)
        parts.append(_windows(content.store, unit, postings, picked.feature[here], at))
        orders.append(here)
    none = Windows._make(
        np.empty(0, kind) for kind in (np.int64, np.int64, np.int64, np.uint32, np.float32)
    )
    joined = Windows._make(map(np.concatenate, zip(none, *parts, strict=True)))
    inner = np.append(0, np.cumsum(joined.length)).astype(np.int32)
    by_unit = np.concatenate([np.empty(0, np.int64), *orders])
    back = pa.array(np.argsort(by_unit))
    fields = {
        "quantile": pa.array(picked.quantile),
        "document": pa.array(picked.document),
        "position": pa.array(joined.position).take(back),
        "value": pa.array(picked.value),
        "peak": pa.array(joined.peak).take(back),
        "tokens": pa.ListArray.from_arrays(inner, joined.tokens).take(back),
        "text": _texts(content.names, inner, joined.tokens).take(back),
        "activations": pa.ListArray.from_arrays(inner, joined.activations).take(back),
    }
    if not with_quantile:
        del fields["quantile"]
    per_latent = np.bincount(picked.feature - block.start, minlength=block.stop - block.start)
    offsets = np.append(0, np.cumsum(per_latent)).astype(np.int32)
    return pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays(list(fields.values()), list(fields))
    )


def _texts(
    names: Callable[[int], str] | None, offsets: NDArray[np.int32], tokens: NDArray[np.uint32]
) -> pa.Array:
    """What the tokens say, in lists like theirs; null without a tokenizer."""
    if names is None:
        return pa.nulls(len(offsets) - 1, pa.list_(pa.string()))
    return pa.ListArray.from_arrays(offsets, _named(names, tokens))


def _named(names: Callable[[int], str], ids: NDArray[Any]) -> pa.Array:
    distinct, which = np.unique(ids, return_inverse=True)
    return pa.array([names(token) for token in distinct.tolist()], pa.string()).take(
        pa.array(which.ravel())
    )


# -- numbers with scores ---------------------------------------------------------------------------


def _ranked(
    ranked: Ranked,
    block: slice,
    fields: tuple[str, str],
    extra: Mapping[str, pa.Array] | None = None,
) -> Any:
    ids, scores = ranked.ids[block], ranked.scores[block]
    offsets = np.arange(0, ids.size + 1, max(ids.shape[1], 1), dtype=np.int32)
    if not ids.shape[1]:
        offsets = np.zeros(len(ids) + 1, np.int32)
    columns = {
        fields[0]: pa.array(ids.ravel()),
        fields[1]: pa.array(scores.ravel()),
        **(extra or {}),
    }
    return pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays(list(columns.values()), list(columns))
    )


def _logit_columns(content: Content, block: slice) -> dict[str, pa.Array]:
    names = ("raised", "lowered")
    if content.logits is None:
        return {name: pa.nulls(block.stop - block.start, _LOGITS) for name in names}
    found = {}
    for name, ranked in zip(names, content.logits, strict=True):
        ids = ranked.ids[block].ravel()
        text = _named(content.names, ids) if content.names else pa.nulls(len(ids), pa.string())
        found[name] = _ranked(ranked, block, ("token", "logit"), {"text": text})
    return found
