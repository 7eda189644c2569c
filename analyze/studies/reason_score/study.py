"""ReasonScore: which latents fire around words of reasoning (Galichin et al., arXiv 2503.18878).

    s_i  = p_i+ H_i^0.7 - p_i-
    p_i+ = mu_i+ / sum_j mu_j+       mu+: mean activation in the windows around the words' occurrences
    p_i- = mu_i- / sum_j mu_j-       mu-: mean over all other tokens of the same corpus
    H_i  = entropy of latent i's share by word, from its mean in each word's windows, over ln |R|

|R| counts all words, those that the corpus lacks too. Tokens are those that the run's policy keeps,
never BOS, and windows end with the document. Nothing in the formula knows of reasoning: every
vocabulary has latents that score high. So the scores stand beside those of random vocabularies,
each word replaced by a token as frequent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np

from analyze.contexts import Context, top_contexts, visible
from analyze.drawing import STYLE, empty, svg
from analyze.outcome import Outcome, Picture, Table
from analyze.results import FEATURES
from analyze.stats import Floats, benjamini_hochberg, percentiles, permutation_p
from analyze.studies.reason_score.corpus import read_corpus, words_of
from analyze.studies.reason_score.score import (
    ALPHA,
    FORMULAS,
    LEVEL,
    Null,
    Scorer,
    halves,
    mark,
    matched,
)
from analyze.study import Column, Definition, Study, write_features
from data.errors import MismatchError, SettingError, StopRequest
from data.settings import build
from harvest import model_folder as checkpoint
from harvest.tokens import Tokenizer

WORDS = (
    "alternatively", "hmm", "maybe", "wait", "perhaps", "let me", "therefore", "however", "But", "Another",
)  # fmt: skip
_SEED = 0
_FIRED = 10  # rows in which a latent must fire to be tested, whatever the words
_SHOWN, _EACH = 10, 3  # latents shown with contexts, and how many of these


@dataclass(frozen=True)
class Options:
    """See conf/study/reason_score.yaml."""

    rows: int = 500_000
    words: list[str] | None = None
    formula: str = "published"
    draws: int = 30_000
    top: int = 50  # latents

    def __post_init__(self) -> None:
        for name in ("rows", "draws", "top"):
            if getattr(self, name) < 1:
                raise SettingError(f"study.{name}={getattr(self, name)} must be at least 1")
        if self.formula not in FORMULAS:
            raise SettingError(f"study.formula={self.formula} must be one of {', '.join(FORMULAS)}")
        if self.words is not None:
            texts = isinstance(self.words, list) and all(
                isinstance(one, str) and one.strip() for one in self.words
            )
            if not texts or len(set(self.words)) < 2:
                raise SettingError(
                    f"study.words={self.words} must be a list of at least two words or phrases, for the entropy over "
                    "them, such as [more, left]; null takes the paper's ten"
                )

    @property
    def names(self) -> list[str]:
        return list(WORDS if self.words is None else dict.fromkeys(self.words))


# -- the study -------------------------------------------------------------------------------------


def reason_score(study: Study) -> Outcome:
    """Rank latents by ReasonScore, beside frequency-matched vocabularies."""
    options = build(Options, "study", study.options)
    tokenizer, formula = _tokenizer(study), FORMULAS[options.formula]
    words = words_of(tokenizer, options.names)
    with StopRequest() as stop:
        corpus = read_corpus(study.subject, options.rows, stop)
        marked = mark(corpus, words, formula)
        if not any(map(len, marked.of_word)):
            raise SettingError(
                f"none of the words {', '.join(map(repr, options.names))} is in the {len(corpus.tokens):,} held-out "
                "tokens; give words that are as study.words=[...], or more study.rows"
            )
        fired = np.bincount(corpus.active.indices, minlength=corpus.active.shape[1])
        tested = np.flatnonzero(fired >= _FIRED)
        if not len(tested):
            raise SettingError(
                f"no latent fires in {_FIRED} of {len(corpus.tokens):,} rows; give more study.rows"
            )
        scores, null = matched(
            Scorer(corpus, formula),
            words,
            marked,
            tested,
            np.random.default_rng(_SEED),
            bos=tokenizer.bos,
            draws=options.draws,
            top=options.top,
            stop=stop,
        )
    q = np.ones(len(scores))
    q[tested] = benjamini_hochberg(null.p[tested])
    rank = tested[np.argsort(-scores[tested], kind="stable")]
    shown = [int(latent) for latent in rank[: min(options.top, _SHOWN)]]
    contexts = top_contexts(study.subject, shown, _EACH, options.rows)

    def name(token: int) -> str:
        return visible(tokenizer.inner.decode([token]))

    listed = [*rank[: options.top], *(one for one in rank[options.top :] if q[one] <= LEVEL)]
    density = fired / corpus.kept.sum()
    figures: dict[str, Any] = {
        "formula": {"name": options.formula, "alpha": ALPHA, **formula._asdict()},
        "seed": _SEED,
        "tokens": int(corpus.kept.sum()),
        "documents": len(np.unique(corpus.document)),
        "words": [
            {
                "word": word.name,
                "ids": word.phrases,
                "occurrences": times,
                "tokens_in_windows": len(places),
            }
            for word, times, places in zip(words, marked.frequency, marked.of_word, strict=True)
        ],
        "tested": len(tested),
        "significant": int((q[tested] <= LEVEL).sum()),
        "null": _null_figures(null, scores[rank], len(tested)),
        "halves": halves(corpus, words, formula, tested),
        "features": [
            {
                "feature": int(one),
                "score": scores[one],
                "p": null.p[one],
                "q": q[one],
                "density": density[one],
            }
            for one in listed
        ],
        "contexts": {one: [_told(context, name) for context in contexts[one]] for one in shown},
    }
    of_all = {"score": scores, "p": null.p, "q": q, "density": density}
    write_features(
        study.folder / FEATURES, {"feature": tested, **{key: of_all[key][tested] for key in of_all}}
    )
    caption = f"ReasonScore of the first {options.top} latents beside random vocabularies of the same frequencies"
    picture = Picture(caption, _picture(figures["null"], scores[rank[: options.top]]))
    return Outcome(
        figures, _summary(figures), _tables(figures, contexts, name), {"scores": picture}
    )


def _tokenizer(study: Study) -> Tokenizer:
    """The store's tokenizer, without the model.

    Raises:
        MismatchError: model= has another one.
    """
    found = Tokenizer.load(checkpoint.resolve(study.model.path, study.model.revision))
    store = study.subject.store
    if (recorded := store.manifest["model"]["tokenizer"]) != found.digest:
        unequal = {"tokenizer": (recorded, found.digest)}
        raise MismatchError(
            f"store {store.name}",
            unequal,
            "Give the model that it was harvested with, as model.path=",
        )
    return found


def _null_figures(null: Null, ranked: Floats, tested: int) -> dict[str, Any]:
    """The largest scores beside those of random vocabularies, and what p values can be had."""
    low, middle, high = np.quantile(null.leading, [0.025, 0.5, 0.975], axis=0)
    few = min(10, null.leading.shape[1])
    sums = null.leading[:, :few].sum(1)
    return {
        "draws": null.draws,
        "draws_of_all": null.first,
        "frequency_ratio": null.frequency_ratio,
        "largest": {
            "observed": ranked[0],
            "null": np.median(null.leading[:, 0]),
            "interval": percentiles(null.leading[:, 0]),
            "p": permutation_p(float(ranked[0]), null.leading[:, 0]),
        },
        "largest_10": {
            "observed": ranked[:few].sum(),
            "null": np.median(sums),
            "interval": percentiles(sums),
            "p": permutation_p(float(ranked[:few].sum()), sums),
        },
        "smallest_p": 1 / (1 + null.draws),
        "fewest_significant": int(np.ceil(tested / (1 + null.draws) / LEVEL)),
        "band": {"low": low, "median": middle, "high": high},
    }


def _told(context: Context, name: Any) -> dict[str, Any]:
    return {**context._asdict(), "text": "".join(map(name, context.tokens))}


def _summary(figures: dict[str, Any]) -> list[str]:
    null, half = figures["null"], figures["halves"]
    fewest = null["fewest_significant"]
    found = [
        f"{figures['significant']} of {figures['tested']:,} latents have a higher ReasonScore "
        f"({figures['formula']['name']} formula) than frequency-matched vocabularies give them: Benjamini-Hochberg "
        f"q <= {LEVEL} among {null['draws']:,} vocabularies"
        + (f", of which fewer than {fewest} latents could not be seen." if fewest > 1 else ".")
    ]
    for key, said in (
        ("largest", "The largest score"),
        ("largest_10", "The sum of the ten largest"),
    ):
        one = null[key]
        found.append(
            f"{said} is {one['observed']:.4f}; random vocabularies have {one['null']:.4f}, 95 % of them "
            f"{one['interval'].low:.4f} to {one['interval'].high:.4f} (p = {one['p']:.3g})."
        )
    if half["spearman"] is None:
        found.append(f"Halves were not compared: {half['said']}.")
    else:
        found.append(
            f"Between two halves of the documents the scores' rank correlation is {half['spearman']:.3f}, and "
            f"{half['shared']} of the first {half['top']} are shared ({half['shared_by_chance']:.1f} by chance, "
            f"p = {half['p']:.2g})."
        )
    if missing := [one["word"] for one in figures["words"] if not one["occurrences"]]:
        found.append(f"Not in the {figures['tokens']:,} tokens: {', '.join(missing)}.")
    return found


def _tables(figures: dict[str, Any], contexts: dict[int, list[Context]], name: Any) -> list[Table]:
    words = [
        (repr(one["word"]), f"{one['occurrences']:,}", f"{one['tokens_in_windows']:,}")
        for one in figures["words"]
    ]
    rows = [
        (
            str(one["feature"]),
            f"{one['score']:.4f}",
            f"{one['p']:.2g}",
            f"{one['q']:.2g}",
            f"{one['density']:.3%}",
        )
        for one in figures["features"]
    ]
    shown = [
        (str(latent), str(context.document), f"{context.peak:.3g}", _marked(context, name))
        for latent, found in contexts.items()
        for context in found
    ]
    return [
        Table("Words", ("word", "occurrences", "tokens in windows"), words),
        Table("Latents by ReasonScore", ("latent", "ReasonScore", "p", "q", "density"), rows),
        Table(
            "Where the first of them fire most, the peak in «»",
            ("latent", "document", "peak", "context"),
            shown,
        ),
    ]


def _marked(context: Context, name: Any) -> str:
    peak = int(np.argmax(context.activations))
    near = range(max(0, peak - 12), min(len(context.tokens), peak + 5))
    return "".join(
        f"«{name(context.tokens[at])}»" if at == peak else name(context.tokens[at]) for at in near
    )


def _picture(null: dict[str, Any], scores: Floats) -> str:
    with mpl.rc_context(STYLE):
        figure, axes = empty("rank", "ReasonScore")
        rank = np.arange(1, 1 + min(len(scores), len(null["band"]["low"])))
        low, middle, high = (
            np.asarray(null["band"][key])[: len(rank)] for key in ("low", "median", "high")
        )
        axes.fill_between(
            rank,
            low,
            high,
            alpha=0.25,
            color="#6b7280",
            linewidth=0,
            label="random vocabularies, 95 %",
        )
        axes.plot(rank, middle, color="#6b7280", linewidth=1, label="their median")
        axes.plot(
            rank, scores[: len(rank)], marker="o", markersize=3, linewidth=1, label="these words"
        )
        axes.legend(frameon=False)
        return svg(figure)


DEFINITION = Definition(
    reason_score,
    options=Options,
    order=70,
    columns=(
        Column(
            "score",
            "score",
            "ReasonScore",
            "how much more it fires around words of reasoning (study=reason_score)",
        ),
        Column(
            "q", "score_q", "its q", "false discovery rate among random vocabularies as frequent"
        ),
    ),
)
