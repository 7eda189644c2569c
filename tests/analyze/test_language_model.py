"""The model as the studies use it, against transformers' own outputs and plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from residual_saes.analyze import language_model
from residual_saes.data.model_path import EMBEDDED
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from tests.harvest.models import COMPOSITE, CONFIGS, save_composite, save_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="float32"), head=True)


@pytest.fixture
def sequences(lm: LanguageModel) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [
        [lm.tokenizer.bos, *rng.integers(6, lm.vocabulary, n).tolist()] for n in (40, 3, 17, 40, 1)
    ]


def hidden_states(lm: LanguageModel, sequence: list[int]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return lm.causal(
            torch.tensor([sequence]), output_hidden_states=True, use_cache=False
        ).hidden_states


def test_batches_hold_every_sequence_once_and_no_more_tokens_than_allowed(
    sequences: list[list[int]],
) -> None:
    seen = []
    for numbers, ids in language_model.batches(sequences, 90):
        seen += numbers
        assert ids.numel() <= 90
        for number, row in zip(numbers, ids, strict=True):
            assert row[: len(sequences[number])].tolist() == sequences[number]
            assert not row[len(sequences[number]) :].any()
    assert sorted(seen) == list(range(5))
    assert [len(numbers) for numbers, _ in language_model.batches(sequences, 10)] == [
        1,
        1,
        1,
        2,
    ]  # one is always taken


def test_residuals_are_transformers_hidden_states(
    lm: LanguageModel, sequences: list[list[int]]
) -> None:
    found = dict(language_model.residuals(lm, sequences, [0, 5, 10]))
    assert sorted(found) == list(range(5))
    for number, sequence in enumerate(sequences):
        states = hidden_states(lm, sequence)
        for layer in (0, 5, 10):
            torch.testing.assert_close(
                found[number][layer], states[layer + 1][0], rtol=1e-5, atol=1e-5
            )


def test_a_sequence_is_not_changed_by_its_batch(
    lm: LanguageModel, sequences: list[list[int]]
) -> None:
    together = dict(language_model.residuals(lm, sequences, [11]))
    for number, sequence in enumerate(sequences):
        ((_, alone),) = language_model.residuals(lm, [sequence], [11])
        torch.testing.assert_close(together[number][11], alone[11], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_unembedded_states_are_the_models_logits(family: str, tmp_path: Path) -> None:
    other = load(ModelConfig(str(save_model(tmp_path, family)), dtype="float32"), head=True)
    sequence = [other.tokenizer.bos, 7, 9, 11, 8]
    ((_, expected),) = language_model.logits(other, [sequence])
    last = other.n_layers - 1
    ((_, states),) = language_model.residuals(other, [sequence], [last])
    torch.testing.assert_close(
        language_model.unembedded(other, states[last]), expected, rtol=1e-4, atol=1e-4
    )
    normed = hidden_states(other, sequence)[-1][0]
    torch.testing.assert_close(
        language_model.unembedded(other, normed, normed=True), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["gemma4_multimodal", *COMPOSITE])
def test_a_model_that_sees_gives_its_text_model_with_its_own_weights(
    family: str, tmp_path: Path
) -> None:
    folder = (save_composite if family in COMPOSITE else save_model)(tmp_path, family)
    other = load(ModelConfig(str(folder), dtype="float32"), head=True)
    kind = AutoModelForImageTextToText if family in COMPOSITE else AutoModelForCausalLM
    whole = kind.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    ids = torch.tensor([[other.tokenizer.bos, 7, 9, 11]])
    with torch.inference_mode():
        torch.testing.assert_close(
            other.causal(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_an_edit_is_seen_above_and_taken_back(
    lm: LanguageModel, sequences: list[list[int]]
) -> None:
    def first() -> torch.Tensor:
        return next(language_model.logits(lm, sequences))[1]

    before = first()
    with language_model.edited(lm.blocks[4], lambda states: states):
        assert torch.equal(first(), before)
    with language_model.edited(lm.blocks[4], lambda states: states + 1):
        assert not torch.allclose(first(), before)
    with (
        pytest.raises(ZeroDivisionError),
        language_model.edited(lm.blocks[4], lambda states: states + 1 / 0),
    ):
        first()
    assert torch.equal(first(), before)


def plainly(
    lm: LanguageModel, prompt: list[int], new_tokens: int, ends: set[int]
) -> language_model.Generation:
    """Greedy decoding without cache, batch or transformers' generate."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.inference_mode():
            token = int(lm.causal(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            return language_model.Generation(ids[len(prompt) :], True)
        ids.append(token)
    return language_model.Generation(ids[len(prompt) :], False)


def test_generation_is_greedy_decoding(lm: LanguageModel) -> None:
    questions = [
        "Question: Anna has 3 pens and buys 4 more. How many pens does Anna have now?\nAnswer:",
        "Hello",
        "",
    ]
    prompts = [[lm.tokenizer.bos, *ids] for ids in lm.tokenizer.encode(questions)]
    found = language_model.generate(lm, prompts, 24)
    for own, prompt in zip(found, prompts, strict=True):
        assert own._replace(end=None) == plainly(lm, prompt, 24, {1, 5})
        assert own.end in ({1, 5} if own.finished else {None})
    assert found[0].finished
    assert not language_model.generate(lm, prompts[:1], 4)[0].finished


def test_a_stop_string_ends_a_text(lm: LanguageModel) -> None:
    (prompt,) = lm.tokenizer.encode(
        ["Question: Anna has 3 pens and buys 4 more. How many pens?\nAnswer:"]
    )
    prompt = [lm.tokenizer.bos, *prompt]
    (whole,) = language_model.generate(lm, [prompt], 24)
    ends, beside = language_model.generate(lm, [prompt, prompt[:9]], 24, ["####"])
    assert ends.finished
    assert ends.ids == whole.ids[: len(ends.ids)]
    text = lm.tokenizer.inner.decode(ends.ids)
    assert "####" in text and "####" not in lm.tokenizer.inner.decode(ends.ids[:-1])
    assert beside == language_model.generate(lm, [prompt[:9]], 24, ["####"])[0]


def test_the_head_gets_contiguous_states(tmp_path: Path) -> None:
    """Of a slice torch copies the unembedding once for each prompt."""
    other = load(ModelConfig(str(save_model(tmp_path, "llama")), dtype="float32"), head=True)
    seen: list[bool] = []
    other.causal.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous())
    )
    language_model.generate(other, [[other.tokenizer.bos, 5, 6]] * 2, 2)
    assert seen and all(seen)
