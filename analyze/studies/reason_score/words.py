"""ReasonScore in sentences, tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from residual_saes.analyze.drawing import STYLE, empty, svg
from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.reason_score.score import LEVEL

_GREY = "#6b7280"
_AHEAD = 12  # tokens shown ahead of a peak
_BEHIND = 4  # and behind it


def summary(figures: dict[str, Any]) -> list[str]:
    null = figures["null"]
    fewest = null["fewest_significant"]
    unseen = f", of which fewer than {fewest} latents could not be seen" if fewest > 1 else ""
    lines = [
        f"{figures['significant']} of {figures['tested']:,} latents have a higher ReasonScore "
        f"({figures['formula']['name']} formula) than frequency-matched vocabularies give them: "
        f"Benjamini-Hochberg q <= {LEVEL} among {null['draws']:,} vocabularies{unseen}. "
        f"{_corpora(figures)}",
        f"The largest score {_beside_null(null['largest'])}",
        f"The sum of the ten largest {_beside_null(null['largest_10'])}",
        _halves(figures["halves"]),
    ]
    missing = [word["word"] for word in figures["words"] if not word["occurrences"]]
    if missing:
        lines.append(f"Not in the {figures['tokens']:,} tokens: {', '.join(missing)}.")
    return lines


def _corpora(figures: dict[str, Any]) -> str:
    corpus = figures["corpus"]
    text = f"{corpus['tokens']:,} tokens of {corpus['documents']:,} documents of {corpus['store']}"
    if other := figures["other_corpus"]:
        return f"The corpora are {text}, against {other['tokens']:,} of {other['store']}."
    return f"The corpus is {text}."


def _beside_null(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return (
        f"is {score['observed']:.4f}; random vocabularies have {score['null']:.4f}, 95% of them "
        f"{low:.4f} to {high:.4f} (p = {score['p']:.3g})."
    )


def _halves(halves: dict[str, Any]) -> str:
    if halves["spearman"] is None:
        return f"Halves were not compared: {halves['said']}."
    return (
        "Between two halves of the documents the scores' rank correlation is "
        f"{halves['spearman']:.3f}, and {halves['shared']} of the first {halves['top']} are shared "
        f"({halves['shared_by_chance']:.1f} by chance, p = {halves['p']:.2g})."
    )


def tables(
    figures: dict[str, Any], contexts: Mapping[int, Sequence[Mapping[str, Any]]]
) -> list[Table]:
    """The words, the latents, and where the first of these fire.

    Args:
        contexts: by latent, with the text of each token.
    """
    words = []
    for word in figures["words"]:
        counts = (f"{word['occurrences']:,}", f"{word['tokens_in_windows']:,}")
        words.append((repr(word["word"]), *counts))
    latents = []
    for row in figures["features"]:
        latents.append(
            (
                str(row["feature"]),
                f"{row['score']:.4f}",
                f"{row['p']:.2g}",
                f"{row['q']:.2g}",
                f"{row['density']:.3%}",
            )
        )
    shown = []
    for latent, ranked in contexts.items():
        for context in ranked:
            peak = f"{context['peak']:.3g}"
            shown.append((str(latent), str(context["document"]), peak, _marked(context)))
    return [
        Table("Words", ("word", "occurrences", "tokens in windows"), words),
        Table("Latents by ReasonScore", ("latent", "ReasonScore", "p", "q", "density"), latents),
        Table(
            "Where the first of them fire most, the peak in «»",
            ("latent", "document", "peak", "context"),
            shown,
        ),
    ]


def _marked(context: Mapping[str, Any]) -> str:
    """The text around a context's peak, the peak in «»."""
    texts = context["texts"]
    peak = int(np.argmax(context["activations"]))
    ahead = "".join(texts[max(0, peak - _AHEAD) : peak])
    behind = "".join(texts[peak + 1 : peak + 1 + _BEHIND])
    return f"{ahead}«{texts[peak]}»{behind}"


def picture(null: dict[str, Any], scores: Floats, top: int) -> Picture:
    """The scores of the first latents by rank, in the band of random vocabularies."""
    count = min(len(scores), len(null["band"]["low"]))
    rank = np.arange(1, 1 + count)
    low = null["band"]["low"][:count]
    middle = null["band"]["median"][:count]
    high = null["band"]["high"][:count]
    with mpl.rc_context(STYLE):
        figure, axes = empty("rank", "ReasonScore")
        band = "random vocabularies, 95%"
        axes.fill_between(rank, low, high, alpha=0.25, color=_GREY, linewidth=0, label=band)
        axes.plot(rank, middle, color=_GREY, linewidth=1, label="their median")
        label = "these words"
        axes.plot(rank, scores[:count], marker="o", markersize=3, linewidth=1, label=label)
        axes.legend(frameon=False)
        drawn = svg(figure)
    return Picture(
        f"ReasonScore of the first {top} latents beside random vocabularies of the same "
        "frequencies",
        drawn,
    )
