"""The logit lens against transformers' own states and logits, planted directions, definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from residual_saes.analyze import language_model
from residual_saes.analyze.language_model import unembedded
from residual_saes.analyze.stats import bootstrap_ratio
from residual_saes.analyze.studies.logit_lens import study as logit_lens
from residual_saes.analyze.studies.logit_lens.heat_map import heat_map
from residual_saes.analyze.studies.logit_lens.study import Options, Reading
from residual_saes.analyze.subject import Subject
from residual_saes.analyze.token_classes import (
    CLASSES,
    NAMES,
    SCRIPTS,
    class_of,
    members,
    script_of,
)
from residual_saes.data.errors import PipelineError, SettingError, StopRequest
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.rows.split import held_out_units
from residual_saes.data.settings import build
from residual_saes.harvest.model import LanguageModel, ModelConfig, load

DIGIT = NAMES.index("digit")
TEXTS = (
    "Question: Tina needs 25 beans and has 14.\nAnswer: 25 - 14 = 11",
    "3 + 4 = 7.\n#### 7",
    "Noah had 9 cards",
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="float32"), head=True)


@pytest.fixture(scope="module")
def sequences(lm: LanguageModel) -> list[list[int]]:
    return [[lm.tokenizer.bos, *ids] for ids in lm.tokenizer.encode(list(TEXTS))]


@pytest.fixture(scope="module")
def own(lm: LanguageModel) -> np.ndarray:
    return members(lm.tokenizer, language_model.vocabulary_size(lm))


@pytest.fixture(scope="module")
def reading(lm: LanguageModel, sequences: list[list[int]], own: np.ndarray) -> Reading:
    return read(lm, sequences, own)


def read(
    lm: LanguageModel,
    sequences: list[list[int]],
    own: np.ndarray,
    block_bytes: int = language_model.BLOCK_BYTES,
) -> Reading:
    null = logit_lens.shuffled(own, "cpu")
    return logit_lens.read(lm, sequences, null, DIGIT, StopRequest(), block_bytes)


def naive(lm: LanguageModel, one: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(L, t, V) logits from transformers' own hidden states, of which the last is normed already;
    its logits (t, V).
    """
    with torch.inference_mode():
        output = lm.causal(torch.tensor([one]), output_hidden_states=True, use_cache=False)
        norm, weight = lm.final_norm, lm.causal.lm_head.weight
        states = [
            *(norm(state[0]) for state in output.hidden_states[1:-1]),
            output.hidden_states[-1][0],
        ]
        raw = torch.stack(states).double() @ weight.double().T
    return 30 * np.tanh(raw.numpy() / 30), output.logits[0].double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# -- the lens --------------------------------------------------------------------------------------


def test_the_last_layers_lens_is_the_models_own_logits(
    lm: LanguageModel, sequences: list[list[int]]
) -> None:
    for one in sequences:
        lens, own = naive(lm, one)
        assert abs(own).max() < 30  # softcapped
        np.testing.assert_allclose(lens[-1], own, atol=1e-4)
        with torch.inference_mode():
            last = lm.causal(
                torch.tensor([one]), output_hidden_states=True, use_cache=False
            ).hidden_states[-1]
        np.testing.assert_allclose(unembedded(lm, last, normed=True)[0], own, atol=1e-4)
        assert abs(unembedded(lm, last)[0].numpy() - own).max() > 0.5  # as it is when normed twice
        assert language_model.head_deviation(lm, one) < 1e-6


def test_every_figure_is_what_its_definition_says(
    lm: LanguageModel, sequences: list[list[int]], own: np.ndarray, reading: Reading
) -> None:
    for number, one in enumerate(sequences):
        at = np.flatnonzero(reading.prompt == number)
        p = softmax(naive(lm, one)[0])[:, 1:-1]  # behind every token but BOS and the last
        assert reading.following[at].tolist() == one[2:]
        mass = np.stack([p[:, :, column].sum(-1) for column in own.T], -1)
        np.testing.assert_allclose(reading.mass[:, at], mass, atol=2e-5)
        np.testing.assert_allclose(reading.mass[:, at, : len(CLASSES)].sum(-1), 1, atol=2e-5)
        assert (reading.top[:, at] == p.argmax(-1)).all()
        np.testing.assert_allclose(reading.top_p[:, at], p.max(-1), atol=2e-5)
        ce = -np.log(np.take_along_axis(p, np.array(one[2:])[None, :, None], -1))[..., 0]
        np.testing.assert_allclose(reading.ce[:, at], ce, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            reading.kl[:, at], (p[-1] * np.log(p[-1] / p)).sum(-1), rtol=1e-4, atol=1e-4
        )
        best = p[-1].argmax(-1)
        ranks = (p > np.take_along_axis(p, best[None, :, None], -1)).sum(-1) + 1
        assert (reading.rank[:, at] == ranks).all()
    assert (reading.rank[-1] == 1).all()
    assert reading.rank.max() > 10


def test_the_null_is_the_lens_with_its_unembedding_in_other_orders(
    lm: LanguageModel, sequences: list[list[int]], own: np.ndarray, reading: Reading
) -> None:
    null = logit_lens.shuffled(own, "cpu")
    p = np.concatenate([softmax(naive(lm, one)[0])[:, 1:-1] for one in _as_read(sequences)], 1)
    for number in (0, logit_lens.ORDERS - 1):
        order = null.orders[:, number].numpy()
        assert sorted(order) == list(range(len(own)))
        assert (order != np.arange(len(own))).mean() > 0.9
        other = p[:, :, order]  # row i of the unembedding is now that of order[i]
        for kind in range(len(NAMES)):
            expected = other[:, :, own[:, kind]].sum(-1)
            np.testing.assert_allclose(
                reading.shuffled_mass[:, kind, number], expected.mean(1), atol=2e-5
            )
            if kind == DIGIT:
                np.testing.assert_allclose(
                    reading.shuffled_target[:, :, number], expected, atol=2e-5
                )
        ce = -np.log(np.take_along_axis(other, reading.following[None, :, None], -1))[..., 0]
        np.testing.assert_allclose(reading.shuffled_ce[:, number], ce.mean(1), rtol=1e-4)
    share = own.mean(0)
    np.testing.assert_allclose(
        reading.shuffled_mass.mean((0, 2)), share, atol=0.08
    )  # the base rate


def _as_read(sequences: list[list[int]]) -> list[list[int]]:
    return sorted(sequences, key=len, reverse=True)


def test_the_lens_finds_planted_directions(lm: LanguageModel, own: np.ndarray) -> None:
    """A state that the final norm turns into a token's own unembedding row."""
    weight = lm.causal.lm_head.weight
    planted = torch.arange(6, len(weight))
    planted = planted[
        (weight[planted] @ weight.T).argmax(1) == planted
    ]  # some rows are shadowed by longer ones
    assert len(planted) > 100
    states = 5 * weight[planted] / lm.final_norm.weight
    null = logit_lens.shuffled(own, "cpu")
    top, top_p, ce, kl, rank, masses, _ = logit_lens.measure(lm, [states, states], planted, null)
    assert (top == planted.numpy()).all()
    np.testing.assert_allclose(ce, -np.log(top_p), rtol=1e-4, atol=1e-6)
    assert (kl == 0).all() and (rank == 1).all()
    assert (masses[0][np.arange(len(planted)), own[planted].argmax(1)] >= top_p[0] - 1e-5).all()


def test_blocks_of_positions_change_nothing(
    lm: LanguageModel,
    sequences: list[list[int]],
    own: np.ndarray,
    reading: Reading,
) -> None:
    block_bytes = 4 * language_model.vocabulary_size(lm) * 3
    parts = language_model.blocks(lm, 8, block_bytes)
    assert [part.stop - part.start for part in parts] == [3, 3, 2]
    for whole, blocked in zip(reading, read(lm, sequences, own, block_bytes), strict=True):
        np.testing.assert_allclose(whole, blocked, rtol=1e-4, atol=1e-4)


def test_a_head_with_a_step_of_its_own_is_refused(
    lm: LanguageModel, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lm.causal.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = real(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(lm.causal, "forward", scaled)
    with pytest.raises(PipelineError):
        language_model.head_deviation(lm, sequences[0])


# -- classes and commitment ------------------------------------------------------------------------


def test_every_token_has_one_class(lm: LanguageModel, own: np.ndarray) -> None:
    expected = {
        "english": [" the", "Ans", "a", "'s", "don\u2019t", "twenty-one", "THE"],
        "other": [
            " дом",
            "é",
            "naïve",
            "の",
            "٣",
            "½",
            "\N{REPLACEMENT CHARACTER}",
            " a\N{REPLACEMENT CHARACTER}",
        ],
        "digit": ["7", " 42", "1,000", "3.14", ".5"],
        "code": [
            "",
            " ",
            "\n\n",
            ".",
            "####",
            "=>",
            "getName",
            "_id",
            "x2",
            "<bos>",
            "<unused7>",
            "\x00",
            "→",
            "1)",
            "-",
        ],
    }
    for name, texts in expected.items():
        assert {text: class_of(text) for text in texts} == dict.fromkeys(texts, name)
    assert len(own) == 512 and (own[:, : len(CLASSES)].sum(1) == 1).all()
    assert own[:, : len(CLASSES)].any(0).all()
    decode = lm.tokenizer.inner.decode
    assert sorted(decode([token]) for token in np.flatnonzero(own[:, DIGIT])) == list("0123456789")
    # Rows of an embedding without a token.
    assert members(lm.tokenizer, 600)[590].nonzero()[0].tolist() == [CLASSES.index("code")]


def test_scripts_are_told_apart() -> None:
    expected = {
        "chinese": ["的", " 你好", "T恤", "豈", "一。"],
        "bengali": ["ক", " আমি", "৫"],
        "hindi": ["नमस्ते", "ि", "५"],
        "arabic": [" سلام", "٣", "۴", "\N{ARABIC LETTER ALEF FINAL FORM}"],
        None: [
            "",
            "the",
            "é",
            "の",
            "日の",
            "дом",
            "한",
            "7",
            "।",
            "\N{REPLACEMENT CHARACTER}",
            "的ক",
        ],
    }
    for name, texts in expected.items():
        assert {text: script_of(text) for text in texts} == dict.fromkeys(texts, name)
    for text in [text for name, texts in expected.items() if name for text in texts]:
        assert class_of(text) == "other"  # of which the scripts are parts


def test_bands_are_means_of_their_layers_beside_random_rows(own: np.ndarray) -> None:
    """Planted: early layers say Chinese, the last one English, and nothing under the null."""
    vocabulary = np.zeros((300, len(NAMES)), bool)
    vocabulary[:, CLASSES.index("code")] = True
    for ids, names in ((range(5), ["other", "chinese"]), (range(5, 10), ["english"])):
        vocabulary[list(ids)] = [name in names for name in NAMES]
    prompt = np.repeat(np.arange(4), 5)
    top = np.array([[0, 1, 2, 3, 4] * 4] * 2 + [[5, 6, 7, 8, 9] * 4])
    mass = vocabulary[top].astype(np.float32)
    reading = made_reading(np.zeros((3, 20), np.float32), prompt)._replace(top=top, mass=mass)
    null = logit_lens.shuffled(vocabulary, "cpu")
    early, late = logit_lens.by_band(reading, null, [range(2), range(2, 3)])
    assert (early["first"], early["last"], late["first"], late["last"]) == (0, 1, 2, 2)
    for kind in ("mass", "top"):
        assert [early[kind][name]["value"] for name in ("chinese", "english")] == [1, 0]
        assert [late[kind][name]["value"] for name in ("chinese", "english")] == [0, 1]
        assert early[kind]["chinese"]["interval"] == (1, 1)
    for band in (early, late):  # in other orders the same rows mean something else
        assert band["top_shuffled"]["code"]["value"] > 0.9
        assert band["top_shuffled"]["chinese"]["value"] < 0.1
    # By hand, for one order: the top id's row is another id's.
    order = null.orders[:, 0].numpy()
    named = np.array([np.flatnonzero(order == one)[0] for one in top[2]])
    np.testing.assert_allclose(
        logit_lens._top_share(null, top[2:], 0)[0], vocabulary[named].mean(0)
    )


def test_bands_are_thirds_or_as_asked() -> None:
    thirds = [(band.start, band.stop) for band in Options().bands_of(42)]
    assert thirds == [(0, 14), (14, 28), (28, 42)]
    assert [len(band) for band in Options().bands_of(1)] == [1]
    asked = Options(bands=[15, 30]).bands_of(42)
    assert [(band.start, band.stop) for band in asked] == [(0, 15), (15, 30), (30, 42)]
    for wrong in ([0], [30, 15], [42], ["a"], 7, [5, 5], [True]):
        with pytest.raises(SettingError, match=r"study\.bands"):
            Options(bands=wrong).bands_of(42)


def test_commitment_is_from_where_on_the_class_has_half() -> None:
    mass = np.array(
        [
            [0.9, 0.9, 0.1, 0.6, 0.9],
            [0.9, 0.4, 0.1, 0.6, 0.9],
            [0.9, 0.5, 0.1, 0.6, 0.9],
            [0.9, 0.7, 0.5, 0.6, 0.4],
        ]
    )
    np.testing.assert_array_equal(logit_lens.commitment(mass), [0, 2, 3, 0, np.nan])


def made_reading(target: np.ndarray, prompt: np.ndarray) -> Reading:
    """A reading whose class `other` has `target` (L, n), the rest being `code`."""
    layers, n = target.shape
    mass = np.zeros((layers, n, len(NAMES)), np.float32)
    mass[:, :, 1], mass[:, :, 3] = target, 1 - target
    rng = np.random.default_rng(0)
    flat = [rng.random((layers, n)).astype(np.float32) for _ in range(3)]
    top, rank = rng.integers(0, 3, (layers, n)), rng.integers(1, 9, (layers, n))
    orders = logit_lens.ORDERS
    null = (
        np.repeat(target[:, :, None], orders, 2),
        np.zeros((layers, len(NAMES), orders)),
        np.zeros((layers, orders)),
    )
    return Reading(prompt, np.zeros(n, np.int64), top, flat[0], flat[1], flat[2], rank, mass, *null)


def test_commitment_of_prompts_has_intervals_over_prompts() -> None:
    prompt = np.array([0, 0, 0, 1, 1, 2])
    target = np.array([[0, 0, 1, 0, 1, 0], [0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0]], np.float32)
    found = logit_lens.committed(made_reading(target, prompt), 1)
    assert found["mean_layer"]["value"] == pytest.approx((2 + 1 + 0 + 0) / 4)
    assert found["median_layer"]["value"] == pytest.approx(
        np.median([1, 0])
    )  # the third prompt never commits
    assert found["never"]["value"] == pytest.approx(2 / 6)
    assert found["never"]["interval"] == pytest.approx((0, 1))  # all prompt 0, or all prompt 2
    assert found["positions_by_layer"].tolist() == [2, 1, 1]
    assert found["shuffled"]["never"]["value"] == pytest.approx(2 / 6)
    # In one order of the null nothing commits: the mean is that of the other orders.
    reading = made_reading(target, prompt)
    silent = reading.shuffled_target.copy()
    silent[:, :, 0] = 0
    null = logit_lens.committed(reading._replace(shuffled_target=silent), 1)["shuffled"]
    assert null["mean_layer"]["value"] == pytest.approx((2 + 1 + 0 + 0) / 4)
    assert null["never"]["value"] > 2 / 6
    nothing = logit_lens.committed(made_reading(0 * target, prompt), 1)
    assert math.isnan(nothing["mean_layer"]["value"]) and nothing["never"]["value"] == 1


def test_means_by_layer_and_their_intervals(reading: Reading) -> None:
    rows = logit_lens.by_layer(reading)
    counts = np.bincount(reading.prompt).astype(float)
    for layer in (0, 7):
        ce = np.bincount(reading.prompt, reading.ce[layer])
        assert rows[layer]["ce"]["value"] == pytest.approx(reading.ce[layer].mean())
        by_reading = np.argsort([np.argmax(reading.prompt == n) for n in range(3)])
        assert rows[layer]["ce"]["interval"] == pytest.approx(
            bootstrap_ratio(ce[by_reading], counts[by_reading])
        )
        assert rows[layer]["rank"]["value"] == pytest.approx(
            np.exp(np.log(reading.rank[layer]).mean())
        )
        agrees = (reading.top[layer] == reading.top[-1]).mean()
        assert rows[layer]["agrees"]["value"] == pytest.approx(agrees)
        low, high = rows[layer]["digit"]["interval"]
        assert low <= rows[layer]["digit"]["value"] <= high
        assert rows[layer]["digit"]["value"] == pytest.approx(reading.mass[layer, :, DIGIT].mean())
    assert rows[-1]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["ce"]["value"] < rows[-1]["shuffled"]["ce"]["interval"][0]


def test_one_prompt_has_figures_without_intervals(reading: Reading) -> None:
    row = logit_lens.by_layer(reading._replace(prompt=np.zeros_like(reading.prompt)))[0]
    assert row["ce"]["interval"] is row["rank"]["interval"] is None
    assert row["rank"]["value"] == pytest.approx(np.exp(np.log(reading.rank[0]).mean()))


# -- the study -------------------------------------------------------------------------------------


def test_prompts_are_the_longest_pieces_of_different_documents(tiny_run: Path) -> None:
    subject = Subject.open(tiny_run, None, torch.device("cpu"))
    longest: dict[int, int] = {}
    for unit in held_out_units(subject.store):
        document, tokens = subject.store.document(unit), subject.store.tokens(unit)
        for row in range(len(document)):
            for number in np.unique(document[row]):
                inside = document[row] == number
                assert tokens[row][inside][0] == 2
                longest[int(number)] = max(longest.get(int(number), 0), int(inside.sum()))
    found = logit_lens.prompts(subject, 1000)
    assert {piece.document: len(piece.ids) for piece in found} == {
        n: t for n, t in longest.items() if t > 2
    }
    assert [piece.document for piece in logit_lens.prompts(subject, 5)] == [
        piece.document for piece in found[:5]
    ]


def test_the_study_of_the_embedded_model(tiny_study) -> None:
    study = tiny_study("logit_lens", problems=None, prompts=24, tokens=48, target="digit")
    outcome = study.perform(logit_lens.DEFINITION)
    figures = outcome.figures
    assert figures["prompts"] == 24 == len(set(figures["documents"]))
    last = figures["layers"][-1]
    # The model knows when a digit comes, and the null, which is as peaked, does not.
    assert last["digit"]["value"] == pytest.approx(figures["next_token_share"]["digit"], abs=0.05)
    assert last["digit"]["value"] > 2 * last["shuffled"]["digit"]["interval"][1]
    assert figures["commitment"]["never"]["value"] == pytest.approx(
        1 - last["digit"]["value"], abs=0.1
    )
    assert last["ce"]["value"] < figures["layers"][0]["ce"]["value"] / 4
    assert "digit" in outcome.summary[0]
    assert len(outcome.tables[0].rows) == 12
    for name in outcome.pictures:
        ElementTree.fromstring((study.folder / f"{name}.svg").read_text())
    again = tiny_study("logit_lens", problems=None, prompts=24, tokens=48, target="digit").perform(
        replace(logit_lens.DEFINITION, run=_never)
    )
    assert again.summary == outcome.summary


def _never(_study: object) -> None:
    raise AssertionError("the study was done already")


def test_questions_are_prompts_where_there_are_problems(tiny_study, tmp_path: Path) -> None:
    study = tiny_study("logit_lens", "tiny", {"questions": 3}, prompts=24, tokens=9, target="digit")
    outcome = study.perform(logit_lens.DEFINITION)
    figures = outcome.figures
    assert figures["prompts"] == 3 == len(figures["questions"]) and figures["asked"] == "lm_eval"
    assert figures["positions"] == 3 * 8  # behind each of a prompt's first tokens but BOS
    assert "documents" not in figures
    captions = [table.caption for table in outcome.tables]
    (of_mass,) = [at for at, caption in enumerate(captions) if "script by layers" in caption]
    assert [row[0] for row in outcome.tables[of_mass].rows] == [
        "0 to 3", "random rows", "4 to 7", "random rows", "8 to 11", "random rows",
    ]  # fmt: skip
    assert set(SCRIPTS) < set(outcome.tables[of_mass].header)
    with pytest.raises(SettingError, match="problems="):
        logit_lens.logit_lens(tiny_study("logit_lens", "tiny", {"questions": 1}))


def test_words_in_a_heat_map_are_no_tex_and_no_markup() -> None:
    drawn = heat_map([[0.1, 0.9]], [["$x_1$", "<b>&"]], ["日本", "averylongword"], "x", "y", "p")
    text = "".join(ElementTree.fromstring(drawn).itertext())
    for word in ("$x_1$", "<b>&", "日本", "averylon…"):
        assert word in text


def test_options() -> None:
    settings = dict(OmegaConf.load("conf/study/logit_lens.yaml"))
    assert settings.pop("name") == "logit_lens"
    assert build(Options, "study", settings) == Options()
    for wrong in ({"prompts": 1}, {"tokens": 1}, {"target": "french"}):
        with pytest.raises(SettingError, match=f"study.{next(iter(wrong))}"):
            build(Options, "study", wrong)


def test_a_head_of_another_width_is_one_line() -> None:
    """RemBERT's head reads wider states than its layers give."""
    lm = load(ModelConfig(EMBEDDED, dtype="float32"), head=True)
    head = lm.causal.get_output_embeddings()
    wider = torch.nn.Linear(head.in_features + 8, head.out_features, bias=False)
    lm.causal.set_output_embeddings(wider)
    with pytest.raises(PipelineError, match=str(head.in_features + 8)):
        language_model.head_deviation(lm, [2, 5, 6])
