"""The latents' own pages, in files of CHUNK: contexts, samples, histogram, logits, neighbours.

A file is {words, features}. `words` are the texts of the tokens in it, or the bytes of a token that
is part of a character; all else refers to a text by its number. A feature is

    figures            as the list's columns: density, largest activation, interest, a crosscoder's
                       shares, those of other studies
    count, mean, std   of the rows in which it fires, and of its activations there
    histogram          [the first bin that is not empty, counts from there on]
    top                [context]
    quantiles          [[quantile, [context]]], of the largest activations first
    raised, lowered    [[word, logit]], or null without the language model
    spreads            of each port that is written to what `Spread.of` says of its logits, or null
    neighbours         [[feature, cosine]]
    together           [[feature, phi, rows in which both fire, the same by chance]], see
                       catalogue/coactivation.py
    others             [[feature, cosine]] of each of the other runs
    crossings          of each result of study=cross_layer [class, [[feature, r, P(this | that),
                       P(that | this), cosine]]], where there is one

of a transcoder also
    readers            [[feature, cosine]] of the directions that are read
    tokens             [[word, share of its activation that is on the token]]

of a crosscoder also
    class              number of a class in the run's facts
    targets            of each target [share, energy, raised, lowered], as the catalogue has them

and a context [document, position, peak, [word of each token], [token, activation of those above 0,
...]].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from residual_saes.analyze.pages.browser.columns import Column
from residual_saes.analyze.pages.browser.contexts import CONTEXT, Contexts, contexts_of, fields
from residual_saes.analyze.pages.browser.joins import Partners
from residual_saes.analyze.pages.browser.spread import Spread
from residual_saes.analyze.pages.script import short
from residual_saes.analyze.studies.catalogue.coactivation import Together

CHUNK = 64  # latents of a file: some 400 kB
_WORDS = 3  # tokens that stand for a latent in the list: where it fires most, and what it raises
# Columns that are small enough to be read as Python objects.
_PLAIN = ["feature", "density", "max", "count", "mean", "std", "histogram"]
_LISTS = ["raised", "lowered", "neighbours"]
_COLUMNS = [
    *_PLAIN,
    *fields("top", *CONTEXT),
    *fields("quantiles", "quantile", *CONTEXT),
    *fields("raised", "token", "logit"),
    *fields("lowered", "token", "logit"),
    *fields("neighbours", "feature", "cosine"),
]
_OF_KINDS = {  # columns that are there or not, by name
    "readers": fields("readers", "feature", "cosine"),
    "class": ["class"],
    "targets": [
        *fields("targets", "share", "energy"),
        *fields("targets.list.element.raised", "token", "logit"),
        *fields("targets.list.element.lowered", "token", "logit"),
    ],
}

Text = str | tuple[int, ...]  # of a token; its bytes, if they are part of a character
Name = Callable[[int], Text]
Latents = tuple[list[list[list[float | None]]], list[str]]  # of each latent those of another layer


def blocks(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """The catalogue's table CHUNK latents at a time, without what is not shown."""
    there = [name for name in _OF_KINDS if name in file.schema_arrow.names]
    columns = _COLUMNS + [field for name in there for field in _OF_KINDS[name]]
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=columns).combine_chunks()
        for first in range(0, table.num_rows, CHUNK):
            yield pa.Table.from_batches(table.slice(first, CHUNK).to_batches()).combine_chunks()


class Words:
    """Texts of tokens, each once, by number. Several tokens may have one text, as bytes do."""

    def __init__(self, name: Name) -> None:
        self._name = name
        self._by_token: dict[int, int] = {}
        self._by_text: dict[Text, int] = {}

    def __call__(self, token: int) -> int:
        """The number of a token's text."""
        number = self._by_token.get(token)
        if number is None:
            number = self._by_text.setdefault(self._name(token), len(self._by_text))
            self._by_token[token] = number
        return number

    @property
    def texts(self) -> list[Text]:
        """Each text at its number."""
        return list(self._by_text)


class Shown(NamedTuple):
    """What the pages show, and what they have beside the catalogue."""

    name: Name
    contexts: int  # with the largest activations, at most
    samples: int  # of each quantile, at most
    others: list[Partners]  # of each of the other runs
    listed: list[Column]  # figures of every latent beside density, largest activation, interest
    spreads: Sequence[Spread | None]  # of each port that is written to
    tokens: Sequence[Sequence[tuple[int, float]]] | None  # of a transcoder, see tokens.of_latents
    together: Sequence[Sequence[Together]]  # of each latent
    crossings: Sequence[Latents] = ()  # see crossings.Crossing.pairs


def page(block: pa.Table, interest: NDArray[np.float64], shown: Shown) -> dict[str, Any]:
    """The file of a block of latents.

    Args:
        interest: (latents of the block,)
    """
    words = Words(shown.name)
    top = contexts_of(block, "top")
    quantiles = contexts_of(block, "quantiles")
    features = []
    there = [name for name in _OF_KINDS if name in block.column_names]
    for number, row in enumerate(block.select([*_PLAIN, *_LISTS, *there]).to_pylist()):
        feature = {
            "figures": _figures(row, interest[number], shown.listed),
            "count": row["count"],
            "mean": _number(row["mean"]),
            "std": _number(row["std"]),
            "histogram": _trimmed(row["histogram"]),
            "top": [_context(top, context, words) for context in top.of(number)[: shown.contexts]],
            "quantiles": _samples(quantiles, number, shown.samples, words),
            "raised": _logits(row["raised"], words),
            "lowered": _logits(row["lowered"], words),
            "spreads": [spread and spread.of(row["feature"]) for spread in shown.spreads],
            "neighbours": _pairs((near["feature"], near["cosine"]) for near in row["neighbours"]),
            "together": _together(shown.together[row["feature"]]),
            "others": [_pairs(partners[row["feature"]]) for partners in shown.others],
            **_of_kind(row, shown, words),
        }
        if shown.crossings:
            number = row["feature"]
            of_layers = [[classes[number], pairs[number]] for pairs, classes in shown.crossings]
            feature["crossings"] = of_layers
        features.append(feature)
    return {"words": words.texts, "features": features}


def _of_kind(row: dict[str, Any], shown: Shown, words: Words) -> dict[str, Any]:
    """What the page of a transcoder's or a crosscoder's latent has beside an SAE's."""
    own: dict[str, Any] = {}
    if "readers" in row:
        own["readers"] = _pairs((near["feature"], near["cosine"]) for near in row["readers"])
    if shown.tokens is not None:
        fires_on = shown.tokens[row["feature"]]
        own["tokens"] = _pairs((words(token), share) for token, share in fires_on)
    if "targets" in row:
        own["class"] = row["class"]
        targets = []
        for target in row["targets"]:
            logits = [_logits(target[name], words) for name in ("raised", "lowered")]
            targets.append([*short([target["share"], target["energy"]]), *logits])
        own["targets"] = targets
    return own


def _number(value: float | None) -> float | None:
    return None if value is None else short([value])[0]


def _pairs(pairs: Any) -> list[list[Any]]:
    """[[id, number of few digits]] of (id, number)."""
    return [[identity, _number(value)] for identity, value in pairs]


def _together(pairs: Sequence[Together]) -> list[list[Any]]:
    return [[feature, *short(figures)] for feature, *figures in pairs]


def _figures(row: dict[str, Any], interest: float, listed: list[Column]) -> list[float | None]:
    others = [column.values[row["feature"]] for column in listed]
    # None becomes NaN, and then null.
    return short(np.array([row["density"], row["max"], interest, *others], np.float64))


def _trimmed(histogram: list[int]) -> list[int]:
    bins = np.flatnonzero(histogram)
    return [int(bins[0]), *histogram[bins[0] : bins[-1] + 1]] if len(bins) else []


def _context(contexts: Contexts, context: int, words: Words) -> list[Any]:
    span = contexts.span(context)
    activations = contexts.activations[span]
    fires = np.flatnonzero(activations)
    pairs: list[Any] = []
    for token, value in zip(fires.tolist(), short(activations[fires]), strict=True):
        pairs += (token, value)
    numbers = contexts.numbers(context, "document", "position", "peak")
    return [*numbers, [words(token) for token in contexts.tokens[span].tolist()], pairs]


def _samples(contexts: Contexts, number: int, each: int, words: Words) -> list[Any]:
    """[[quantile, [context]]], at most `each` contexts of a quantile, the last quantile first."""
    if not each:
        return []
    by_quantile: dict[int, list[Any]] = {}
    for context in contexts.of(number):
        (quantile,) = contexts.numbers(context, "quantile")
        kept = by_quantile.setdefault(quantile, [])
        if len(kept) < each:
            kept.append(_context(contexts, context, words))
    return [[quantile, by_quantile[quantile]] for quantile in sorted(by_quantile, reverse=True)]


def _logits(logits: list[dict[str, Any]] | None, words: Words) -> list[Any] | None:
    if logits is None:
        return None
    return _pairs((words(logit["token"]), logit["logit"]) for logit in logits)


def strongest(block: pa.Table, words: Words) -> list[list[int]]:
    """Of each latent of a block the first distinct texts at its largest activations."""
    top = contexts_of(block, "top")
    peaks = top.peak_tokens()
    return [_first(peaks[top.of(number)].tolist(), words) for number in range(block.num_rows)]


def raised(block: pa.Table, words: Words) -> list[list[int]]:
    """Of each latent of a block the first distinct texts that it raises most."""
    firsts = []
    for logits in block.column("raised").to_pylist():
        firsts.append(_first([logit["token"] for logit in logits or []], words))
    return firsts


def _first(tokens: list[int], words: Words) -> list[int]:
    return list(dict.fromkeys(map(words, tokens)))[:_WORDS]
