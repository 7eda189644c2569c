"""Steering's hook against plain loops over whole forward passes.

Its nulls are exact, and it can be made to write a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analyze import intervention as hook
from analyze.intervention import Steer
from analyze.language_model import edited, generate, unembedded
from analyze.problems import read
from analyze.prompts import PROMPTS
from data.site import HookPoint
from harvest.model import LanguageModel, ModelConfig, load
from harvest.model_folder import EMBEDDED
from harvest.site import tap
from tests.harvest.models import save_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="float32"), head=True)


@pytest.fixture(scope="module")
def prompts(lm: LanguageModel) -> list[list[int]]:
    found = [PROMPTS["lm_eval"](lm.tokenizer, problem.question) for problem in read("tiny", 3)]
    assert len({len(prompt) for prompt in found}) == 3
    return found


def by(lm: LanguageModel, scale: float, positions: str) -> Steer:
    """A steer along `direction`."""
    return Steer("v", direction(lm).numpy(), scale, positions)


def lengths(prompts: list[list[int]]) -> list[int]:
    return [len(prompt) for prompt in prompts]


def direction(lm: LanguageModel) -> Tensor:
    vector = torch.randn(
        lm.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return vector / vector.norm()


def traced(
    lm: LanguageModel, prompts: list[list[int]], *how: Any, new_tokens: int = 6
) -> tuple[Any, list[Tensor]]:
    """Generations, and the logits that each step chose from.

    `how` is layer, scale and positions; without, nothing is steered.
    """
    seen: list[Tensor] = []
    handle = lm.causal.register_forward_hook(
        lambda _m, _i, output: seen.append(output.logits[:, -1].clone())
    )
    try:
        if not how:
            return generate(lm, prompts, new_tokens), seen
        layer, scale, positions = how
        with hook.intervened(lm, layer, by(lm, scale, positions), lengths(prompts)):
            return generate(lm, prompts, new_tokens), seen
    finally:
        handle.remove()


def same(first: tuple[Any, list[Tensor]], second: tuple[Any, list[Tensor]]) -> bool:
    """Token for token, and every logit bit for bit."""
    return first[0] == second[0] and all(
        torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True)
    )


@pytest.mark.parametrize("positions", hook.POSITIONS)
def test_scale_0_changes_nothing_to_the_last_bit(
    lm: LanguageModel, prompts: Any, positions: str
) -> None:
    assert same(traced(lm, prompts, 5, 0.0, positions), traced(lm, prompts))


def test_the_prompt_alone_is_inert_from_the_layer_that_is_said_on(
    lm: LanguageModel, prompts: Any
) -> None:
    """In the cached path that generation takes, and where a given text is read."""
    unsteered = traced(lm, prompts, new_tokens=3)
    inert = [
        same(traced(lm, prompts, layer, 20.0, "prompt", new_tokens=3), unsteered)
        for layer in range(lm.n_layers)
    ]
    assert inert == [
        layer >= 6 for layer in range(12)
    ]  # 12 layers, the last 5 of which share keys and values
    assert hook.prompt_inert_from(lm) == 6
    texts = [(prompt, written.ids) for prompt, written in zip(prompts, unsteered[0], strict=True)]
    for layer in (5, 6, 11):
        kl = [effect.kl for effect in hook.effects(lm, texts, layer, by(lm, 20.0, "prompt"))]
        assert all(value == 0 for value in kl) if layer > 5 else all(value > 1e-6 for value in kl)
    assert not same(traced(lm, prompts, 8, 20.0, "generated", new_tokens=3), unsteered)


@pytest.mark.parametrize("family", ["gemma4", "llama", "gpt2", "qwen3_5"])
def test_other_families_are_inert_from_the_layer_that_is_said_on(
    family: str, tmp_path: Path
) -> None:
    other = load(ModelConfig(str(save_model(tmp_path, family)), dtype="float32"), head=True)
    prompts = [[2, *range(20, 29)], [2, 40, 41]]
    unsteered = traced(other, prompts, new_tokens=3)
    found = [
        same(traced(other, prompts, layer, 9.0, "prompt", new_tokens=3), unsteered)
        for layer in range(other.n_layers)
    ]
    assert found == [layer >= hook.prompt_inert_from(other) for layer in range(other.n_layers)]
    assert hook.prompt_inert_from(other) == (3 if family == "gemma4" else other.n_layers - 1)


def plain(
    lm: LanguageModel, prompt: list[int], layer: int, scale: float, positions: str, new_tokens: int
) -> list[int]:
    """Greedy steered generation of one prompt, by a whole forward pass per token."""
    ids, step = list(prompt), (scale * direction(lm)).float()

    def edit(states: Tensor) -> Tensor:
        states = states.clone()
        for at in range(states.shape[1]):
            generated = at >= len(prompt) - 1
            if positions == "all" or generated == (positions == "generated"):
                states[:, at] += step
        return states

    with torch.inference_mode(), edited(lm.blocks[layer], edit):
        for _ in range(new_tokens):
            ids.append(int(lm.causal(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == lm.tokenizer.inner.eos_token_id:
                return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("positions", hook.POSITIONS)
@pytest.mark.parametrize("layer", [3, 8])
def test_a_cached_batch_is_what_single_whole_passes_give(
    lm: LanguageModel, prompts: Any, layer: int, positions: str
) -> None:
    scale = 60.0
    written, _ = traced(lm, prompts, layer, scale, positions, new_tokens=8)
    assert [answer.ids for answer in written] == [
        plain(lm, prompt, layer, scale, positions, 8) for prompt in prompts
    ]
    changed = [answer.ids for answer in written] != [
        answer.ids for answer in traced(lm, prompts, new_tokens=8)[0]
    ]
    assert changed == (positions != "prompt" or layer == 3)


def test_padding_is_not_steered(lm: LanguageModel, prompts: Any) -> None:
    seen = []
    widths = lengths(prompts)
    with hook.intervened(lm, 3, by(lm, 2.0, "all"), widths), tap(lm, [3]) as taken:
        generate(lm, prompts, 1)
        seen.append(taken[HookPoint(3)].clone())
    with tap(lm, [3]) as taken:
        generate(lm, prompts, 1)
        seen.append(taken[HookPoint(3)].clone())
    for row, width in enumerate(widths):
        delta = (seen[0] - seen[1])[row]
        assert not delta[: max(widths) - width].any()
        expected = (2.0 * direction(lm)).float().expand(width, -1)
        torch.testing.assert_close(delta[max(widths) - width :], expected, rtol=0, atol=2e-5)


def test_the_hook_goes_when_something_fails(lm: LanguageModel, prompts: Any) -> None:
    unsteered = traced(lm, prompts)
    with (
        pytest.raises(IndexError),
        hook.intervened(lm, 4, by(lm, 30.0, "all"), lengths(prompts)),
    ):
        raise IndexError
    assert same(traced(lm, prompts), unsteered)


def test_steering_towards_a_token_writes_it(lm: LanguageModel, prompts: Any) -> None:
    """The last layer pushed to where the head reads a token."""
    rows = lm.causal.get_output_embeddings().weight.detach()
    own = unembedded(lm, 1000 * rows).argmax(-1) == torch.arange(len(rows))
    token = int(torch.nonzero(own)[100])
    towards = Steer("v", rows[token].numpy().astype(np.float64), 1e4, "generated")
    with hook.intervened(lm, 11, towards, lengths(prompts)):
        written = generate(lm, prompts, 4)
    assert all(answer.ids == [token] * 4 for answer in written)


def test_effects_are_those_of_whole_distributions(lm: LanguageModel, prompts: Any) -> None:
    three = 3 * 4 * lm.vocabulary  # bytes of 3 positions' logits
    texts = [(prompt, [7, 30, 99, 12, 200][: at % 3 + 3]) for at, prompt in enumerate(prompts)]
    texts[1] = (texts[1][0], [])
    found = hook.effects(lm, texts, 3, by(lm, 4.0, "all"), 150, three)
    for (prompt, written), effect in zip(texts, found, strict=True):
        ids, last = torch.tensor([[*prompt, *written]]), len(prompt) - 1
        with torch.inference_mode():
            with tap(lm, [3]) as taken:
                clean = lm.causal(ids, use_cache=False).logits[0, last:-1].double().log_softmax(-1)
            with edited(lm.blocks[3], lambda states: states + 4.0 * direction(lm).float()):
                moved = lm.causal(ids, use_cache=False).logits[0, last:-1].double().log_softmax(-1)
        norms = taken[HookPoint(3)][0].double().norm(dim=1)
        assert effect.kl == pytest.approx(
            float((moved.exp() * (moved - clean)).sum()), rel=1e-3, abs=1e-6
        )
        assert effect.norm == pytest.approx(float(norms[last:].mean()), rel=1e-4)
        assert effect.relative == pytest.approx(float((4.0 / norms).mean()), rel=1e-4)
