"""The table of all latents: a Parquet file of one row per latent.

    feature        uint32
    count          int64     rows in which it fires
    density        float64   count / rows
    mean, std      float64   of its activations where it fires (std of the population); null if it
                             never does
    max            float32
    histogram      list<int64>, BINS long; the edges are in the file's metadata as JSON, under
                   histogram_edges
    top            list<context>, the largest activations, one per document, descending
    quantiles      list<context with quantile>: random activations of part `quantile`.
                   Parts are equal and ascending: an activation's part is
                   floor(parts * #(smaller activations) / count), counted exactly
    raised, lowered   list<{token, logit, text}>, by analyze/latents/directions.py; null without the
                      language model
    neighbours     list<{feature, cosine}>, of the decoder's directions

    of a transcoder
    readers        list<{feature, cosine}>, of the encoder's directions: what reads the same

    of a crosscoder, whose raised and lowered are those of the target with the largest share
    cosine         float64   of its directions in the targets, see analyze/latents/targets.py
    class          uint8     number of a target: its own; then shared; then between
    targets        list<target>, in the order of the names in the file's metadata, as JSON under
                   targets

A target is {share, energy, raised, lowered}: its share of the latent's decoder norms, the mean
square of what the latent writes to it over the variance of its rows, and the logits of what it
writes there; null if the target is no part of the residual stream, or its model is not at hand.

A context is {document, position, value, peak, tokens, text, activations}: the tokens from
`BEFORE` ahead of its peak to `AFTER` behind it, as far as the document's piece goes, without BOS.
`tokens[peak]` is the peak. It is at `position` after the piece's BOS, and its activation is
`value`. A token whose row was not encoded (by the run's policy) has activation 0. Activations
beside the peak come from the inverted index: nothing is encoded twice.

The table is written block by block of latents, so memory is that of one block's contexts and one
row group of the index.

Shapes: F d_sae, m places of a block's latents.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from residual_saes.analyze.latents.contexts import AFTER, BEFORE
from residual_saes.analyze.latents.targets import Targets
from residual_saes.analyze.studies.catalogue.index import BLOCK, Index, Postings
from residual_saes.analyze.studies.catalogue.state import Places, State, rank_within
from residual_saes.data import durable
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress
from residual_saes.data.store.store import Store

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
_OF_TRANSCODERS = {"readers": _SCHEMA["neighbours"]}
_TARGET = {"share": pa.float64(), "energy": pa.float64(), "raised": _LOGITS, "lowered": _LOGITS}
_OF_CROSSCODERS = {
    "cosine": pa.float64(),
    "class": pa.uint8(),
    "targets": pa.list_(pa.struct(_TARGET)),
}


class Ranked(NamedTuple):
    """The K best ids of each latent with their scores, (F, K) each."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]


Logits = tuple[Ranked, Ranked]  # raised, lowered


@dataclass(frozen=True)
class OfTargets:
    """What a crosscoder's latents write to its T targets."""

    names: Sequence[str]
    written: Targets
    energy: NDArray[np.float64]  # (F, T)
    logits: Sequence[Logits | None]  # of each target

    @property
    def strongest(self) -> Logits | None:
        """The logits of the target with the largest share, of those that have logits."""
        known = [number for number, both in enumerate(self.logits) if both]
        if not known:
            return None
        best = self.written.shares[:, known].argmax(1)
        every = np.arange(len(best))
        tables = [both for both in self.logits if both]
        joined = []
        for sign in (0, 1):
            columns = zip(*(both[sign] for both in tables), strict=True)
            joined.append(Ranked._make(np.stack(column)[best, every] for column in columns))
        return joined[0], joined[1]


@dataclass(frozen=True)
class Content:
    """All that the table is made of."""

    store: Store
    index: Index
    state: State
    neighbours: Ranked
    logits: Logits | None
    names: Callable[[int], str] | None  # from token id to text
    quantiles: int  # equal parts of a latent's activations
    each: int  # contexts of a part
    readers: Ranked | None = None  # of a transcoder
    targets: OfTargets | None = None  # of a crosscoder

    @property
    def kinds(self) -> dict[str, pa.DataType]:
        """The table's columns."""
        of_transcoders = _OF_TRANSCODERS if self.readers else {}
        return {**_SCHEMA, **of_transcoders, **(_OF_CROSSCODERS if self.targets else {})}


class Picked(NamedTuple):
    """Places of a block's latents whose contexts go into the table, by latent; (m,) each."""

    feature: NDArray[np.int64]
    token: NDArray[np.int64]  # flat position in the store's spine
    document: NDArray[np.uint32]
    value: NDArray[np.float32]
    quantile: NDArray[np.int64]


def write(path: Path, content: Content, stop: StopRequest) -> None:
    """Write the table; the file appears only when it is whole."""
    edges = json.dumps(content.state.edges.astype(float).tolist())
    metadata = {"histogram_edges": edges, "rows": str(content.state.rows)}
    if content.targets:
        metadata["targets"] = json.dumps(list(content.targets.names))
    schema = pa.schema(content.kinds, metadata)
    durable.write(path, _encoded(schema, _blocks(content, stop)))


class _Sink(io.RawIOBase):
    """A buffer between the Parquet writer and the file; `taken` empties it."""

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
        parts = self.parts
        self.parts = []
        return parts


def _encoded(schema: pa.Schema, tables: Iterator[pa.Table]) -> Iterator[bytes]:
    sink = _Sink()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            yield from sink.taken()
    yield from sink.taken()


def _blocks(content: Content, stop: StopRequest) -> Iterator[pa.Table]:
    state = content.state
    top = state.top.settled()
    sample = state.sample.settled()
    features = len(state.count)
    progress = Progress()
    for first in range(0, features, BLOCK):
        stop.check()
        block = slice(first, min(first + BLOCK, features))
        strongest = _flat(Places._make(column[block] for column in top), first)
        spread = _spread(content, Places._make(column[block] for column in sample), first)
        columns = {
            **_figures(state, block),
            "top": _contexts(content, strongest, block, with_quantile=False),
            "quantiles": _contexts(content, spread, block, with_quantile=True),
            **_logit_columns(content.logits, content.names, block),
            "neighbours": _ranked(content.neighbours, block, ("feature", "cosine")),
        }
        if content.readers:
            columns["readers"] = _ranked(content.readers, block, ("feature", "cosine"))
        if content.targets:
            columns |= _of_targets(content.targets, content.names, block)
        arrays = [columns[name].cast(kind) for name, kind in content.kinds.items()]
        yield pa.table(arrays, schema=pa.schema(content.kinds))
        last = block.stop == features
        progress.show(f"contexts of {block.stop:,}/{features:,} latents", last=last)


def _figures(state: State, block: slice) -> dict[str, pa.Array]:
    count = state.count[block]
    silent = count == 0
    histogram = state.histogram[block]
    offsets = np.arange(len(histogram) + 1) * histogram.shape[1]
    return {
        "feature": pa.array(np.arange(block.start, block.stop)),
        "count": pa.array(count),
        "density": pa.array(count / max(state.rows, 1)),
        "mean": pa.array(state.mean[block], mask=silent),
        "std": pa.array(state.deviation[block], mask=silent),
        "max": pa.array(state.largest[block], mask=silent),
        "histogram": pa.ListArray.from_arrays(offsets.astype(np.int32), histogram.ravel()),
    }


# -- which places ----------------------------------------------------------------------------------


def _flat(places: Places, first: int) -> Picked:
    feature, rank = np.nonzero(places.key)
    columns = (column[feature, rank] for column in places[1:])
    return Picked._make([feature + first, *columns, np.zeros(len(feature), np.int64)])


def _spread(content: Content, sample: Places, first: int) -> Picked:
    """At most `each` of a block's samples in every quantile, quantile by quantile."""
    every = _flat(sample, first)
    smaller = _smaller(content.index, every, first)
    quantile = smaller * content.quantiles // content.state.count[every.feature]
    # The sort is stable: inside a quantile the samples stay in their random order.
    order = np.lexsort((quantile, every.feature))
    rank = rank_within(every.feature[order] * content.quantiles + quantile[order])
    chosen = order[rank < content.each]
    return Picked._make(column[chosen] for column in every._replace(quantile=quantile))


def _smaller(index: Index, picked: Picked, first: int) -> NDArray[np.int64]:
    """(m,) activations of the place's latent that are smaller than the place's, in the whole index.

    Bits of positive floats have the order of their values, so a key is (latent, bits of the value).
    """
    latent = (picked.feature - first).astype(np.uint64) << np.uint64(32)
    wanted = latent | picked.value.view(np.uint32)
    smaller = np.zeros(len(wanted), np.int64)
    for unit in index.units:
        block = index.block(unit, first // BLOCK)
        keys = (block.feature.astype(np.uint64) - np.uint64(first)) << np.uint64(32)
        keys |= block.value.view(np.uint32)
        keys.sort()
        smaller += np.searchsorted(keys, wanted) - np.searchsorted(keys, latent)
    return smaller


# -- contexts --------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """The tokens around m places, one window after the other."""

    length: NDArray[np.int64]  # (m,) tokens of the place's window
    peak: NDArray[np.int64]  # (m,) index of the place in its window
    position: NDArray[np.int64]  # (m,) of the place after its piece's BOS
    tokens: NDArray[np.uint32]  # (sum of lengths,)
    activations: NDArray[np.float32]  # (sum of lengths,)


_NO_WINDOWS = Windows(
    length=np.empty(0, np.int64),
    peak=np.empty(0, np.int64),
    position=np.empty(0, np.int64),
    tokens=np.empty(0, np.uint32),
    activations=np.empty(0, np.float32),
)


def _windows(
    store: Store, unit: int, block: Postings, feature: NDArray[np.int64], peak: NDArray[np.int64]
) -> Windows:
    """The windows around tokens of one unit.

    Args:
        block: where the block's latents fire in the unit.
        feature: (m,) the latent whose activations the window shows.
        peak: (m,) flat position of the token in the unit's spine rows.
    """
    # Each window's bounds: inside the document's piece, behind its BOS.
    starts = np.flatnonzero(store.piece_starts(unit).ravel())
    ids = store.tokens(unit).ravel()
    piece = np.searchsorted(starts, peak, side="right") - 1
    end = np.append(starts, len(ids))[piece + 1]
    low = np.maximum(starts[piece] + 1, peak - BEFORE)
    high = np.minimum(end, peak + AFTER + 1)
    # The tokens of all windows.
    length = high - low
    first = np.cumsum(length) - length
    inside = np.arange(length.sum()) - np.repeat(first, length)
    token = np.repeat(low, length) + inside
    # Their activations: those in the index, else 0.
    keys = block.feature.astype(np.int64) * len(ids) + block.token
    wanted = np.repeat(feature, length) * len(ids) + token
    nearest = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    activations = np.where(keys[nearest] == wanted, block.value[nearest], np.float32(0))
    return Windows(length, peak - low, peak - starts[piece], ids[token], activations)


def _contexts(
    content: Content, picked: Picked, block: slice, *, with_quantile: bool
) -> pa.ListArray:
    """One list of contexts per latent of a block."""
    # The windows, unit by unit, and how to bring them back into the order of `picked`.
    index = content.index
    parts = [_NO_WINDOWS]
    orders = [np.empty(0, np.int64)]
    unit_of = picked.token // index.unit_tokens
    for unit in np.unique(unit_of).tolist():
        here = np.flatnonzero(unit_of == unit)
        peak = picked.token[here] - unit * index.unit_tokens
        postings = index.block(unit, block.start // BLOCK)
        parts.append(_windows(content.store, unit, postings, picked.feature[here], peak))
        orders.append(here)
    joined = Windows._make(np.concatenate(column) for column in zip(*parts, strict=True))
    back = pa.array(np.argsort(np.concatenate(orders)))
    inner = np.append(0, np.cumsum(joined.length)).astype(np.int32)
    # The contexts' fields, then lists of contexts.
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
    contexts = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    per_latent = np.bincount(picked.feature - block.start, minlength=block.stop - block.start)
    offsets = np.append(0, np.cumsum(per_latent)).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, contexts)


def _texts(
    names: Callable[[int], str] | None, offsets: NDArray[np.int32], tokens: NDArray[np.uint32]
) -> pa.Array:
    """The tokens' texts, in lists as long as those of the tokens; null without a tokenizer."""
    if names is None:
        return pa.nulls(len(offsets) - 1, pa.list_(pa.string()))
    return pa.ListArray.from_arrays(offsets, _named(names, tokens))


def _named(names: Callable[[int], str], ids: NDArray[Any]) -> pa.Array:
    distinct, which = np.unique(ids, return_inverse=True)
    texts = [names(token) for token in distinct.tolist()]
    return pa.array(texts, pa.string()).take(pa.array(which.ravel()))


# -- ids with scores -------------------------------------------------------------------------------


def _ranked(
    ranked: Ranked,
    block: slice,
    fields: tuple[str, str],
    extra: Mapping[str, pa.Array] | None = None,
) -> Any:
    """One list per latent of a block, of {id, score} under the names in `fields`."""
    ids = ranked.ids[block]
    scores = ranked.scores[block]
    offsets = np.arange(len(ids) + 1) * ids.shape[1]
    columns = {
        fields[0]: pa.array(ids.ravel()),
        fields[1]: pa.array(scores.ravel()),
        **(extra or {}),
    }
    items = pa.StructArray.from_arrays(list(columns.values()), list(columns))
    return pa.ListArray.from_arrays(offsets.astype(np.int32), items)


def _logit_columns(
    logits: Logits | None, token_name: Callable[[int], str] | None, block: slice
) -> dict[str, pa.Array]:
    names = ("raised", "lowered")
    if logits is None:
        return {name: pa.nulls(block.stop - block.start, _LOGITS) for name in names}
    columns = {}
    for name, ranked in zip(names, logits, strict=True):
        ids = ranked.ids[block].ravel()
        text = _named(token_name, ids) if token_name else pa.nulls(len(ids), pa.string())
        columns[name] = _ranked(ranked, block, ("token", "logit"), {"text": text})
    return columns


def _of_targets(
    targets: OfTargets, token_name: Callable[[int], str] | None, block: slice
) -> dict[str, pa.Array]:
    """The columns of crosscoders of a block of latents."""
    written = targets.written
    cosine = written.cosine[block]
    parts = []
    for number, logits in enumerate(targets.logits):
        columns = {
            "share": pa.array(written.shares[block, number]),
            "energy": pa.array(targets.energy[block, number]),
            **_logit_columns(logits, token_name, block),
        }
        arrays = [columns[name].cast(kind) for name, kind in _TARGET.items()]
        parts.append(pa.StructArray.from_arrays(arrays, list(_TARGET)))
    # From target by target to latent by latent.
    count = len(parts)
    size = block.stop - block.start
    by_latent = np.arange(count * size).reshape(count, size).T.ravel()
    offsets = np.arange(0, count * size + 1, count, dtype=np.int32)
    return {
        "cosine": pa.array(cosine, mask=np.isnan(cosine)),
        "class": pa.array(written.classes[block]),
        "targets": pa.ListArray.from_arrays(
            offsets, pa.concat_arrays(parts).take(pa.array(by_latent))
        ),
    }
