"""ReasonScore against its definition, planted latents, and random words that get what is chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse, stats

from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.studies.reason_score.corpus import (
    Corpus,
    Word,
    draw_vocabularies,
    look_alikes,
    occurrences,
    windows,
    words_of,
)
from residual_saes.analyze.studies.reason_score.score import (
    FORMULAS,
    Scorer,
    entropies,
    halves,
    mark,
    matched,
)
from residual_saes.analyze.studies.reason_score.study import DEFINITION, Options, reason_score
from residual_saes.data import durable
from residual_saes.data.errors import MismatchError, SettingError, StopRequest, StoreError
from residual_saes.data.rows.split import held_out_units
from residual_saes.harvest import hub_model
from residual_saes.harvest.tokens import Tokenizer
from tests.analyze.conftest import make_run, random_rows

BOS, TOKENS, LATENTS = 2, 60, 40
WORDS_HERE = [Word("a", ((10,), (11, 12))), Word("b", ((13,),)), Word("never", ((999,),))]


def made_corpus(n: int, rng: np.random.Generator, plant: float = 0.0) -> Corpus:
    """Pieces of 20 tokens, each latent at home with one token.

    Latent 0 also fires around WORDS_HERE, at a share `plant` of these tokens. Every fifth token is
    twice as frequent as the others.
    """
    share = np.where(np.arange(10, TOKENS) % 5, 1.0, 2.0)
    tokens = rng.choice(np.arange(10, TOKENS), n, p=share / share.sum())
    tokens[::20] = BOS
    document = np.arange(n) // 20
    kept = (tokens != BOS) & (rng.random(n) > 0.02)
    dense = rng.exponential(size=(n, LATENTS)) * (rng.random((n, LATENTS)) < 0.1)
    dense[np.arange(n), (tokens - 10) % LATENTS] += 1
    corpus = Corpus(
        tokens, document, document, kept, sparse.csr_matrix((n, LATENTS), dtype=np.float32)
    )
    around = np.concatenate(mark(corpus, WORDS_HERE, FORMULAS["published"]).of_word)
    dense[around[rng.random(len(around)) < plant], 0] += 3
    return corpus._replace(active=sparse.csr_matrix((dense * kept[:, None]).astype(np.float32)))


def published(corpus: Corpus, words: list[Word]) -> list[float]:
    """The paper's definition, token by token and latent by latent."""
    f, n = corpus.active.toarray().astype(np.float64), len(corpus.tokens)
    inside: set[int] = set()
    of_word = []
    for word in words:
        mine: set[int] = set()
        for phrase in word.phrases:
            ids = list(phrase)
            for at in range(n - len(ids) + 1):
                if (
                    corpus.tokens[at : at + len(ids)].tolist() == ids
                    and len(set(corpus.piece[at : at + len(ids)])) == 1
                ):
                    for near in range(max(0, at - 1), min(n, at + len(ids) + 2)):
                        if corpus.kept[near] and corpus.piece[near] == corpus.piece[at]:
                            mine.add(near)
        of_word.append(mine)
        inside |= mine
    others = [at for at in range(n) if corpus.kept[at] and at not in inside]
    plus, minus = f[sorted(inside)].mean(0), f[others].mean(0)
    found = []
    for latent in range(f.shape[1]):
        means = [f[sorted(mine), latent].mean() if mine else 0.0 for mine in of_word]
        entropy = -sum(m / sum(means) * math.log(m / sum(means)) for m in means if m)
        entropy /= math.log(len(words))
        found.append(plus[latent] / plus.sum() * entropy**0.7 - minus[latent] / minus.sum())
    return found


def ported(reasoning: Corpus, baseline: Corpus, words: list[Word]) -> np.ndarray:
    """mechreward's, from its formula: two corpora, samples without BOS, head tokens, a mask."""
    heads = [[phrase[0] for phrase in word.phrases] for word in words]

    def means(corpus: Corpus, ids: list[int]) -> np.ndarray:
        """Of the tokens up to 2 before and 3 behind one of `ids`, sample by sample."""
        chosen = []
        for piece in np.unique(corpus.piece):
            sample = np.flatnonzero((corpus.piece == piece) & (corpus.tokens != BOS))
            hits = np.flatnonzero(np.isin(corpus.tokens[sample], ids))
            for place, row in enumerate(sample):
                if any(-2 <= place - hit <= 3 for hit in hits):
                    chosen.append(row)
        dense = corpus.active.toarray().astype(np.float64)
        return dense[chosen].mean(0) if chosen else np.zeros(dense.shape[1])

    every = [token for ids in heads for token in ids]
    p_R, p_NR = (
        mean / (mean.sum() + 1e-12) for mean in (means(reasoning, every), means(baseline, every))
    )
    by_word = np.array([means(reasoning, ids) for ids in heads])
    share = by_word / (by_word.sum(0) + 1e-12)
    entropy = np.maximum(-(share * np.log(share + 1e-12)).sum(0), 0)
    return p_R * entropy**0.7 - p_NR


def everything(corpus: Corpus) -> Corpus:
    """The corpus without a policy: all tokens but BOS count."""
    return corpus._replace(kept=corpus.tokens != BOS)


def test_scores_are_the_papers_definition() -> None:
    corpus = made_corpus(2000, np.random.default_rng(0), plant=0.5)
    formula = FORMULAS["published"]
    scores = Scorer(corpus, formula).of(mark(corpus, WORDS_HERE, formula))
    np.testing.assert_allclose(scores, published(corpus, WORDS_HERE), rtol=1e-4, atol=1e-7)


def test_scores_are_mechrewards() -> None:
    formula = FORMULAS["mechreward"]
    rng = np.random.default_rng(0)
    corpus, other = everything(made_corpus(1500, rng, 0.5)), everything(made_corpus(1000, rng, 0.1))
    scores = Scorer(corpus, formula, other).of(mark(corpus, WORDS_HERE, formula, other))
    np.testing.assert_allclose(scores, ported(corpus, other, WORDS_HERE), rtol=1e-4, atol=1e-7)
    silent = other._replace(tokens=np.where(other.tokens == BOS, BOS, 50))  # it has none of them
    scores = Scorer(corpus, formula, silent).of(mark(corpus, WORDS_HERE, formula, silent))
    np.testing.assert_allclose(scores, ported(corpus, silent, WORDS_HERE), rtol=1e-4, atol=1e-7)


def test_the_vocabularies_are_the_papers_and_the_ports() -> None:
    tokenizer = Tokenizer.load(hub_model.described("embedded", "main"))
    decode = tokenizer.inner.decode
    for name, but in (("published", ["But"]), ("mechreward", ["but", " but"])):
        formula = FORMULAS[name]
        assert Options(formula=name, corpus="s.zarr").names == list(formula.words)
        assert len(formula.words) == 10 and formula.words[5:8] == ("let me", "therefore", "however")
        words = words_of(tokenizer, formula.words, capitals=formula.capitals)
        assert [decode(list(ids)) for ids in words[8].phrases] == but


def test_entropy_is_1_where_all_words_are_alike_and_0_where_one_is() -> None:
    means = np.array([[2.0, 5.0, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    np.testing.assert_allclose(entropies(means, True), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(entropies(means, False), [math.log(3), 0, 0], atol=1e-12)


def test_windows_end_with_their_document() -> None:
    tokens = np.array([BOS, 5, 6, 7, BOS, 6, 7, 8, 9, 6])
    piece = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    corpus = Corpus(tokens, piece, piece, tokens != BOS, None)
    assert occurrences(corpus, [6, 7]).tolist() == [2, 5]
    assert occurrences(corpus, [7, BOS]).tolist() == []  # it would stand in two
    assert windows(corpus, np.array([2]), 2, 1, 2).tolist() == [1, 2, 3]
    assert windows(corpus, np.array([5, 9]), 1, 1, 2).tolist() == [5, 6, 7, 8, 9]


def test_a_planted_latent_tops_and_only_it_is_significant() -> None:
    corpus = made_corpus(8000, np.random.default_rng(1), plant=1.0)
    formula, tested = FORMULAS["published"], np.arange(LATENTS)
    marked = mark(corpus, WORDS_HERE, formula)
    with StopRequest() as stop:
        scores, null = matched(
            Scorer(corpus, formula),
            WORDS_HERE,
            marked,
            tested,
            np.random.default_rng(0),
            bos=BOS,
            draws=1500,
            top=5,
            stop=stop,
        )
    assert int(np.argmax(scores)) == 0
    assert null.p[0] < 0.01  # some draws name tokens that stand beside the words, never both words
    assert null.draws == LATENTS / 0.05 < 1500
    # Words of these frequencies are all that the null has, so latents of other tokens are where
    # chance puts them.
    assert np.mean(null.p[1:] < 0.05) < 0.2
    assert (scores[0] > null.leading[:, 0]).all()


def test_halves_are_of_whole_documents() -> None:
    corpus = made_corpus(4000, np.random.default_rng(5), plant=0.8)
    formula = FORMULAS["published"]
    found = halves(corpus, WORDS_HERE, formula, np.arange(LATENTS))
    side = np.array([int(durable.digest(str(one).encode())[:8], 16) % 2 for one in corpus.document])
    assert 0.4 < side.mean() < 0.6
    parts = [Corpus._make(column[side == half] for column in corpus) for half in (0, 1)]
    scores = [published(part, WORDS_HERE) for part in parts]
    assert found["spearman"] == pytest.approx(stats.spearmanr(*scores).statistic, abs=1e-3)
    tops = [set(np.argsort(-np.array(score))[:20].tolist()) for score in scores]
    assert found["shared"] == len(tops[0] & tops[1])
    assert found["shared_by_chance"] == 20 * 20 / LATENTS
    alone = corpus._replace(tokens=np.where(side == 0, 50, corpus.tokens))  # no word in one half
    assert halves(alone, WORDS_HERE, formula, np.arange(LATENTS))["spearman"] is None


def test_p_values_of_random_words_are_uniform() -> None:
    """Where the words are themselves drawn at random, a share p of the p values is at most p."""
    rng, found = np.random.default_rng(2), []
    formula = FORMULAS["published"]
    corpus = made_corpus(3000, rng)
    scorer = Scorer(corpus, formula)
    with StopRequest() as stop:
        for _ in range(25):
            words = [
                Word(str(one), ((int(one),),))
                for one in rng.choice(np.arange(10, TOKENS), 3, replace=False)
            ]
            _, null = matched(
                scorer,
                words,
                mark(corpus, words, formula),
                np.arange(LATENTS),
                rng,
                bos=BOS,
                draws=200,
                top=1,
                stop=stop,
            )
            found.append(null.p)
    p = np.concatenate(found)
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.02 + 0.2 * level)


def test_more_draws_for_some_are_those_of_all() -> None:
    """A latent compared with every vocabulary has the p value that it has if all latents are."""
    corpus = made_corpus(3000, np.random.default_rng(3), plant=0.3)
    formula = FORMULAS["published"]
    every = np.arange(LATENTS)
    marked = mark(corpus, WORDS_HERE, formula)
    scorer = Scorer(corpus, formula)
    nulls = []
    for first in (100, 10**6):
        with StopRequest() as stop:
            _, null = matched(
                scorer,
                WORDS_HERE,
                marked,
                every,
                np.random.default_rng(0),
                bos=BOS,
                draws=700,
                top=1,
                stop=stop,
                first=first,
            )
        nulls.append(null)
    staged, whole = nulls
    further = np.flatnonzero(staged.p < 1 / 101)
    assert 0 < len(further) < LATENTS
    np.testing.assert_array_equal(staged.p[further], whole.p[further])
    settled = np.setdiff1d(every, further)
    of_101 = staged.p[settled] * 101
    np.testing.assert_allclose(of_101, np.round(of_101))  # these were compared with 100
    np.testing.assert_allclose(staged.p, whole.p, atol=0.15)
    assert staged.leading.shape == (100, 1) and whole.leading.shape == (700, 1)


def test_look_alikes_are_as_frequent_and_never_the_words() -> None:
    rng = np.random.default_rng(4)
    tokens = np.repeat(np.arange(100, 400), rng.integers(1, 60, 300))
    corpus = Corpus(tokens, tokens * 0, tokens * 0, np.ones(len(tokens), bool), None)
    counts = np.bincount(tokens)
    alike = look_alikes(corpus, [30, 0, 5, 10**6], {100, 101}, rng)
    assert [len(one) for one in alike] == [50, 0, 37, 10]
    assert not {100, 101} & set(np.concatenate(alike).tolist())
    for frequency, found in ((30, alike[0]), (5, alike[2])):
        assert np.abs(np.log(counts[found] / frequency)).max() <= math.log(2)
    assert counts[alike[3]].min() >= np.sort(counts)[-12]
    drawn = draw_vocabularies(alike, 300, rng)
    assert (drawn[:, 1] == -1).all()
    for word in (0, 2, 3):
        assert set(drawn[:, word].tolist()) <= set(alike[word].tolist())
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    with pytest.raises(SettingError, match=r"study\.words"):
        look_alikes(corpus, [3], set(range(100, 395)), rng)


def test_words_are_spelled_as_they_are_meant() -> None:
    tokenizer = Tokenizer.load(hub_model.described("embedded", "main"))
    more, but, many = words_of(tokenizer, ["more", "But", " How many"])
    texts = [tokenizer.inner.decode(list(ids)) for ids in more.phrases]
    assert sorted(texts) == [" More", " more", "More", "more"]
    assert [tokenizer.inner.decode(list(ids)) for ids in but.phrases] == ["But"]
    assert [tokenizer.inner.decode(list(ids)) for ids in many.phrases] == [" How many"]


SETTINGS = {
    "rows": 1e5,
    "words": ["more", "left", " How many"],
    "formula": "published",
    "draws": 1000,
    "top": 20,
}


def test_the_study_of_the_embedded_model(tiny_study) -> None:
    study = tiny_study("reason_score", **SETTINGS)
    outcome = reason_score(study)
    figures = json.loads(dumped(outcome.figures))
    corpus = whole_corpus(study.subject)
    tokenizer = Tokenizer.load(hub_model.described("embedded", "main"))
    expected = published(corpus, words_of(tokenizer, SETTINGS["words"]))
    for one in figures["features"]:
        assert one["score"] == pytest.approx(expected[one["feature"]], rel=1e-3, abs=1e-6)
    scores = [one["score"] for one in figures["features"]]
    assert scores[:20] == sorted(scores[:20], reverse=True)
    assert sum(one["q"] <= 0.05 for one in figures["features"]) == figures["significant"]
    assert all(one["occurrences"] > 0 for one in figures["words"])
    assert 0 < figures["halves"]["spearman"] <= 1
    assert len(figures["contexts"]) == 10
    for contexts in figures["contexts"].values():
        for context in contexts:
            assert list(context) == ["document", "peak", "tokens", "activations", "text"]
            shown = context["text"].replace("⏎", "\n")
            assert shown == tokenizer.inner.decode(context["tokens"])
    assert outcome.pictures["scores"].svg.startswith("<svg")
    assert reason_score(study).figures["features"] == outcome.figures["features"]


def whole_corpus(subject, kinds: tuple[int, ...] = (2,)) -> Corpus:
    """The subject's text and activations, put together row by row."""
    store, parts = subject.store, []
    numbers = range(store.units) if subject.whole else held_out_units(store)
    for number, unit in zip(numbers, subject.rows(10**9), strict=True):
        tokens, starts = store.tokens(number).ravel(), store.piece_starts(number).ravel()
        pre = (unit.rows - subject.sae.b_dec) @ subject.sae.W_enc + subject.sae.b_enc
        values, indices = (tensor.numpy() for tensor in pre.topk(subject.sae.k))
        f = np.zeros((len(tokens), subject.sae.d_sae))
        kept = np.zeros(len(tokens), bool)
        for row, place in enumerate(unit.local):
            if unit.kind[row] in kinds:  # 2 is ordinary: neither BOS nor an outlier
                kept[place] = True
                f[place, indices[row]] = np.maximum(values[row], 0)
        piece = np.cumsum(starts) + 10**6 * number
        parts.append((tokens.astype(np.int64), piece, piece, kept, f))
    *columns, f = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Corpus(*columns, sparse.csr_matrix(f))


@pytest.mark.parametrize(
    "setting",
    [
        {"words": ["xylophone", "zither"]},
        {"words": ["more"]},
        {"words": "more"},
        {"formula": "other"},
        {"rows": 0},
        {"draws": 0},
    ],
)
def test_refusals(tiny_study, setting: dict) -> None:
    (name,) = setting
    with pytest.raises(SettingError, match=rf"study\.{name}"):
        reason_score(tiny_study("reason_score", **{**SETTINGS, **setting}))


def test_a_corpus_of_traces_and_the_port_of_two(tiny_study, tmp_path: Path) -> None:
    """The whole store in the part of the traces; its held-out units in that of other text."""
    store = tiny_study("reason_score").subject.store.name
    two = {**SETTINGS, "corpus": store, "formula": "mechreward", "words": ["more", "left"]}
    found = reason_score(tiny_study("reason_score", **two)).figures
    subject = tiny_study("reason_score").subject
    traces = everything(whole_corpus(subject.on(store), kinds=(0, 1, 2)))
    tokenizer = Tokenizer.load(hub_model.described("embedded", "main"))
    words = words_of(tokenizer, ["more", "left"], capitals=False)
    expected = ported(traces, everything(whole_corpus(subject, kinds=(0, 1, 2))), words)
    assert found["corpus"]["tokens"] == (traces.tokens != BOS).sum()
    for one in found["features"]:
        assert one["score"] == pytest.approx(expected[one["feature"]], rel=1e-3, abs=1e-6)
    assert found["corpus"]["tokens"] > 2 * found["other_corpus"]["tokens"]
    alone = tiny_study("reason_score", **{**two, "formula": "published"}).perform(DEFINITION)
    assert alone.figures["corpus"] == found["corpus"] and alone.figures["other_corpus"] is None
    with pytest.raises(SettingError, match=r"study\.corpus"):
        reason_score(tiny_study("reason_score", **{**two, "corpus": None}))
    with pytest.raises(StoreError, match=r"none\.zarr"):
        reason_score(tiny_study("reason_score", **{**two, "corpus": str(tmp_path / "none.zarr")}))
    other = make_run(tmp_path, random_rows()).store
    with pytest.raises(MismatchError, match="weights"):
        reason_score(tiny_study("reason_score", **{**two, "corpus": other.name}))
