"""The latents' own pages, in files of CHUNK: contexts, samples, histogram, logits, neighbours.

A file is {words, features}: `words` are the texts of the tokens in it, to which everything else
refers by number. A feature is {figures, count, mean, std, histogram, top, quantiles, raised,
lowered, neighbours, others}:

    figures            as the list's columns: density, largest activation, those of other studies
    histogram          [the first bin that is not empty, counts from there on]
    top                [context]
    quantiles          [[quantile, [context]]], of the largest activations first
    raised, lowered    [[word, logit]], or null without the language model
    neighbours         [[feature, cosine]]
    others             [[feature, cosine]] of each of the other runs

and a context [document, position, peak, [word of each token], [token, activation of those above 0,
...]].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analyze.pages.browser.columns import Column
from analyze.pages.browser.joins import Partners
from analyze.pages.browser.script import short

CHUNK = 64  # latents of a file: some 400 kB
# tokens that stand for a latent in the list, of those it fires most on and of those it raises
_WORDS = 3
_CONTEXT = ("document", "position", "peak", "tokens", "activations")
_COLUMNS = [
    *(
        "feature",
        "count",
        "density",
        "mean",
        "std",
        "max",
        "histogram",
        "neighbours.list.element.feature",
    ),
    *(f"top.list.element.{name}" for name in _CONTEXT),
    *(f"quantiles.list.element.{name}" for name in ("quantile", *_CONTEXT)),
    *(
        f"{name}.list.element.{field}"
        for name in ("raised", "lowered")
        for field in ("token", "logit")
    ),
    "neighbours.list.element.cosine",
]

Say = Callable[[int], str]


class Contexts(NamedTuple):
    """A column of contexts: c of them, of some latents, with t tokens in all."""

    begins: NDArray[np.int64]  # (latents + 1,) in the following
    fields: dict[str, NDArray[Any]]  # (c,) each: document, position, peak, and of samples quantile
    tokens_begin: NDArray[np.int64]  # (c + 1,) in the following
    tokens: NDArray[np.int64]  # (t,)
    activations: NDArray[np.float32]  # (t,)

    def peaks(self) -> NDArray[np.int64]:
        """(c,) the token at each peak."""
        found: NDArray[np.int64] = self.tokens[self.tokens_begin[:-1] + self.fields["peak"]]
        return found


def blocks(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """The catalogue's table CHUNK latents at a time, without what is not shown."""
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=_COLUMNS).combine_chunks()
        for first in range(0, table.num_rows, CHUNK):
            yield pa.Table.from_batches(table.slice(first, CHUNK).to_batches()).combine_chunks()


def contexts_of(table: pa.Table, name: str) -> Contexts:
    """The contexts in column `name` of a block."""
    outer = table.column(name).chunk(0)
    inner = outer.values
    tokens, activations = inner.field("tokens"), inner.field("activations")
    fields = [
        one
        for one in ("document", "position", "peak", "quantile")
        if inner.type.get_field_index(one) >= 0
    ]
    return Contexts(
        _offsets(outer),
        {one: inner.field(one).to_numpy(zero_copy_only=False).astype(np.int64) for one in fields},
        _offsets(tokens),
        tokens.values.to_numpy(zero_copy_only=False).astype(np.int64),
        activations.values.to_numpy(zero_copy_only=False),
    )


def _offsets(lists: pa.ListArray) -> NDArray[np.int64]:
    return np.asarray(lists.offsets.to_numpy(zero_copy_only=False), np.int64)


class Words:
    """Texts of tokens, each once, and where they stand. Several tokens may say the same: parts of
    characters do.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._at: dict[int, int] = {}  # by token
        self._text: dict[str, int] = {}  # by text

    def __call__(self, token: int) -> int:
        """The number of a token's text."""
        if (at := self._at.get(token)) is None:
            at = self._at[token] = self._text.setdefault(self._say(token), len(self._text))
        return at

    @property
    def texts(self) -> list[str]:
        """Each text at its number."""
        return list(self._text)


class Shown(NamedTuple):
    """What the pages show, and what they say beside the catalogue."""

    say: Say
    contexts: int  # with the largest activations, at most
    samples: int  # of each quantile, at most
    others: list[Partners]  # of each of the other runs
    studied: list[Column]  # what other studies say of all latents


def page(table: pa.Table, shown: Shown) -> dict[str, Any]:
    """One file, of a block of latents."""
    words = Words(shown.say)
    top, quantiles = contexts_of(table, "top"), contexts_of(table, "quantiles")
    columns = [
        "feature",
        "density",
        "max",
        "count",
        "mean",
        "std",
        "histogram",
        "raised",
        "lowered",
        "neighbours",
    ]
    features = []
    for number, row in enumerate(table.select(columns).to_pylist()):
        at = range(*top.begins[number : number + 2])[: shown.contexts]
        features.append(
            {
                "figures": _figures(row, shown.studied),
                "count": row["count"],
                **{
                    key: None if row[key] is None else short([row[key]])[0]
                    for key in ("mean", "std")
                },
                "histogram": _trimmed(row["histogram"]),
                "top": [_context(top, one, words) for one in at],
                "quantiles": _samples(quantiles, number, shown.samples, words),
                **{key: _logits(row[key], words) for key in ("raised", "lowered")},
                "neighbours": [
                    [one["feature"], *short([one["cosine"]])] for one in row["neighbours"]
                ],
                "others": [
                    [[feature, *short([r])] for feature, r in partners[row["feature"]]]
                    for partners in shown.others
                ],
            }
        )
    return {"words": words.texts, "features": features}


def _figures(row: dict[str, Any], studied: list[Column]) -> list[float | None]:
    known = [row["density"], row["max"], *(one.values[row["feature"]] for one in studied)]
    return short(np.array(known, np.float64))  # None becomes NaN, and then null


def _trimmed(histogram: list[int]) -> list[int]:
    bins = np.flatnonzero(histogram)
    return [int(bins[0]), *histogram[bins[0] : bins[-1] + 1]] if len(bins) else []


def _context(contexts: Contexts, at: int, words: Words) -> list[Any]:
    span = slice(*contexts.tokens_begin[at : at + 2])
    activations = contexts.activations[span]
    fires = np.flatnonzero(activations)
    values = short(activations[fires])
    pairs = [one for pair in zip(fires.tolist(), values, strict=True) for one in pair]
    where = [int(contexts.fields[name][at]) for name in ("document", "position", "peak")]
    return [*where, [words(token) for token in contexts.tokens[span].tolist()], pairs]


def _samples(contexts: Contexts, number: int, each: int, words: Words) -> list[Any]:
    by_quantile: dict[int, list[Any]] = {}
    for at in range(*contexts.begins[number : number + 2]):
        kept = by_quantile.setdefault(int(contexts.fields["quantile"][at]), [])
        if len(kept) < each:
            kept.append(_context(contexts, at, words))
    return [
        [quantile, kept] for quantile, kept in sorted(by_quantile.items(), reverse=True) if kept
    ]


def _logits(found: list[dict[str, Any]] | None, words: Words) -> list[Any] | None:
    return (
        None if found is None else [[words(one["token"]), *short([one["logit"]])] for one in found]
    )


def heads(table: pa.Table, words: Words) -> tuple[list[list[int]], list[list[int]]]:
    """Of each latent of a block the first distinct texts at its largest activations, and of those
    it raises most.
    """
    top, peaks = contexts_of(table, "top"), contexts_of(table, "top").peaks().tolist()
    strongest = [
        _first(peaks[slice(*top.begins[number : number + 2])], words)
        for number in range(table.num_rows)
    ]
    raised = [
        _first([one["token"] for one in row or []], words)
        for row in table.column("raised").to_pylist()
    ]
    return strongest, raised


def _first(tokens: list[int], words: Words) -> list[int]:
    return list(dict.fromkeys(map(words, tokens)))[:_WORDS]
