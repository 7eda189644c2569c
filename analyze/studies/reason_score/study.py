"""ReasonScore: which latents fire around words of reasoning (Galichin et al., arXiv 2503.18878).

    s_i  = p_i+ H_i^0.7 - p_i-
    p_i+ = mu_i+ / sum_j mu_j+    mu+: mean activation in the windows around the words' occurrences
    p_i- = mu_i- / sum_j mu_j-    mu-: mean over all other tokens of the same corpus
    H_i  = entropy of latent i's share by word, from its mean in each word's windows, over ln |R|

|R| counts all words, those that the corpus lacks too. Tokens are those that the run's policy keeps,
never BOS. Windows end with the document. The corpus is the run's held-out text, or all of another
store, such as one of reasoning traces.

`formula=mechreward` is that project's port. mu- is the mean in the same words' windows in a second
corpus that is not of reasoning; H is not divided by ln |R|; a phrase is its first token, and words
have no capitals; windows take 2 tokens before and 3 after. Its corpora come without a policy, so
all tokens but BOS count. The first is the other store, the second the run's held-out text.

Nothing in the formula knows of reasoning: every vocabulary has latents that score high. So the
scores stand beside those of random vocabularies, in which each word is replaced by a token as
frequent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from residual_saes.analyze.latents.contexts import Context, top_contexts, visible
from residual_saes.analyze.memory import Needed, of_pass, rows_read
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.stats import Floats, benjamini_hochberg, percentiles, permutation_p
from residual_saes.analyze.studies.reason_score import words as sentences
from residual_saes.analyze.studies.reason_score.corpus import Corpus, Word, read_corpus, words_of
from residual_saes.analyze.studies.reason_score.score import (
    ALPHA,
    FORMULAS,
    LEVEL,
    Formula,
    Marked,
    Null,
    Scorer,
    halves,
    mark,
    matched,
)
from residual_saes.analyze.study import Column, Definition, Study, write_features
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import MismatchError, SettingError, StopRequest
from residual_saes.data.settings import build
from residual_saes.data.store.kinds import SERVED
from residual_saes.harvest import hub_model
from residual_saes.harvest.tokens import Tokenizer

_SEED = 0
_FIRED = 10  # rows in which a latent must fire to be tested, whatever the words
_SHOWN = 10  # latents shown with contexts
_EACH = 3  # contexts of each


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/reason_score.yaml."""

    rows: int = 500_000  # of a corpus at most, in whole units
    words: list[str] | None = None  # None: the paper's
    formula: str = "published"  # one of FORMULAS
    corpus: str | None = None  # store of the reasoning traces; None: the run's held-out text
    draws: int = 30_000  # random vocabularies at most
    top: int = 50  # latents listed

    def __post_init__(self) -> None:
        for name in ("rows", "draws", "top"):
            if getattr(self, name) < 1:
                raise SettingError(f"study.{name}={getattr(self, name)} must be at least 1")
        if self.formula not in FORMULAS:
            raise SettingError(f"study.formula={self.formula} must be one of {', '.join(FORMULAS)}")
        if FORMULAS[self.formula].against and self.corpus is None:
            raise SettingError(
                f"study.formula={self.formula} compares two corpora; give a store of reasoning "
                "traces as study.corpus=, harvested with the run's model"
            )
        if self.words is not None and not _are_words(self.words):
            raise SettingError(
                f"study.words={self.words} must be a list of at least two words or phrases, for "
                "the entropy over them, such as [more, left]; null takes the paper's ten"
            )

    @property
    def names(self) -> list[str]:
        chosen = FORMULAS[self.formula].words if self.words is None else self.words
        return list(dict.fromkeys(chosen))


def _are_words(value: Any) -> bool:
    """Whether `value` is a list of texts, two of them different."""
    if not isinstance(value, list):
        return False
    texts = [text for text in value if isinstance(text, str) and text.strip()]
    return len(texts) == len(value) and len(set(texts)) >= 2


# -- the study -------------------------------------------------------------------------------------


def inputs(study: Study) -> dict[str, Any]:
    """What the result depends on beside the run: the other store, if one is given."""
    corpus = build(Options, "study", study.options).corpus
    return {} if corpus is None else {"corpus": study.subject.on(corpus).store.identity}


def reason_score(study: Study) -> Outcome:
    """Rank latents by ReasonScore, beside frequency-matched vocabularies."""
    options = build(Options, "study", study.options)
    tokenizer = _tokenizer(study)
    formula = FORMULAS[options.formula]
    words = words_of(tokenizer, options.names, capitals=formula.capitals)
    subject = study.subject if options.corpus is None else study.subject.on(options.corpus)
    with StopRequest() as stop:
        corpus, other = _corpora(study.subject, subject, formula, options.rows, stop)
        marked = mark(corpus, words, formula, other)
        if not any(map(len, marked.of_word)):
            raise SettingError(
                f"none of the words {', '.join(map(repr, options.names))} is in the "
                f"{len(corpus.tokens):,} tokens of {subject.store.name}; give words that are as "
                "study.words=[...], or more study.rows"
            )
        fired = np.bincount(corpus.active.indices, minlength=corpus.active.shape[1])
        tested = np.flatnonzero(fired >= _FIRED)
        if not len(tested):
            raise SettingError(
                f"no latent fires in {_FIRED} of {len(corpus.tokens):,} rows; give more study.rows"
            )
        scores, null = matched(
            Scorer(corpus, formula, other),
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
    density = fired / corpus.kept.sum()
    columns = {"score": scores, "p": null.p, "q": q, "density": density}
    of_tested = {name: column[tested] for name, column in columns.items()}
    write_features(study.folder / FEATURES, {"feature": tested, **of_tested})

    # The first latents in rank, then those behind them that are significant.
    rank = tested[np.argsort(-scores[tested], kind="stable")]
    significant = q <= LEVEL
    listed = [*rank[: options.top], *(rank[options.top :][significant[rank[options.top :]]])]
    features = []
    for latent in listed:
        row = {name: column[latent] for name, column in columns.items()}
        features.append({"feature": int(latent), **row})

    shown = [int(latent) for latent in rank[: min(options.top, _SHOWN)]]
    contexts = {}
    for latent, ranked in top_contexts(subject, shown, _EACH, options.rows).items():
        contexts[latent] = [_with_texts(context, tokenizer) for context in ranked]
    figures: dict[str, Any] = {
        "formula": {"name": options.formula, "alpha": ALPHA, **formula._asdict()},
        "corpus": _corpus_figures(subject, corpus),
        "other_corpus": _corpus_figures(study.subject, other) if other else None,
        "seed": _SEED,
        "tokens": int(corpus.kept.sum()),
        "documents": len(np.unique(corpus.document)),
        "words": _word_figures(words, marked),
        "tested": len(tested),
        "significant": int(significant[tested].sum()),
        "null": _null_figures(null, scores[rank], len(tested)),
        "halves": halves(corpus, words, formula, tested, other),
        "features": features,
        "contexts": {latent: [_joined(c) for c in ranked] for latent, ranked in contexts.items()},
    }
    picture = sentences.picture(figures["null"], scores[rank[: options.top]], options.top)
    return Outcome(
        figures,
        sentences.summary(figures),
        sentences.tables(figures, contexts),
        {"scores": picture},
    )


def _corpora(
    own: Subject, subject: Subject, formula: Formula, rows: int, stop: StopRequest
) -> tuple[Corpus, Corpus | None]:
    """The corpus of `subject`, and for a formula that compares two, the run's `own`."""
    if not formula.against:
        return read_corpus(subject, rows, stop), None
    return read_corpus(subject, rows, stop, SERVED), read_corpus(own, rows, stop, SERVED)


def _corpus_figures(subject: Subject, corpus: Corpus) -> dict[str, Any]:
    return {
        "store": PurePosixPath(subject.store.name).name,  # our folders are nobody's business
        "identity": subject.store.identity,
        "tokens": int(corpus.kept.sum()),
        "documents": len(np.unique(corpus.document)),
    }


def _word_figures(words: Sequence[Word], marked: Marked) -> list[dict[str, Any]]:
    figures = []
    for word, times, places in zip(words, marked.frequency, marked.of_word, strict=True):
        figures.append(
            {
                "word": word.name,
                "ids": word.phrases,
                "occurrences": times,
                "tokens_in_windows": len(places),
            }
        )
    return figures


def _with_texts(context: Context, tokenizer: Tokenizer) -> dict[str, Any]:
    texts = [visible(tokenizer.inner.decode([token])) for token in context.tokens]
    return {**context._asdict(), "texts": texts}


def _joined(context: Mapping[str, Any]) -> dict[str, Any]:
    """A context as figures keep it: its text in one piece."""
    figures = dict(context)
    texts = figures.pop("texts")
    return {**figures, "text": "".join(texts)}


def _tokenizer(study: Study) -> Tokenizer:
    """The store's tokenizer, without the model.

    Raises:
        MismatchError: model= has another tokenizer.
    """
    tokenizer = Tokenizer.load(hub_model.described(study.model.path, study.model.revision))
    store = study.subject.store
    recorded = store.manifest["model"]["tokenizer"]
    if recorded != tokenizer.digest:
        unequal = {"tokenizer": (recorded, tokenizer.digest)}
        way_out = "Give the model that it was harvested with, as model.path="
        raise MismatchError(f"store {store.name}", unequal, way_out)
    return tokenizer


def _null_figures(null: Null, ranked: Floats, tested: int) -> dict[str, Any]:
    """The largest scores beside those of random vocabularies, and the smallest p there can be."""
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


def memory(study: Study) -> Needed:
    """Beside a pass the corpus, of 8 bytes a latent that fires, twice while units are joined."""
    subject = study.subject
    limit = build(Options, "study", study.options).rows
    corpus = 16 * rows_read(subject, limit) * subject.sae.k
    return Needed(of_pass(subject, limit) + corpus, "study.rows")


DEFINITION = Definition(
    reason_score,
    options=Options,
    inputs=inputs,
    memory=memory,
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
